"""The precision of a trial's matrix products; all trials before this were float32."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.add_column(
        "trials", sa.Column("precision", sa.Text, nullable=False, server_default="float32")
    )

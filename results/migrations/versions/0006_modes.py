"""Which solution of its task an evaluation episode was; earlier episodes tell none."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("evals", sa.Column("mode", sa.BigInteger))

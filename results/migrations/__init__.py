"""Changes of the results database, oldest first, applied by `Store.open` through Alembic.

Packaged with the code, so that an installed copy migrates without a checkout. To write one:
change `results/schema.py`, add `versions/<number>_<what>.py` by hand, and raise `schema.VERSION`;
a test compares the migrated tables with the schema in both databases.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from results.schema import VERSION

if TYPE_CHECKING:
    from sqlalchemy import Connection


def known_versions() -> list[str]:
    """The names of all migrations, oldest first."""
    from alembic.script import ScriptDirectory

    scripts = ScriptDirectory(str(Path(__file__).parent))
    return [script.revision for script in scripts.walk_revisions()][::-1]


def upgrade(connection: Connection, to: str = VERSION) -> None:
    """Applies the missing migrations in the transaction the connection is in.

    The caller holds the lock that keeps other processes from doing the same.
    """
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.attributes["connection"] = connection
    command.upgrade(config, to)

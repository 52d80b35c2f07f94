"""The first schema: tables, and the functions of the hot writes."""

from __future__ import annotations

from pathlib import Path

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    for name in ("0001_tables.sql", "0001_functions.sql"):
        sql = (Path(__file__).parent / name).read_text()
        # By the driver itself: a file of many statements, no parameters. Same transaction.
        raw = op.get_bind().connection.dbapi_connection
        raw.run_async(lambda driver, text=sql: driver.execute(text))  # type: ignore[union-attr]


def downgrade() -> None:
    op.execute(sa.text("DROP SCHEMA mailgrpc CASCADE"))

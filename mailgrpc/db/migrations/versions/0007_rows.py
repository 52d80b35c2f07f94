"""Results come as rows, and no longer as a column of each field."""

from __future__ import annotations

from pathlib import Path

from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    sql = (Path(__file__).parent / "0007_rows.sql").read_text()
    # By the driver itself: a file of many statements, no parameters. Same transaction.
    raw = op.get_bind().connection.dbapi_connection
    raw.run_async(lambda driver: driver.execute(sql))  # type: ignore[union-attr]

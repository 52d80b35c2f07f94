"""The tables as SQLAlchemy sees them, for queries whose shape varies.

The migrations are what makes them; `tests/db/test_schema.py` holds the two together.
"""

from __future__ import annotations

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY, BYTEA, JSONB, TIMESTAMP, UUID

from mailgrpc.db.connecting import SCHEMA

metadata = sa.MetaData(schema=SCHEMA)
_TIME = TIMESTAMP(timezone=True)


def _column(name: str, kind: object, *, key: bool = False, null: bool = False) -> sa.Column[object]:
    return sa.Column(name, kind, primary_key=key, nullable=null)  # type: ignore[arg-type]


messages = sa.Table(
    "messages",
    metadata,
    _column("id", UUID(), key=True),
    _column("project_id", sa.Integer),
    _column("created_at", _TIME),
    _column("request_id", sa.Text),
    _column("correlation_id", sa.Text),
    _column("subject", sa.Text),
    _column("tags", JSONB),
    _column("custom_args", JSONB),
    _column("options", JSONB),
    _column("flags", sa.Integer),
    _column("content", BYTEA, null=True),
)

deliveries = sa.Table(
    "deliveries",
    metadata,
    _column("id", UUID(), key=True),
    _column("project_id", sa.Integer),
    _column("recipient", sa.Text),
    _column("role", sa.SmallInteger),
    _column("channel", sa.Text),
    _column("priority", sa.SmallInteger),
    _column("mode", sa.SmallInteger),
    _column("flags", sa.Integer),
    _column("state", sa.SmallInteger),
    _column("state_since", _TIME),
    _column("version", sa.Integer),
    _column("wait_reason", sa.SmallInteger),
    _column("due_at", _TIME, null=True),
    _column("expire_at", _TIME, null=True),
    _column("forced", sa.Boolean),
    _column("possibly_sent", sa.Boolean),
    _column("suppression_reason", sa.SmallInteger),
    _column("duplicate_of", UUID(), null=True),
    _column("attempt_count", sa.Integer),
    _column("attempt_id", UUID(), null=True),
    _column("call_id", UUID(), null=True),
    _column("attempt_started_at", _TIME, null=True),
    _column("spared", sa.Integer),
)

workers = sa.Table(
    "workers",
    metadata,
    _column("id", sa.BigInteger, key=True),
    _column("name", sa.Text),
    _column("channels", ARRAY(sa.Text)),
    _column("started_at", _TIME),
    _column("beat", sa.BigInteger),
    _column("beat_at", _TIME),
    _column("ended_at", _TIME, null=True),
    _column("reaped_at", _TIME, null=True),
    _column("lease_s", sa.Float),
    _column("held", sa.Text),
    _column("paused", ARRAY(sa.Text)),
    _column("epochs", JSONB),
)

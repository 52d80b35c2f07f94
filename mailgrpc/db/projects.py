"""Projects and their API keys."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass

from mailgrpc.core.ids import from_text, new_id, to_text
from mailgrpc.db.engine import Database

KEY_PREFIX = "mg_"
KEY_ID = "key_"


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: a project, and the name of the key that was shown (`actor` of events)."""

    project_id: int
    actor: str


DEFAULT_CALLER = Caller(1, "")
"""Whoever reaches the port when keys are off: the project `default`, which always exists."""


async def find_caller(db: Database, key: str) -> Caller | None:
    """Whose key this is; None for an unknown or revoked one."""
    rows = await db.fetch(
        "SELECT project_id, name FROM api_keys WHERE key_hash = $1 AND revoked_at IS NULL",
        _hash(key),
    )
    return Caller(rows[0]["project_id"], rows[0]["name"]) if rows else None


async def create_key(db: Database, project: str, name: str) -> str:
    """A new API key of a project, which is made if it does not exist. Told once, stored hashed."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    await db.write(
        """WITH made AS (INSERT INTO projects (name) VALUES ($1) ON CONFLICT (name) DO UPDATE
               SET name = excluded.name RETURNING id)
           INSERT INTO api_keys (id, project_id, name, key_hash)
           SELECT $2, id, $3, $4 FROM made""",
        project,
        new_id(),
        name,
        _hash(key),
    )
    return key


async def list_keys(db: Database) -> list[tuple[str, str, str, str, str]]:
    """(id, project, name, when made, "revoked" or "") of all keys, the oldest first."""
    rows = await db.fetch(
        """SELECT k.id, p.name AS project, k.name, k.created_at, k.revoked_at
           FROM api_keys k JOIN projects p ON p.id = k.project_id ORDER BY k.id"""
    )
    return [
        (
            to_text(KEY_ID, row["id"]),
            row["project"],
            row["name"],
            row["created_at"].isoformat(timespec="seconds"),
            "revoked" if row["revoked_at"] else "",
        )
        for row in rows
    ]


async def revoke_key(db: Database, key_id: str) -> bool:
    """Revoke a key by the id that `list_keys` tells. Whether there was one to revoke."""
    found = from_text(KEY_ID, key_id)
    rows = await db.write(
        """UPDATE api_keys SET revoked_at = clock_timestamp()
           WHERE id = $1 AND revoked_at IS NULL RETURNING id""",
        found,
    )
    return bool(rows)


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()

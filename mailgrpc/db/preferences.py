"""Preferences: the flags that an address refuses, per project."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from mailgrpc.core.admission import ACCEPTS_ALL, refuses
from mailgrpc.core.delivery import SuppressionReason
from mailgrpc.db.engine import Database


@dataclass(frozen=True, slots=True)
class Preference:
    """What an address refuses. `blocked_flags` is 1 for nothing; `updated_at` None: never set."""

    address: str
    blocked_flags: int
    updated_at: datetime | None


async def read_preference(db: Database, project_id: int, address: str) -> Preference:
    """The preference of a normalised address; an unknown one accepts all."""
    rows = await db.fetch(
        "SELECT * FROM preferences WHERE project_id = $1 AND address = $2", project_id, address
    )
    return _preference_of(rows[0]) if rows else Preference(address, ACCEPTS_ALL, None)


async def replace_preference(
    db: Database, project_id: int, address: str, blocked_flags: int
) -> Preference:
    """Set the whole mask (as `core.admission.stored_mask` gives it)."""
    [row] = await db.write(
        """INSERT INTO preferences (project_id, address, blocked_flags, updated_at)
           VALUES ($1, $2, $3, clock_timestamp())
           ON CONFLICT (project_id, address) DO UPDATE
               SET blocked_flags = excluded.blocked_flags, updated_at = excluded.updated_at
           RETURNING *""",
        project_id,
        address,
        blocked_flags,
    )
    return _preference_of(row)


async def change_preference(
    db: Database, project_id: int, address: str, block: int, unblock: int
) -> Preference:
    """Set and clear bits of the mask in one statement, so that no other change is lost.

    A bit that is both blocked and unblocked ends blocked.
    """
    [row] = await db.write(
        # nullif + coalesce: a mask without any bit is stored as 1, and never 1 beside others.
        """INSERT INTO preferences AS p (project_id, address, blocked_flags, updated_at)
           VALUES ($1, $2, coalesce(nullif($3::integer & ~1, 0), 1),
               clock_timestamp())
           ON CONFLICT (project_id, address) DO UPDATE SET
               blocked_flags = coalesce(nullif((p.blocked_flags & ~$4::integer | $3) & ~1, 0), 1),
               updated_at = excluded.updated_at
           RETURNING *""",
        project_id,
        address,
        block,
        unblock,
    )
    return _preference_of(row)


@dataclass(frozen=True, slots=True)
class Refusal:
    """What stands against mail to an address: the flags it refuses, and why it is suppressed."""

    blocked_flags: int
    suppression: SuppressionReason  # UNSPECIFIED: it is not

    def of(self, flags: int) -> SuppressionReason:
        """Why mail with these flags is not sent, as the database decides; UNSPECIFIED: it is."""
        if not self.suppression and refuses(self.blocked_flags, flags):
            return SuppressionReason.PREFERENCE
        return self.suppression


async def read_refusals(
    db: Database, project_id: int, addresses: Sequence[str]
) -> dict[str, Refusal]:
    """What stands against mail to each of these addresses, all of which are in the answer."""
    rows = await db.fetch(
        """SELECT a.address, coalesce(p.blocked_flags, 1) AS blocked_flags,
               coalesce(s.reason, 0) AS suppression
           FROM unnest($2::text[]) AS a(address)
           LEFT JOIN preferences p ON p.project_id = $1 AND p.address = a.address
           LEFT JOIN suppressions s ON s.project_id = $1 AND s.address = a.address""",
        project_id,
        addresses,
    )
    return {
        row["address"]: Refusal(row["blocked_flags"], SuppressionReason(row["suppression"]))
        for row in rows
    }


def _preference_of(row: object) -> Preference:
    return Preference(row["address"], row["blocked_flags"], row["updated_at"])  # type: ignore[index]

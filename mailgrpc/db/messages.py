"""Messages: taking them in, and reading them back."""

from __future__ import annotations

import contextlib
import hashlib
import uuid
from collections.abc import Iterable, Sequence
from datetime import datetime

from mailgrpc.core.event import Attempt, Labels, MessageStatus
from mailgrpc.core.fingerprint import RULE, content_key
from mailgrpc.core.ids import delivery_id
from mailgrpc.core.message import (
    DeliveryOptions,
    MailMessage,
    Recipient,
    RetryWishes,
    Submission,
)
from mailgrpc.core.retry import RetryPolicy
from mailgrpc.core.value import value
from mailgrpc.db.content import (
    pack_content,
    pack_json,
    pack_options,
    unpack_json,
    unpack_message,
    unpack_options,
)
from mailgrpc.db.engine import Database
from mailgrpc.db.rows import RESULT_COLUMNS, Row, delivery_of, result_of


@value
class NewMessage:
    """A checked message on its way in, with what the settings made of it."""

    message_id: uuid.UUID
    project_id: int
    submission: Submission
    fingerprint: bytes
    flags: int  # categories included
    channel: str
    expire_at: datetime


@value
class Start:
    """Who starts what of a flush in the same commit: for each message an attempt, or None.

    Those with one have one recipient, and are of this channel. See mailgrpc/handover.py.
    """

    session_id: int
    epoch: int
    channel: str
    attempts: Sequence[uuid.UUID | None]


# In the order of the function's parameters. The last four are of a Start; servers of the version before
# know nothing of them.
_ENQUEUE = """SELECT * FROM enqueue_messages($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13,
    $14, $15, $16, $17, $18, $19, $20, $21, $22, $23, $24, $25, $26, $27)"""
_ENQUEUE_AND_START = _ENQUEUE.removesuffix(")") + ", $28, $29, $30, $31)"


@value
class Inserted:
    """What of a flush was not plain: who was `known` by the request_id, who is not all queued."""

    known: frozenset[uuid.UUID]
    with_suppressed: frozenset[uuid.UUID]
    unstarted: bool = False  # the session of a Start has ended, or begun a later epoch


@value
class KnownRequest:
    """What a request_id was used for: an Enqueue, or else a Resend with its answer."""

    is_enqueue: bool
    message_id: uuid.UUID
    fingerprint: bytes
    rule: int
    response: object


async def insert_messages(
    db: Database, lane: int, new: Sequence[NewMessage], start: Start | None = None
) -> Inserted:
    """Store a flush, and start what is to be: one round trip, one transaction, all or nothing.

    Running it again after AmbiguousCommit with the same messages adds nothing; `known` then names
    them, and their request ids lead to their own message ids. Raises StoreUnavailable and, for a
    value that the database refuses, asyncpg.DataError.
    """
    submissions = [m.submission for m in new]
    messages = [s.message for s in submissions]
    options = [s.options for s in submissions]
    files = [
        (m.message_id, position, attachment.data)
        for m, message in zip(new, messages, strict=True)
        for position, attachment in enumerate(message.attachments)
    ]
    recipients = [
        (index, delivery_id(m.message_id, number), r.key, r.role, dedupe_key)
        for index, m in enumerate(new, 1)
        for number, (r, dedupe_key) in enumerate(_recipients(m.submission), 1)
    ]
    started = (start.session_id, start.epoch, start.channel, start.attempts) if start else ()
    rows = await db.write(
        _ENQUEUE_AND_START if started else _ENQUEUE,
        lane,
        [m.message_id for m in new],
        [m.project_id for m in new],
        [s.request_id for s in submissions],
        [m.fingerprint for m in new],
        RULE,
        [m.correlation_id for m in messages],
        [m.subject for m in messages],
        [pack_json(m.tags) for m in messages],
        [pack_json(m.custom_args) for m in messages],
        [pack_options(o) for o in options],
        [m.flags for m in new],
        [pack_content(m) for m in messages],
        [m.channel for m in new],
        [o.effective_priority for o in options],
        [o.effective_mode for o in options],
        [o.send_at for o in options],
        [m.expire_at for m in new],
        [o.dedupe_window.total_seconds() if o.dedupe_window else 0.0 for o in options],
        [f[0] for f in files],
        [f[1] for f in files],
        [f[2] for f in files],
        [r[0] for r in recipients],
        [r[1] for r in recipients],
        [r[2] for r in recipients],
        [r[3] for r in recipients],
        [r[4] for r in recipients],
        *started,
    )
    return Inserted(
        known=frozenset(row["message_id"] for row in rows if row["what"] == "known"),
        with_suppressed=frozenset(row["message_id"] for row in rows if row["what"] == "suppressed"),
        unstarted=any(row["what"] == "unstarted" for row in rows),
    )


def _recipients(submission: Submission) -> Iterable[tuple[Recipient, bytes]]:
    """Each recipient with the key of what it is told; empty unless duplicates are to be found."""
    recipients = submission.message.recipients
    if not submission.options.dedupe_window:
        return [(r, b"") for r in recipients]
    content = content_key(submission.message)
    return [(r, hashlib.sha256(content + r.key.encode()).digest()) for r in recipients]


async def read_duplicates(db: Database, new: NewMessage) -> dict[str, uuid.UUID]:
    """Whom somebody told the same within the message's dedupe_window: by key, the message that did.

    As it is now; nothing is remembered.
    """
    window = new.submission.options.dedupe_window
    if window is None:
        return {}
    recipient_of = {key: r.key for r, key in _recipients(new.submission)}
    rows = await db.fetch(
        """SELECT key, message_id FROM recent_content
           WHERE project_id = $1 AND key = ANY ($2::bytea[])
           AND accepted_at >= clock_timestamp() - make_interval(secs => $3)""",
        new.project_id,
        list(recipient_of),
        window.total_seconds(),
    )
    return {recipient_of[row["key"]]: row["message_id"] for row in rows}


async def read_known_requests(
    db: Database, keys: Sequence[tuple[int, str]]
) -> dict[tuple[int, str], KnownRequest]:
    """What these (project_id, request_id) were used for; unknown ones are left out.

    A statement of its own, so that its snapshot is fresh: within the insert's own statement the
    loser of a race sees neither row.
    """
    rows = await db.fetch(
        """SELECT r.* FROM unnest($1::integer[], $2::text[]) AS k(project_id, request_id)
           JOIN request_ids r USING (project_id, request_id)""",
        [key[0] for key in keys],
        [key[1] for key in keys],
    )
    return {
        (row["project_id"], row["request_id"]): KnownRequest(
            row["kind"] == 1,
            row["message_id"],
            row["fingerprint"],
            row["rule"],
            unpack_json(row["response"]) if row["response"] else None,
        )
        for row in rows
    }


# A look-up a message and a delivery: as plain joins over ranges of ids the planner takes them for a
# ninth of the table and reads all of it. The LIMITs are fences and estimates. And between which ids
# all of it lies is said for the planner, who then plans for those ranges of days and no others.
STATUSES = f"""SELECT m.id AS message_id, m.created_at, m.request_id, m.correlation_id, m.subject,
        m.tags, m.custom_args, d.*, {RESULT_COLUMNS}
    FROM unnest($1::uuid[]) AS k(id) JOIN messages m ON m.id = k.id AND m.id = ANY ($1::uuid[])
    CROSS JOIN LATERAL (SELECT * FROM deliveries d WHERE d.id > m.id
        AND d.id <= last_delivery_of(m.id) AND d.id BETWEEN $3 AND $4
        ORDER BY d.id LIMIT 65535) d
    LEFT JOIN LATERAL (SELECT * FROM attempts a WHERE a.delivery_id = d.id
        AND a.delivery_id BETWEEN $3 AND $4
        AND a.number = d.attempt_count LIMIT 1) a ON true
    WHERE m.project_id = $2 ORDER BY d.id"""  # noqa: S608  constants
"""The messages of $1 in project $2, a row for each delivery, by id; $3 and $4 are `bounds` of $1."""


def bounds(message_ids: Sequence[uuid.UUID]) -> tuple[uuid.UUID, uuid.UUID]:
    """Between which ids all deliveries of these messages lie; of none, the lowest id there is."""
    if not message_ids:
        return uuid.UUID(int=0), uuid.UUID(int=0)
    return min(message_ids), delivery_id(max(message_ids), 0xFFFF)


async def read_statuses(
    db: Database, project_id: int, message_ids: Iterable[uuid.UUID]
) -> dict[uuid.UUID, MessageStatus]:
    """The messages of these ids that exist in the project, with all their deliveries.

    One statement, so one moment.
    """
    ids = list(message_ids)
    rows = await db.fetch(STATUSES, ids, project_id, *bounds(ids))
    by_message: dict[uuid.UUID, list[Row]] = {}
    for row in rows:
        by_message.setdefault(row["message_id"], []).append(row)
    return {
        message_id: MessageStatus(
            message_id=message_id,
            request_id=group[0]["request_id"],
            subject=group[0]["subject"],
            created_at=group[0]["created_at"],
            deliveries=tuple(delivery_of(row, result_of(row)) for row in group),
            labels=labels_of(group[0]),
        )
        for message_id, group in by_message.items()
    }


@value
class StoredContent:
    """What was handed over, as it is stored. `message` is None once the content is erased."""

    project: str
    message: MailMessage | None
    options: DeliveryOptions
    created_at: datetime


async def read_contents(
    db: Database,
    message_ids: Iterable[uuid.UUID],
    *,
    with_files: bool,
    most_bytes: int | None = None,
) -> dict[uuid.UUID, StoredContent]:
    """The contents of these messages, of any project. Without files their data is empty.

    With `most_bytes` only as many, in the order asked for, as lie within it; always the first.
    """
    ids = list(message_ids)
    if most_bytes is None:
        rows = await db.fetch(
            """SELECT m.*, p.name AS project FROM messages m JOIN projects p ON p.id = m.project_id
               WHERE m.id = ANY ($1::uuid[])""",
            ids,
        )
    else:
        # What lies apart (TOAST) has a length that is known without reading it, and is read when the
        # row is handed over: not of those that are left out here.
        rows = await db.fetch(
            """SELECT m.*, p.name AS project FROM (
                   SELECT m.*, f.bytes AS file_bytes,
                       sum(coalesce(octet_length(m.content), 0) + f.bytes) OVER (
                           ORDER BY k.n ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS before
                   FROM unnest($1::uuid[]) WITH ORDINALITY AS k(id, n)
                   CROSS JOIN LATERAL (SELECT * FROM messages m
                       WHERE m.id = k.id AND m.id BETWEEN $3 AND $4 LIMIT 1) AS m
                   CROSS JOIN LATERAL (SELECT coalesce(sum(octet_length(a.data)), 0) AS bytes
                       FROM attachments a
                       WHERE a.message_id = k.id AND a.message_id BETWEEN $3 AND $4) AS f) AS m
               JOIN projects p ON p.id = m.project_id WHERE coalesce(m.before, 0) < $2""",
            ids,
            most_bytes,
            *bounds(ids),
        )
    files: dict[uuid.UUID, dict[int, bytes]] = {}
    with_some = [row["id"] for row in rows if most_bytes is None or row["file_bytes"]]
    if with_files and with_some:
        for row in await db.fetch(
            """SELECT * FROM attachments WHERE message_id = ANY ($1::uuid[])
               AND message_id BETWEEN $2 AND $3""",
            with_some,
            *bounds(with_some),
        ):
            files.setdefault(row["message_id"], {})[row["position"]] = row["data"]
    return {
        row["id"]: StoredContent(
            project=row["project"],
            message=unpack_message(row, files.get(row["id"], {})),
            options=unpack_options(row["options"]),
            created_at=row["created_at"],
        )
        for row in rows
    }


async def read_retry_policies(
    db: Database, message_ids: Iterable[uuid.UUID]
) -> dict[uuid.UUID, RetryPolicy]:
    """When deliveries of these messages are tried again; what cannot be read is left out."""
    ids = list(message_ids)
    rows = await db.fetch(
        "SELECT id, options FROM messages WHERE id = ANY ($1::uuid[]) AND id BETWEEN $2 AND $3",
        ids,
        *bounds(ids),
    )
    policies = {}
    for row in rows:
        # One message must not keep the reaper from all others.
        with contextlib.suppress(ValueError, TypeError, LookupError, AttributeError):
            policies[row["id"]] = (unpack_options(row["options"]).retry or RetryWishes()).policy()
    return policies


async def read_attempts(db: Database, message_id: uuid.UUID) -> list[Attempt]:
    """All attempts of a message, also those that run, in the order in which they started."""
    rows = await db.fetch(
        """SELECT a.* FROM attempts a
           WHERE a.delivery_id > $1 AND a.delivery_id <= last_delivery_of($1)
           UNION ALL
           SELECT d.id, d.attempt_count, d.attempt_id, d.call_id, d.channel, '',
               d.attempt_started_at, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL
           FROM deliveries d WHERE d.id > $1 AND d.id <= last_delivery_of($1) AND d.state = 2
           ORDER BY started_at, delivery_id, number""",
        message_id,
    )
    return [
        Attempt(
            delivery_id=row["delivery_id"],
            number=row["number"],
            call_id=row["call_id"],
            channel=row["channel"],
            provider=row["provider"],
            started_at=row["started_at"],
            ended_at=row["ended_at"],
            result=result_of(row),
        )
        for row in rows
    ]


async def read_labels(db: Database, message_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, Labels]:
    """What the events of these messages are found by; messages that were cleared are left out."""
    rows = await db.fetch(
        """SELECT id, created_at, correlation_id, tags, custom_args FROM messages
           WHERE id = ANY ($1::uuid[]) AND id BETWEEN $2 AND $3""",
        message_ids,
        *bounds(message_ids),
    )
    return {row["id"]: labels_of(row) for row in rows}


def labels_of(row: Row) -> Labels:
    """The labels in a row of `messages`."""
    return Labels(
        correlation_id=str(row["correlation_id"]),
        tags=tuple(unpack_json(row["tags"])),
        custom_args=unpack_json(row["custom_args"]),
        created_at=row["created_at"],
    )

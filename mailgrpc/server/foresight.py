"""What `validate_only` tells: the deliveries that would not be queued, and why."""

from __future__ import annotations

from mailgrpc.core.delivery import State, SuppressionReason
from mailgrpc.core.ids import MESSAGE, to_text
from mailgrpc.db.engine import Database
from mailgrpc.db.messages import NewMessage, read_duplicates
from mailgrpc.db.preferences import read_refusals
from mailgrpc.v1 import delivery_pb2


async def foreseen(db: Database, new: NewMessage) -> list[delivery_pb2.Delivery]:
    """The deliveries that the insert would suppress now, without ids: nothing is stored."""
    recipients = new.submission.message.recipients
    refusals = await read_refusals(db, new.project_id, [r.key for r in recipients])
    duplicates = await read_duplicates(db, new)
    found = []
    for recipient in recipients:
        reason = refusals[recipient.key].of(new.flags)
        duplicate_of = None if reason else duplicates.get(recipient.key)
        if duplicate_of is not None:
            reason = SuppressionReason.DUPLICATE
        if reason:
            found.append(
                delivery_pb2.Delivery(
                    recipient=recipient.key,
                    role=int(recipient.role),  # type: ignore[arg-type]
                    state=int(State.SUPPRESSED),  # type: ignore[arg-type]
                    suppression_reason=int(reason),  # type: ignore[arg-type]
                    duplicate_of_message_id=""
                    if duplicate_of is None
                    else to_text(MESSAGE, duplicate_of),
                )
            )
    return found

"""From claimed deliveries to one call of a provider, and to what each of them came to.

A message that breaks the code breaks here, and alone. What fails before the provider was asked is
proof that nothing was sent: REJECTED, so FAILED. What fails within the provider proves nothing:
UNKNOWN, whatever the exception says about itself. Both carry cause INTERNAL and the error's name.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Sequence

from mailgrpc.core.delivery import Cause, Mode, Outcome, Result
from mailgrpc.core.ids import message_of, number_of, rfc_message_id
from mailgrpc.core.retry import DEFAULT_POLICY, RetryPolicy
from mailgrpc.core.value import value
from mailgrpc.db.deliveries import Claimed, Started
from mailgrpc.db.engine import Database
from mailgrpc.db.messages import StoredContent, read_contents
from mailgrpc.errors import StoreUnavailable
from mailgrpc.providers.provider import Addressee, Provider, SendCall

log = logging.getLogger(__name__)

GIVEN_UP_AT_CLAIMS = 6
CONTENT_BYTES = 16 * 1024 * 1024
"""Stored content of a batch, of which there may be two; a message may have 10 MiB, a claim 200."""

_ERASED = Result(Outcome.REJECTED, Cause.CONTENT, text="the content has been erased")
_GIVEN_UP = Result(
    Outcome.REJECTED, Cause.WORKER_LOST, text="worker after worker ended before it could start this"
)


@value
class Group:
    """Claimed deliveries of one message that will share a call; or none, where `refusal` is set."""

    delivery_ids: tuple[uuid.UUID, ...]
    content: StoredContent | None
    refusal: Result | None = None

    @property
    def mode(self) -> Mode:
        """SEND_ONCE or RETRYING, as its message asked; the stricter where that is not known."""
        return self.content.options.effective_mode if self.content else Mode.SEND_ONCE

    @property
    def policy(self) -> RetryPolicy:
        """When to try again."""
        wishes = self.content.options.retry if self.content else None
        return wishes.policy() if wishes else DEFAULT_POLICY


async def group_claims(
    database: Database, claimed: Sequence[Claimed], group_max: int
) -> list[Group]:
    """Claimed deliveries by message, as many in a group as a call may carry, in their order.

    Left out is what was cleared since its claim, and what together would take too much memory.
    Raises StoreUnavailable.
    """
    given_up = [c.delivery_id for c in claimed if c.claims >= GIVEN_UP_AT_CLAIMS]
    groups = [Group((delivery_id,), None, _GIVEN_UP) for delivery_id in given_up]
    by_message: dict[uuid.UUID, list[uuid.UUID]] = {}
    for c in claimed:
        if c.claims < GIVEN_UP_AT_CLAIMS:
            by_message.setdefault(message_of(c.delivery_id), []).append(c.delivery_id)
    contents, refused = await _read(database, list(by_message))
    for message_id, ids in by_message.items():
        if message_id not in contents and message_id not in refused:
            continue
        ids.sort()
        for first in range(0, len(ids), group_max):
            part = tuple(ids[first : first + group_max])
            groups.append(Group(part, contents.get(message_id), refused.get(message_id)))
    return groups


async def _read(
    database: Database, message_ids: Sequence[uuid.UUID]
) -> tuple[dict[uuid.UUID, StoredContent], dict[uuid.UUID, Result]]:
    """The contents, and a refusal for each message whose content cannot be unpacked."""
    try:
        return await read_contents(
            database, message_ids, with_files=True, most_bytes=CONTENT_BYTES
        ), {}
    except StoreUnavailable:
        raise
    except Exception as error:
        if len(message_ids) == 1:
            log.exception("message %s cannot be read", message_ids[0])
            return {}, {message_ids[0]: broken(Outcome.REJECTED, error)}
    contents: dict[uuid.UUID, StoredContent] = {}
    refused: dict[uuid.UUID, Result] = {}
    for message_id in message_ids:
        found, bad = await _read(database, [message_id])
        contents |= found
        refused |= bad
    return contents, refused


def call_of(
    group: Group,
    started: Sequence[Started],
    last_look: Callable[[], bool],
    following: Callable[[], SendCall | None],
) -> SendCall | Result:
    """What the provider is asked for the deliveries that were started; a result where it is not."""
    if group.refusal is not None:
        return group.refusal
    try:
        return _call_of(group.content, started, last_look, following) or _ERASED
    except Exception as error:
        log.exception("call %s cannot be made", started[0].call_id)
        return broken(Outcome.REJECTED, error)


async def call_provider(provider: Provider, call: SendCall) -> list[Result]:
    """One call; a Result for each of its addressees, whatever breaks."""
    try:
        results = await provider.send(call)
        if len(results) != len(call.addressees):
            raise RuntimeError(f"{len(results)} results for {len(call.addressees)} deliveries")
        if strange := [r for r in results if not isinstance(r, Result)]:
            raise TypeError(f"a result is a {type(strange[0]).__name__}")
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        # Nobody cancelled us: something within the provider was, and let it out.
        return [broken(Outcome.UNKNOWN, error)] * len(call.addressees)
    except Exception as error:
        log.exception("call %s failed", call.call_id)
        return [broken(Outcome.UNKNOWN, error)] * len(call.addressees)
    return results


def _call_of(
    content: StoredContent | None,
    started: Sequence[Started],
    last_look: Callable[[], bool],
    following: Callable[[], SendCall | None],
) -> SendCall | None:
    """None where the content has been erased."""
    message = content.message if content else None
    if content is None or message is None or message.sender is None:
        return None
    message_id = message_of(started[0].delivery.delivery_id)
    return SendCall(
        call_id=started[0].call_id,
        message_id=message_id,
        project=content.project,
        message=message,
        rfc_message_id=rfc_message_id(message_id, message.sender.address),
        created_at=content.created_at,
        addressees=[
            Addressee(i, message.recipients[number_of(i) - 1])
            for i in [s.delivery.delivery_id for s in started]
        ],
        last_look=last_look,
        following=following,
    )


def broken(outcome: Outcome, error: BaseException) -> Result:
    """What a fault of ours comes to."""
    # Callers read this: what the error says in full may be of no business of theirs.
    text = f"{type(error).__name__} within the gateway; its log has the rest"
    return Result(outcome, Cause.INTERNAL, text=text)

"""The provider that sends nothing: it keeps the mail that would have left, for tests and benches.

    capture:                       accepts all, keeps the last 10,000 calls
    capture:?keep=0&latency=0.05   keeps none, answers after 50 ms

The mail is built as for SMTP, so that a test sees the bytes and a bench pays for them. Magic
recipients (`core/magic.py`) behave as their name says; every other address is accepted.

    temperror+N@example.test    DEFERRED, RATE_LIMITED, N times for each delivery; then ACCEPTED
    permerror@example.test      REJECTED, BAD_ADDRESS
    timeout@example.test        UNKNOWN, TIMEOUT: the last byte was sent, no answer came
    drop@example.test           UNKNOWN, CONNECTION: as above, the connection broke

What may have been sent (UNKNOWN) stands in the outbox like what was accepted.
"""

from __future__ import annotations

import asyncio
import uuid
from collections import deque
from collections.abc import Callable
from datetime import UTC, datetime

from mailgrpc.core.delivery import Cause, Outcome, Result
from mailgrpc.core.magic import Magic, MagicKind, magic_of
from mailgrpc.core.message import MailMessage, Recipient
from mailgrpc.core.mime import render
from mailgrpc.core.value import value
from mailgrpc.errors import Violation
from mailgrpc.providers.channel_url import ChannelUrl, seconds
from mailgrpc.providers.provider import Addressee, Grouping, SendCall, everyone, worker_lost

DEFAULT_KEEP = 10_000
_COUNTED_MAX = 100_000
"""Deliveries whose tries are remembered for temperror; the oldest are forgotten first."""


@value
class Captured:
    """One call as it would have left."""

    call: SendCall
    raw: bytes  # the mail, RFC 5322
    captured_at: datetime
    recipients: tuple[Recipient, ...]  # those that were accepted, or may have been
    results: tuple[Result, ...]  # one for each addressee of the call


class CaptureProvider:
    """Keeps in `outbox` what would have been sent, the oldest first."""

    name = "capture"
    grouping = Grouping.ENVELOPE
    group_max = 100

    def __init__(
        self,
        *,
        latency_s: float = 0.0,
        keep: int = DEFAULT_KEEP,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.outbox: deque[Captured] = deque(maxlen=keep)
        self._latency_s = latency_s
        self._now = now
        self._tries: dict[uuid.UUID, int] = {}

    @classmethod
    def from_url(cls, url: ChannelUrl) -> CaptureProvider:
        """`capture:` with `latency` (seconds) and `keep` (calls)."""
        if url.host or url.user or url.password:
            raise url.fault("capture: has no host and no user")
        latency_s = url.parameter("latency", seconds, 0.0)
        keep = url.parameter("keep", _count, DEFAULT_KEEP)
        url.finish()
        return cls(latency_s=latency_s, keep=keep)

    def check(self, message: MailMessage) -> list[Violation]:  # noqa: ARG002  as Provider
        """Whatever passes the door can be captured."""
        return []

    async def send(self, call: SendCall) -> list[Result]:
        """Build the mail, look, keep it. See the module for who is not accepted."""
        try:
            raw = render(call.message, rfc_message_id=call.rfc_message_id, date=call.created_at)
        except ValueError as error:
            return everyone(call, Result(Outcome.REJECTED, Cause.CONTENT, text=str(error)))
        if self._latency_s:
            await asyncio.sleep(self._latency_s)
        if not call.last_look():
            return everyone(call, worker_lost())
        results = [self._result(addressee, call) for addressee in call.addressees]
        reached = tuple(
            addressee.recipient
            for addressee, result in zip(call.addressees, results, strict=True)
            if result.outcome in (Outcome.ACCEPTED, Outcome.UNKNOWN)
        )
        if reached:
            self.outbox.append(Captured(call, raw, self._now(), reached, tuple(results)))
        return results

    def _result(self, addressee: Addressee, call: SendCall) -> Result:
        magic = magic_of(addressee.recipient.address)
        if magic is None or self._has_recovered(addressee, magic):
            return Result(
                Outcome.ACCEPTED, status_code=250, provider_message_id=f"capture-{call.call_id}"
            )
        return _MAGIC_RESULTS[magic.kind]

    def _has_recovered(self, addressee: Addressee, magic: Magic) -> bool:
        if magic.kind is not MagicKind.TEMPERROR:
            return False
        tries = self._tries.pop(addressee.delivery_id, 0) + 1
        self._tries[addressee.delivery_id] = tries
        if len(self._tries) > _COUNTED_MAX:
            del self._tries[next(iter(self._tries))]
        return magic.times is not None and tries > magic.times

    async def probe(self) -> str:
        """There is nothing to reach."""
        return "capture: mail is kept in memory and not sent"

    async def close(self) -> None:
        """There is nothing to end; the outbox stays readable."""


_MAGIC_RESULTS = {
    MagicKind.TEMPERROR: Result(
        Outcome.DEFERRED, Cause.RATE_LIMITED, 451, "4.7.1", "4.7.1 come back later"
    ),
    MagicKind.PERMERROR: Result(
        Outcome.REJECTED, Cause.BAD_ADDRESS, 550, "5.1.1", "5.1.1 no such mailbox"
    ),
    MagicKind.TIMEOUT: Result(
        Outcome.UNKNOWN, Cause.TIMEOUT, text="no answer after the mail was sent"
    ),
    MagicKind.DROP: Result(
        Outcome.UNKNOWN, Cause.CONNECTION, text="the connection broke after the mail was sent"
    ),
}


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise ValueError("expected a whole number of at least 0")
    return value

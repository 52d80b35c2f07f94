"""Reading the feed over any number of connections.

What is promised: every event once and in order, as the contract says, to a reader that keeps
reading; and to one that stops and comes back later with `token`, the same.

The token of a response counts from the moment the reader asks for what follows it. Until then the
reader may still fail over what it was given, and then has to get it again. So nothing here ever
compares events: a reconnect goes on from the last token, and the server does the rest.

What can go wrong. The connection breaks, the server goes away for a restart, a proxy cuts a stream
that is too old: resumed, after a wait. The connection is dead but nobody says so: heartbeats are
missed, the stream is given up and resumed. A snapshot breaks off: it has no token yet, so it begins
anew, and says so (`Update.snapshot_begins`). The token is too old: ResumeTokenExpiredError, which
only the reader can mend.
"""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import grpc

from mailgrpc.client.compose import duration
from mailgrpc.client.errors import MailError, UnavailableError
from mailgrpc.client.policy import CallPolicy
from mailgrpc.client.transport import Silence, Stream, Transport
from mailgrpc.v1.delivery_pb2 import MessageFilter, MessageStatus
from mailgrpc.v1.event_pb2 import Event, EventKind
from mailgrpc.v1.mail_service_pb2 import Snapshot, WatchStatusRequest, WatchStatusResponse

OnRetry = Callable[[MailError, float], None]
"""Told before each wait: what went wrong, and for how many seconds the wait will be."""

_MISSED_HEARTBEATS = 2.5


@dataclass(frozen=True, slots=True)
class Update:
    """One response of the stream. Without events and snapshot it is a heartbeat."""

    response: WatchStatusResponse
    snapshot_begins: bool
    """Forget what an earlier snapshot of this watch gave: this is the first part of another."""

    @property
    def token(self) -> str:
        """The place after it: the one to store, once this update is dealt with.

        Empty until the snapshot that was asked for is complete.
        """
        return self.response.resume_token

    @property
    def events(self) -> Sequence[Event]:
        """What happened, in order."""
        return self.response.events

    @property
    def snapshot(self) -> Sequence[MessageStatus]:
        """A part of the snapshot."""
        return self.response.snapshot

    @property
    def caught_up(self) -> bool:
        """The snapshot, or what happened since the token, ends with this update."""
        return self.response.caught_up


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchWish:
    """What to watch; see `MailCalls.watcher`."""

    filter: MessageFilter | None = None
    token: str = ""
    snapshot: Snapshot.ValueType = Snapshot.SNAPSHOT_UNSPECIFIED
    kinds: Sequence[EventKind.ValueType] = ()
    heartbeat_s: float = 15.0
    stop_after_s: float | None = None
    give_up_after_s: float | None = None


class Watcher:
    """The logic of a watch, whoever drives it.

    `token` is the place up to which all was handed over and dealt with.
    """

    def __init__(
        self,
        transport: Transport,
        policy: CallPolicy,
        rng: Random,
        wish: WatchWish,
        on_retry: OnRetry | None = None,
    ) -> None:
        self.token = wish.token
        self._transport = transport
        self._policy = policy
        self._rng = rng
        self._wish = wish
        self._on_retry = on_retry
        self._handed_over = wish.token  # the token after what the reader deals with now
        self._snapshot = wish.snapshot  # still to be had
        self._snapshot_begins = False
        self._pending: deque[Event] = deque()
        self._stream: Stream | None = None
        self._closed = False
        self._heard_ever = False
        self._failures = 0  # in a row
        self._failing_since = 0.0
        self._stops_at = math.inf
        if wish.stop_after_s is not None:
            self._stops_at = transport.now() + wish.stop_after_s

    async def next_event(self) -> Event | None:
        """The next event; None once the watch was closed or its time is over. Raises MailError."""
        while not self._pending:
            update = await self.next_update()
            if update is None:
                return None
            self._pending.extend(update.events)
        return self._pending.popleft()

    async def next_update(self) -> Update | None:
        """The next response; None once the watch was closed or its time is over.

        Raises MailError: ResumeTokenExpiredError, or another that waiting does not mend.
        """
        self.token = self._handed_over
        while not self._closed and (left_s := self._stops_at - self._transport.now()) > 0:
            began_at = self._transport.now()
            try:
                response = await self._read(left_s)
            except MailError as error:
                if self._failures == 0:
                    self._failing_since = began_at
                await self._wait_or_raise(error)
                continue
            if response is not None:
                return self._hand_over(response)
        self.close()
        return None

    def close(self) -> None:
        """End the watch, from any thread. Who waits for the next event gets None."""
        self._closed = True
        self._hang_up()

    async def _read(self, left_s: float) -> WatchStatusResponse | None:
        """One response; None when there is none because the time is over or the watch closed."""
        limit_s = self._wish.heartbeat_s * _MISSED_HEARTBEATS
        if (stream := self._stream) is None:
            limit_s = self._policy.try_timeout_s  # the first response comes at once
            self._snapshot_begins = bool(self._snapshot)
            stream = self._stream = self._transport.stream("WatchStatus", self._request())
            if self._closed:  # by another thread, which did not see this stream yet
                return None
        try:
            response = await stream.read(min(limit_s, left_s))
        except Silence:
            self._hang_up()
            if left_s <= limit_s:
                return None
            raise UnavailableError(
                grpc.StatusCode.UNAVAILABLE, f"the server has been silent for {limit_s:g} s"
            ) from None
        if response is None and not self._closed:
            raise UnavailableError(grpc.StatusCode.UNAVAILABLE, "the stream ended")
        assert response is None or isinstance(response, WatchStatusResponse)
        return response

    def _hand_over(self, response: WatchStatusResponse) -> Update:
        self._failures, self._heard_ever = 0, True
        update = Update(response, self._snapshot_begins)
        self._snapshot_begins = False
        if response.resume_token:
            self._handed_over = response.resume_token
            self._snapshot = Snapshot.SNAPSHOT_UNSPECIFIED
        return update

    async def _wait_or_raise(self, error: MailError) -> None:
        self._hang_up()
        if self._closed:
            return
        self._failures += 1
        now = self._transport.now()
        wait_s = self._policy.wait_before_resume(error, self._failures, self._rng)
        if wait_s is None or now + wait_s - self._failing_since > self._patience_s():
            self._closed = True
            raise error
        if self._on_retry is not None:
            self._on_retry(error, wait_s)
        await self._transport.sleep(min(wait_s, max(0.0, self._stops_at - now)))

    def _patience_s(self) -> float:
        if self._wish.give_up_after_s is not None:
            return self._wish.give_up_after_s
        return math.inf if self._heard_ever else self._policy.timeout_s

    def _request(self) -> WatchStatusRequest:
        return WatchStatusRequest(
            filter=self._wish.filter,
            resume_token=self.token,
            snapshot=self._snapshot,
            heartbeat=duration(self._wish.heartbeat_s),
            kinds=self._wish.kinds,
        )

    def _hang_up(self) -> None:
        stream, self._stream = self._stream, None
        if stream is not None:
            with contextlib.suppress(RuntimeError):  # its event loop is closed, and so is it
                stream.cancel()

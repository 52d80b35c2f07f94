"""Watching one message until it has ended."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING

from mailgrpc.client.errors import MessageNotFoundError
from mailgrpc.client.watching import Watcher
from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1.delivery_pb2 import Delivery, DeliveryState, MessageFilter
from mailgrpc.v1.event_pb2 import Event, EventKind

if TYPE_CHECKING:
    from mailgrpc.client.calls import MailCalls

UNENDED = frozenset(
    {
        DeliveryState.DELIVERY_STATE_QUEUED,
        DeliveryState.DELIVERY_STATE_SENDING,
        DeliveryState.DELIVERY_STATE_DEFERRED,
    }
)
"""The states that move by themselves."""


class Following:
    """A watch of one message that ends when its deliveries have, or when it was removed.

    Its status is read first, and the stream then begins at `token`, which may lie anywhere: before
    the message, between its events, behind the last one. What the status knows is told by the
    stream as far as it happened after the token; once the stream has caught up, nothing of it is
    still to come.
    """

    def __init__(
        self, calls: MailCalls, message_id: str, token: str, timeout_s: float | None
    ) -> None:
        self._calls = calls
        self._message_id = message_id
        self._first_token = token
        self._timeout_s = timeout_s
        self._watcher: Watcher | None = None
        self._latest: dict[str, Delivery] = {}
        self._untold: dict[str, Delivery] = {}  # from the status, until the stream has caught up
        self._pending: deque[Event] = deque()
        self._removed = False
        self._closed = False

    @property
    def token(self) -> str:
        """The place up to which all was handed over."""
        return self._first_token if self._watcher is None else self._watcher.token

    async def next_event(self) -> Event | None:
        """The next event; None at the end. Raises MailError."""
        watcher = self._watcher or await self._begin()
        while not self._pending:
            update = None if self._has_ended() else await watcher.next_update()
            if update is None:
                watcher.close()
                return None
            self._pending.extend(update.events)
            if update.caught_up:
                self._take_in(self._untold.values())
                self._untold.clear()
        event = self._pending.popleft()
        if event.kind == EventKind.EVENT_KIND_STATE_CHANGED:
            self._take_in([event.state_changed.delivery])
        elif await self._is_removed(event):
            self._removed = True
        return event

    def close(self) -> None:
        """End it, from any thread."""
        self._closed = True
        if self._watcher is not None:
            self._watcher.close()

    async def _begin(self) -> Watcher:
        """Read how it stands, and watch from there on, or from the given token on."""
        request = pb.GetStatusRequest(message_id=self._message_id)
        answer = await self._calls.get_status(request, timeout_s=self._timeout_s)
        if self._first_token:
            self._untold = {d.delivery_id: d for d in answer.status.deliveries}
        else:
            self._take_in(answer.status.deliveries)
        self._watcher = self._calls.watcher(
            filter=MessageFilter(message_ids=[self._message_id]),
            token=self._first_token or answer.resume_token,
            stop_after_s=self._timeout_s,
        )
        if self._closed:
            self._watcher.close()
        return self._watcher

    def _take_in(self, deliveries: Iterable[Delivery]) -> None:
        for delivery in deliveries:
            known = self._latest.get(delivery.delivery_id)
            if known is None or known.version <= delivery.version:
                self._latest[delivery.delivery_id] = delivery

    def _has_ended(self) -> bool:
        if self._removed:
            return True
        for delivery_id, untold in self._untold.items():
            told = self._latest.get(delivery_id)
            if told is None or told.version < untold.version:
                return False
        return not any(delivery.state in UNENDED for delivery in self._latest.values())

    async def _is_removed(self, event: Event) -> bool:
        """Clear is told to everybody and does not name what it removed: so ask."""
        if event.kind != EventKind.EVENT_KIND_MESSAGES_CLEARED:
            return event.kind == EventKind.EVENT_KIND_MESSAGE_REMOVED
        try:
            await self._calls.get_status(pb.GetStatusRequest(message_id=self._message_id))
        except MessageNotFoundError:
            return True
        return False

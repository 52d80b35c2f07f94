"""Watching one message until it has ended."""

from __future__ import annotations

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
    """A watch of one message that ends when its deliveries have.

    It has ended when every delivery that the message is known to have was told in a version at
    least as late as known, and none of these states moves by itself; or when it was removed.
    """

    def __init__(
        self, calls: MailCalls, message_id: str, token: str, timeout_s: float | None
    ) -> None:
        self._calls = calls
        self._message_id = message_id
        self._first_token = token
        self._timeout_s = timeout_s
        self._watcher: Watcher | None = None
        self._wanted: dict[str, int] = {}  # delivery id: the version that it had at the beginning
        self._told: dict[str, Delivery] = {}
        self._closed = False

    @property
    def token(self) -> str:
        """The place up to which all was handed over."""
        return self._first_token if self._watcher is None else self._watcher.token

    async def next_event(self) -> Event | None:
        """The next event; None at the end. Raises MailError."""
        watcher = self._watcher or await self._begin()
        event = None if self._has_ended() else await watcher.next_event()
        if event is None:
            watcher.close()
            return None
        if event.kind == EventKind.EVENT_KIND_STATE_CHANGED:
            delivery = event.state_changed.delivery
            self._told[delivery.delivery_id] = delivery
        elif await self._is_removed(event):
            self._wanted.clear()
        return event

    async def _begin(self) -> Watcher:
        """Read how it stands, and watch from there on, or from the given token on."""
        request = pb.GetStatusRequest(message_id=self._message_id)
        answer = await self._calls.get_status(request, timeout_s=self._timeout_s)
        for delivery in answer.status.deliveries:
            self._wanted[delivery.delivery_id] = delivery.version
            if not self._first_token:
                self._told[delivery.delivery_id] = delivery
        self._watcher = self._calls.watcher(
            filter=MessageFilter(message_ids=[self._message_id]),
            token=self._first_token or answer.resume_token,
            stop_after_s=self._timeout_s,
        )
        if self._closed:
            self._watcher.close()
        return self._watcher

    def close(self) -> None:
        """End it, from any thread."""
        self._closed = True
        if self._watcher is not None:
            self._watcher.close()

    def _has_ended(self) -> bool:
        return all(
            (delivery := self._told.get(delivery_id)) is not None
            and delivery.version >= version
            and delivery.state not in UNENDED
            for delivery_id, version in self._wanted.items()
        )

    async def _is_removed(self, event: Event) -> bool:
        """Clear is told to everybody and does not name what it removed: so ask."""
        if event.kind != EventKind.EVENT_KIND_MESSAGES_CLEARED:
            return event.kind == EventKind.EVENT_KIND_MESSAGE_REMOVED
        try:
            await self._calls.get_status(pb.GetStatusRequest(message_id=self._message_id))
        except MessageNotFoundError:
            return True
        return False

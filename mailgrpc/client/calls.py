"""What the client does, written once over a Transport; `clients` gives it its two faces.

Every method of the contract is here with its request message, and answers what the contract says:
its documentation is that of MailService. On top of a stub they add the request_id, deadlines and
retries. `send`, `follow` and `wait_until_ended` are for who does not want to build messages.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar, Unpack

from google.protobuf.message import Message

from mailgrpc.client.compose import Mail, compose, new_request_id
from mailgrpc.client.errors import MailError, NotEndedError
from mailgrpc.client.following import Following
from mailgrpc.client.policy import CallPolicy
from mailgrpc.client.transport import Transport
from mailgrpc.client.watching import OnRetry, Watcher, WatchWish
from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1.delivery_pb2 import Delivery, DeliveryState, MessageFilter, MessageStatus
from mailgrpc.v1.event_pb2 import EventKind

R = TypeVar("R", bound=Message)


@dataclass(frozen=True, slots=True)
class Receipt:
    """What `send` came to. `status` is set when it waited for the end of the message."""

    request_id: str
    response: pb.EnqueueResponse
    status: MessageStatus | None = None

    @property
    def message_id(self) -> str:
        """The message's id; empty with `validate_only`."""
        return self.response.message_id

    @property
    def state(self) -> DeliveryState.ValueType:
        """The state of the message as a whole, as it was last seen."""
        return self.response.state if self.status is None else self.status.state

    @property
    def not_queued(self) -> Sequence[Delivery]:
        """The recipients who did not get it because they refuse such mail or are suppressed."""
        return self.response.not_queued


class MailCalls:
    """The calls of one client."""

    def __init__(
        self,
        transport: Transport,
        policy: CallPolicy,
        on_retry: OnRetry | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._transport = transport
        self._policy = policy
        self._on_retry = on_retry
        self._rng = rng or random.Random()

    async def send(
        self, *, wait_s: float | None = None, timeout_s: float | None = None, **mail: Unpack[Mail]
    ) -> Receipt:
        """Hand over one mail; see `Mail` for the arguments. It is stored when this returns.

        `wait_s`: wait that long for all its deliveries to end. Raises MailError (NotEndedError
        when they have not ended in time), and what `compose` raises.
        """
        request = compose(**mail)
        response = await self.enqueue(request, timeout_s=timeout_s)
        if wait_s is None or request.validate_only:
            return Receipt(request.request_id, response)
        status = await self.wait_until_ended(response.message_id, timeout_s=wait_s)
        return Receipt(request.request_id, response, status)

    async def wait_until_ended(self, message_id: str, *, timeout_s: float = 60.0) -> MessageStatus:
        """How a message stands once no delivery of it will move by itself any more.

        Raises NotEndedError after `timeout_s`, MessageNotFoundError when there is no such message
        or it is removed meanwhile.
        """
        began_at = self._transport.now()
        following = self.following(message_id, timeout_s=timeout_s)
        while await following.next_event() is not None:
            pass
        left_s = max(1.0, timeout_s - (self._transport.now() - began_at))
        request = pb.GetStatusRequest(message_id=message_id)
        status = (await self.get_status(request, timeout_s=left_s)).status
        if not status.ended:
            raise NotEndedError(status, timeout_s)
        return status

    def following(
        self, message_id: str, *, token: str = "", timeout_s: float | None = None
    ) -> Following:
        """What happens to one message, until its deliveries have ended or the time is over.

        `token`: from that place on, such as that of the EnqueueResponse; else from now.
        """
        return Following(self, message_id, token, timeout_s)

    def watcher(
        self,
        *,
        filter: MessageFilter | None = None,  # noqa: A002  the contract's name
        token: str = "",
        snapshot: pb.Snapshot.ValueType = pb.Snapshot.SNAPSHOT_UNSPECIFIED,
        kinds: Sequence[EventKind.ValueType] = (),
        heartbeat_s: float = 15.0,
        stop_after_s: float | None = None,
        give_up_after_s: float | None = None,
    ) -> Watcher:
        """Watch what happens, over any number of connections; see MailService.WatchStatus.

        `stop_after_s` ends the iteration. `give_up_after_s` is how long to go on without an answer
        before the last error is raised; None: at the beginning as long as any call, and once there
        was an answer, for ever. Raises MailError; ResumeTokenExpiredError when events were missed.
        """
        wish = WatchWish(
            filter=filter,
            token=token,
            snapshot=snapshot,
            kinds=kinds,
            heartbeat_s=heartbeat_s,
            stop_after_s=stop_after_s,
            give_up_after_s=give_up_after_s,
        )
        return Watcher(self._transport, self._policy, self._rng, wish, self._on_retry)

    async def enqueue(
        self, request: pb.EnqueueRequest, *, timeout_s: float | None = None
    ) -> pb.EnqueueResponse:
        """See MailService.Enqueue. An empty request_id is filled (in a copy)."""
        return await self._call("Enqueue", _identified(request), pb.EnqueueResponse, timeout_s)

    async def enqueue_batch(
        self, requests: Iterable[pb.EnqueueRequest], *, timeout_s: float | None = None
    ) -> list[pb.EnqueueResult]:
        """See MailService.EnqueueBatch. Empty request_ids are filled (in copies).

        One result a request, in their order; `error_from_item` makes an exception of an error.
        """
        batch = pb.EnqueueBatchRequest(requests=[_identified(request) for request in requests])
        answer = await self._call("EnqueueBatch", batch, pb.EnqueueBatchResponse, timeout_s)
        return list(answer.results)

    async def get_status(
        self, request: pb.GetStatusRequest, *, timeout_s: float | None = None
    ) -> pb.GetStatusResponse:
        """See MailService.GetStatus."""
        return await self._call("GetStatus", request, pb.GetStatusResponse, timeout_s)

    async def get_message(
        self, request: pb.GetMessageRequest, *, timeout_s: float | None = None
    ) -> pb.GetMessageResponse:
        """See MailService.GetMessage."""
        return await self._call("GetMessage", request, pb.GetMessageResponse, timeout_s)

    async def list_messages(
        self, request: pb.ListMessagesRequest, *, timeout_s: float | None = None
    ) -> pb.ListMessagesResponse:
        """See MailService.ListMessages."""
        return await self._call("ListMessages", request, pb.ListMessagesResponse, timeout_s)

    async def resend(
        self, request: pb.ResendRequest, *, timeout_s: float | None = None
    ) -> pb.ResendResponse:
        """See MailService.Resend. An empty request_id is filled (in a copy)."""
        return await self._call("Resend", _identified(request), pb.ResendResponse, timeout_s)

    async def cancel_message(
        self, request: pb.CancelMessageRequest, *, timeout_s: float | None = None
    ) -> pb.CancelMessageResponse:
        """See MailService.CancelMessage."""
        return await self._call("CancelMessage", request, pb.CancelMessageResponse, timeout_s)

    async def delete_message(
        self, request: pb.DeleteMessageRequest, *, timeout_s: float | None = None
    ) -> pb.DeleteMessageResponse:
        """See MailService.DeleteMessage.

        MessageNotFoundError may come from a retry after an answer was lost: it is removed then.
        """
        return await self._call("DeleteMessage", request, pb.DeleteMessageResponse, timeout_s)

    async def clear(
        self, request: pb.ClearRequest, *, timeout_s: float | None = None
    ) -> pb.ClearResponse:
        """See MailService.Clear: one call of it; call again while the answer says `more`."""
        return await self._call("Clear", request, pb.ClearResponse, timeout_s)

    async def update_prefs(
        self, request: pb.UpdatePrefsRequest, *, timeout_s: float | None = None
    ) -> pb.UpdatePrefsResponse:
        """See MailService.UpdatePrefs."""
        return await self._call("UpdatePrefs", request, pb.UpdatePrefsResponse, timeout_s)

    async def get_prefs(
        self, request: pb.GetPrefsRequest, *, timeout_s: float | None = None
    ) -> pb.GetPrefsResponse:
        """See MailService.GetPrefs."""
        return await self._call("GetPrefs", request, pb.GetPrefsResponse, timeout_s)

    async def move_prefs(
        self, request: pb.MovePrefsRequest, *, timeout_s: float | None = None
    ) -> pb.MovePrefsResponse:
        """See MailService.MovePrefs."""
        return await self._call("MovePrefs", request, pb.MovePrefsResponse, timeout_s)

    async def list_events(
        self, request: pb.ListEventsRequest, *, timeout_s: float | None = None
    ) -> pb.ListEventsResponse:
        """See MailService.ListEvents. Its `wait` comes on top of the deadlines."""
        wait_s = request.wait.ToTimedelta().total_seconds()
        return await self._call("ListEvents", request, pb.ListEventsResponse, timeout_s, wait_s)

    async def close(self) -> None:
        """End the connection."""
        await self._transport.close()

    async def _call(
        self,
        method: str,
        request: Message,
        answer: type[R],
        timeout_s: float | None,
        wait_s: float = 0.0,
    ) -> R:
        """Call until it is answered, the time is over, or another try cannot help."""
        policy, now = self._policy, self._transport.now
        ends_at = now() + wait_s + (policy.timeout_s if timeout_s is None else timeout_s)
        tries = 0
        while True:
            tries += 1
            try_s = min(policy.try_timeout_s + wait_s, max(0.001, ends_at - now()))
            try:
                response = await self._transport.call(method, request, try_s)
            except MailError as error:
                pause_s = policy.wait_before_retry(error, tries, ends_at - now(), self._rng)
                if pause_s is None:
                    raise
                if self._on_retry is not None:
                    self._on_retry(error, pause_s)
            else:
                assert isinstance(response, answer)
                return response
            await self._transport.sleep(pause_s)


def _identified(request: R) -> R:
    """The request itself if it has a request_id, else a copy with one."""
    if request.request_id:  # type: ignore[attr-defined]
        return request
    copy = type(request)()
    copy.CopyFrom(request)
    copy.request_id = new_request_id()  # type: ignore[attr-defined]
    return copy

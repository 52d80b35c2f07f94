"""MailService: what each call does, top to bottom. Enqueue itself is in enqueue.py."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from mailgrpc.config import Settings
from mailgrpc.core.event import Filter, MessageStatus
from mailgrpc.core.ids import rfc_message_id
from mailgrpc.core.place import encode_token
from mailgrpc.core.shape import MAX_REQUEST_ID, check_text
from mailgrpc.db.engine import Database
from mailgrpc.db.messages import (
    read_attempts,
    read_contents,
    read_known_requests,
    read_statuses,
)
from mailgrpc.errors import (
    InvalidRequest,
    NotFound,
    NotImplementedYet,
    Reason,
    Violation,
)
from mailgrpc.providers.provider import Provider
from mailgrpc.server import convert
from mailgrpc.server.clear import Clear
from mailgrpc.server.enqueue import Enqueue
from mailgrpc.server.feed import Feed
from mailgrpc.server.filters import checked_filter
from mailgrpc.server.intake import Intake
from mailgrpc.server.interceptors import (
    LONGEST_WAIT_S,
    current_caller,
)
from mailgrpc.server.preferences import Preferences
from mailgrpc.server.resend import Resend
from mailgrpc.server.watch import DEFAULT_HEARTBEAT_S, Wanted, Watch, wanted_kinds
from mailgrpc.v1 import delivery_pb2, mail_service_pb2_grpc
from mailgrpc.v1 import mail_service_pb2 as pb


@dataclass(frozen=True, slots=True)
class Parts:
    """What the service is made of; `server/app.py` puts it together."""

    settings: Settings
    database: Database
    channels: Mapping[str, Provider]
    feed: Feed
    intake: Intake
    watch: Watch
    preferences: Preferences
    resend: Resend
    clear: Clear


class MailService(mail_service_pb2_grpc.MailServiceServicer):
    """The contract's methods; errors become statuses in `interceptors.py`."""

    def __init__(self, parts: Parts) -> None:
        self._database = parts.database
        self._feed = parts.feed
        self._watch = parts.watch
        self._preferences = parts.preferences
        self._resend = parts.resend
        self._clear = parts.clear
        self._enqueue = Enqueue(
            parts.settings, parts.database, parts.channels, parts.feed, parts.intake
        )

    async def Enqueue(self, request: pb.EnqueueRequest, context: Any) -> pb.EnqueueResponse:
        """Take one message in."""
        return await self._enqueue.one(request)

    async def EnqueueBatch(
        self, request: pb.EnqueueBatchRequest, context: Any
    ) -> pb.EnqueueBatchResponse:
        """Take many in; each is answered for itself."""
        return await self._enqueue.many(request)

    async def GetStatus(self, request: pb.GetStatusRequest, context: Any) -> pb.GetStatusResponse:
        """What became of a message."""
        token, status = await self._read(request.message_id, request.request_id)
        return pb.GetStatusResponse(status=convert.status(status), resume_token=token)

    async def GetMessage(
        self, request: pb.GetMessageRequest, context: Any
    ) -> pb.GetMessageResponse:
        """A message as it was handed over, with all its attempts."""
        if request.view not in _VIEWS:
            raise InvalidRequest(Violation("view", Reason.OUT_OF_RANGE, "not a MessageView"))
        token, status = await self._read(request.message_id, request.request_id)
        full = request.view == pb.MESSAGE_VIEW_FULL
        contents = await read_contents(self._database, [status.message_id], with_files=full)
        if (content := contents.get(status.message_id)) is None:
            raise NotFound("no such message")
        attempts = await read_attempts(self._database, status.message_id)
        sender = content.message.sender if content.message else None
        return pb.GetMessageResponse(
            message=None
            if content.message is None
            else convert.message(content.message, with_data=full),
            options=convert.options(content.options),
            status=convert.status(status),
            attempts=[convert.attempt(a) for a in attempts],
            rfc_message_id=""
            if sender is None
            else rfc_message_id(status.message_id, sender.address),
            resume_token=token,
        )

    async def _read(self, message_id: str, request_id: str) -> tuple[str, MessageStatus]:
        """A message of the caller, and a token from which nothing is missed since it was read."""
        project_id = current_caller().project_id
        wanted = await self._find(project_id, message_id, request_id)
        token = encode_token(project_id, await self._feed.now())
        statuses = await read_statuses(self._database, project_id, [wanted])
        if wanted not in statuses:
            raise NotFound("no such message")
        return token, statuses[wanted]

    async def _find(self, project_id: int, message_id: str, request_id: str) -> uuid.UUID:
        if bool(message_id) == bool(request_id):
            reason = Reason.TOO_MANY if message_id else Reason.REQUIRED
            raise InvalidRequest(Violation("message_id", reason, "either this or request_id"))
        if message_id:
            found = convert.message_id("message_id", message_id)
        else:
            if violations := check_text("request_id", request_id, MAX_REQUEST_ID):
                raise InvalidRequest(*violations)
            key = (project_id, request_id)
            known = (await read_known_requests(self._database, [key])).get(key)
            found = known.message_id if known is not None and known.is_enqueue else None
        if found is None:
            raise NotFound("no such message")
        return found

    async def ListMessages(
        self, request: pb.ListMessagesRequest, context: Any
    ) -> pb.ListMessagesResponse:
        """Not served by this version."""
        raise NotImplementedYet("ListMessages")

    async def CancelMessage(
        self, request: pb.CancelMessageRequest, context: Any
    ) -> pb.CancelMessageResponse:
        """Not served by this version."""
        raise NotImplementedYet("CancelMessage")

    async def DeleteMessage(
        self, request: pb.DeleteMessageRequest, context: Any
    ) -> pb.DeleteMessageResponse:
        """Not served by this version."""
        raise NotImplementedYet("DeleteMessage")

    async def MovePrefs(self, request: pb.MovePrefsRequest, context: Any) -> pb.MovePrefsResponse:
        """Not served by this version."""
        raise NotImplementedYet("MovePrefs")

    async def Resend(self, request: pb.ResendRequest, context: Any) -> pb.ResendResponse:
        """Force one more attempt."""
        convert.refuse_unknown_fields(request)
        return await self._resend.run(current_caller(), request)

    async def Clear(self, request: pb.ClearRequest, context: Any) -> pb.ClearResponse:
        """Remove messages that have ended."""
        convert.refuse_unknown_fields(request)
        return await self._clear.run(current_caller(), request)

    async def UpdatePrefs(
        self, request: pb.UpdatePrefsRequest, context: Any
    ) -> pb.UpdatePrefsResponse:
        """Set or change what an address refuses."""
        convert.refuse_unknown_fields(request)
        return await self._preferences.update(current_caller(), request)

    async def GetPrefs(self, request: pb.GetPrefsRequest, context: Any) -> pb.GetPrefsResponse:
        """What an address refuses."""
        return await self._preferences.get(current_caller(), request)

    async def WatchStatus(
        self, request: pb.WatchStatusRequest, context: Any
    ) -> AsyncIterator[pb.WatchStatusResponse]:
        """Every change, from now, from a token, or behind a snapshot."""
        wanted = _wanted(request)
        heartbeat_s = DEFAULT_HEARTBEAT_S
        if request.HasField("heartbeat"):
            heartbeat_s = convert.duration("heartbeat", request.heartbeat).total_seconds()
            if not 1 <= heartbeat_s <= 300:
                raise InvalidRequest(Violation("heartbeat", Reason.OUT_OF_RANGE, "1 s to 5 min"))
        _check_snapshot(request, wanted.filter)
        stream = self._watch.stream(wanted, request.resume_token, request.snapshot, heartbeat_s)
        async for response in stream:
            yield response

    async def ListEvents(
        self, request: pb.ListEventsRequest, context: Any
    ) -> pb.ListEventsResponse:
        """The same facts, a page a call."""
        wait_s = 0.0
        if request.HasField("wait"):
            wait_s = convert.duration("wait", request.wait).total_seconds()
            if not 0 <= wait_s <= LONGEST_WAIT_S:
                text = f"0 to {LONGEST_WAIT_S} s"
                raise InvalidRequest(Violation("wait", Reason.OUT_OF_RANGE, text))
        if request.page_size < 0:
            raise InvalidRequest(Violation("page_size", Reason.OUT_OF_RANGE, "0 or more"))
        return await self._watch.list_events(
            _wanted(request), request.resume_token, request.page_size, wait_s
        )


_QUEUED = delivery_pb2.DELIVERY_STATE_QUEUED
_VIEWS = frozenset(pb.MessageView.values())


def _wanted(request: pb.WatchStatusRequest | pb.ListEventsRequest) -> Wanted:
    project_id = current_caller().project_id
    return Wanted(project_id, checked_filter(request.filter), wanted_kinds(request.kinds))


def _check_snapshot(request: pb.WatchStatusRequest, wanted: Filter) -> None:
    if request.snapshot not in (
        pb.SNAPSHOT_UNSPECIFIED,
        pb.SNAPSHOT_UNENDED,
        pb.SNAPSHOT_ALL,
    ):
        raise InvalidRequest(Violation("snapshot", Reason.OUT_OF_RANGE, "not a snapshot"))
    if request.snapshot and request.resume_token:
        raise InvalidRequest(
            Violation("snapshot", Reason.TOO_MANY, "not together with resume_token")
        )
    narrowed = (
        wanted.message_ids or wanted.correlation_ids or wanted.recipients or wanted.created_after
    )
    if request.snapshot == pb.SNAPSHOT_ALL and not narrowed:
        text = "SNAPSHOT_ALL needs message_ids, correlation_ids, recipients or created_after"
        raise InvalidRequest(Violation("filter", Reason.FILTER_TOO_WIDE, text))

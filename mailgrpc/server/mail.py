"""MailService: what each call does, top to bottom.

Enqueue is convert → check the shape → check what depends on settings and time → intake. The order
matters: a retry of something that was accepted is answered as replayed even when it would be
refused today, so a refusal that does not follow from the request alone first looks whether the
request_id is known.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from mailgrpc.config import Settings
from mailgrpc.core.admission import flags_of
from mailgrpc.core.delivery import State
from mailgrpc.core.event import Filter, MessageStatus
from mailgrpc.core.fingerprint import fingerprint
from mailgrpc.core.ids import MESSAGE, new_message_id, rfc_message_id, to_text
from mailgrpc.core.message import DEFAULT_CHANNEL, DEFAULT_EXPIRY, Submission
from mailgrpc.core.options import check_admissible
from mailgrpc.core.place import Place, encode_token
from mailgrpc.core.shape import MAX_REQUEST_ID, check_text, checked_submission
from mailgrpc.db.engine import Database
from mailgrpc.db.messages import (
    NewMessage,
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
    RequestIdMismatch,
    Violation,
)
from mailgrpc.providers.provider import Provider
from mailgrpc.server import convert
from mailgrpc.server.clear import Clear
from mailgrpc.server.feed import Feed
from mailgrpc.server.filters import checked_filter
from mailgrpc.server.foresight import foreseen
from mailgrpc.server.intake import Accepted, Intake, is_same_request
from mailgrpc.server.interceptors import (
    LONGEST_WAIT_S,
    code_number,
    current_caller,
    translated,
)
from mailgrpc.server.preferences import Preferences
from mailgrpc.server.resend import Resend
from mailgrpc.server.watch import DEFAULT_HEARTBEAT_S, Wanted, Watch, wanted_kinds
from mailgrpc.v1 import delivery_pb2, mail_service_pb2_grpc
from mailgrpc.v1 import mail_service_pb2 as pb

MAX_BATCH_MESSAGES = 500
MAX_BATCH_DELIVERIES = 2000


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
        self._settings = parts.settings
        self._database = parts.database
        self._channels = parts.channels
        self._feed = parts.feed
        self._intake = parts.intake
        self._watch = parts.watch
        self._preferences = parts.preferences
        self._resend = parts.resend
        self._clear = parts.clear
        self._last_token: tuple[int, Place | None, str] = (0, None, "")

    async def Enqueue(self, request: pb.EnqueueRequest, context: Any) -> pb.EnqueueResponse:
        """Take one message in."""
        return await self._enqueue(request, self._token())

    async def EnqueueBatch(
        self, request: pb.EnqueueBatchRequest, context: Any
    ) -> pb.EnqueueBatchResponse:
        """Take many in; each is answered for itself."""
        # Of the batch alone: what an item says is that item's error.
        if (unknown := convert.unknown_number(request)) is not None:
            raise InvalidRequest(_unknown(unknown))
        if not request.requests:
            raise InvalidRequest(Violation("requests", Reason.REQUIRED, "at least one is needed"))
        if len(request.requests) > MAX_BATCH_MESSAGES:
            raise InvalidRequest(
                Violation("requests", Reason.TOO_MANY, f"at most {MAX_BATCH_MESSAGES} messages")
            )
        deliveries = sum(
            len(r.message.to) + len(r.message.cc) + len(r.message.bcc) for r in request.requests
        )
        if deliveries > MAX_BATCH_DELIVERIES:
            raise InvalidRequest(
                Violation("requests", Reason.TOO_MANY, f"at most {MAX_BATCH_DELIVERIES} recipients")
            )
        token = self._token()
        results = await asyncio.gather(
            *(self._enqueue(item, token) for item in request.requests), return_exceptions=True
        )
        return pb.EnqueueBatchResponse(results=[_item_result(r) for r in results])

    async def _enqueue(self, request: pb.EnqueueRequest, token: str) -> pb.EnqueueResponse:
        caller = current_caller()
        if (unknown := convert.unknown_field(request)) is not None:
            raise InvalidRequest(_unknown(unknown))
        submission = checked_submission(convert.submission(request))
        now = datetime.now(UTC)
        new = self._admitted(caller.project_id, submission, now)
        if isinstance(new, InvalidRequest):
            accepted = await self._replayed(caller.project_id, submission)
            if accepted is None:
                raise new
        elif submission.validate_only:
            return pb.EnqueueResponse(not_queued=await foreseen(self._database, new))
        else:
            accepted = await self._intake.put(new, request.ByteSize())
        return await self._accepted(caller.project_id, accepted, token)

    def _admitted(
        self, project_id: int, submission: Submission, now: datetime
    ) -> NewMessage | InvalidRequest:
        """The message as it will be stored, or why settings or time refuse it."""
        options, message = submission.options, submission.message
        bit_of = self._settings.categories
        violations = check_admissible(
            submission, now=now, bit_of=bit_of, channels=self._channels.keys()
        )
        channel = options.channel or DEFAULT_CHANNEL
        if not violations:
            violations = self._channels[channel].check(message)
        if violations:
            return InvalidRequest(*violations)
        begins_at = max(options.send_at, now) if options.send_at else now
        return NewMessage(
            message_id=new_message_id(),
            project_id=project_id,
            submission=submission,
            fingerprint=fingerprint(submission),
            flags=message.flags | flags_of(message.categories, bit_of),
            channel=channel,
            expire_at=options.expire_at or begins_at + DEFAULT_EXPIRY,
        )

    async def _replayed(self, project_id: int, submission: Submission) -> Accepted | None:
        """The earlier acceptance of a request that would be refused today, if there is one."""
        if not submission.request_id or submission.validate_only:
            return None
        key = (project_id, submission.request_id)
        found = (await read_known_requests(self._database, [key])).get(key)
        if found is None:
            return None
        if not is_same_request(submission, found):
            raise RequestIdMismatch(submission.request_id)
        await self._database.confirm()
        return Accepted(found.message_id, replayed=True)

    async def _accepted(
        self, project_id: int, accepted: Accepted, token: str
    ) -> pb.EnqueueResponse:
        message_id = accepted.message_id
        if not accepted.replayed and not accepted.has_suppressed:
            return pb.EnqueueResponse(
                message_id=to_text(MESSAGE, message_id), state=_QUEUED, resume_token=token
            )
        statuses = await read_statuses(self._database, project_id, [message_id])
        if (status := statuses.get(message_id)) is None:  # cleared since
            return pb.EnqueueResponse(
                message_id=to_text(MESSAGE, message_id),
                replayed=accepted.replayed,
                resume_token=token,
            )
        return pb.EnqueueResponse(
            message_id=to_text(MESSAGE, message_id),
            state=int(status.state),  # type: ignore[arg-type]
            replayed=accepted.replayed,
            not_queued=[
                convert.delivery(d) for d in status.deliveries if d.state is State.SUPPRESSED
            ],
            resume_token=token,
        )

    def _token(self) -> str:
        """A place just before anything that this call will cause."""
        project_id, place = current_caller().project_id, self._feed.place
        # While nobody watches the place moves once a minute, and never in itself.
        if self._last_token[0] != project_id or self._last_token[1] is not place:
            self._last_token = (project_id, place, encode_token(project_id, place))
        return self._last_token[2]

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
        _refuse_unknown_fields(request)
        return await self._resend.run(current_caller(), request)

    async def Clear(self, request: pb.ClearRequest, context: Any) -> pb.ClearResponse:
        """Remove messages that have ended."""
        _refuse_unknown_fields(request)
        return await self._clear.run(current_caller(), request)

    async def UpdatePrefs(
        self, request: pb.UpdatePrefsRequest, context: Any
    ) -> pb.UpdatePrefsResponse:
        """Set or change what an address refuses."""
        _refuse_unknown_fields(request)
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


def _item_result(result: pb.EnqueueResponse | BaseException) -> pb.EnqueueResult:
    if isinstance(result, pb.EnqueueResponse):
        return pb.EnqueueResult(response=result)
    error = translated(result, "EnqueueBatch")
    return pb.EnqueueResult(error=convert.item_error(error, code_number(error)))


def _unknown(path: str) -> Violation:
    return Violation(
        path, Reason.UNKNOWN_FIELD, "this server does not know this field and will not ignore it"
    )


def _refuse_unknown_fields(request: Any) -> None:
    if (unknown := convert.unknown_field(request)) is not None:
        raise InvalidRequest(_unknown(unknown))

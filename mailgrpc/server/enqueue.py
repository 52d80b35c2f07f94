"""Enqueue and EnqueueBatch: convert → check the shape → check what depends on settings → intake.

The order matters: a retry of something that was accepted is answered as replayed even when it would
be refused today, so a refusal that does not follow from the request alone first looks whether the
request_id is known.

The way of a message that is plainly taken in has one wait in it, for its commit, and a batch makes
no task for each of its messages. Whatever is not plain (a replay, a refusal by the settings of the
day, a dry run, a recipient who is not queued) may cost more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from datetime import UTC, datetime

from mailgrpc.config import Settings
from mailgrpc.core.admission import flags_of
from mailgrpc.core.delivery import State
from mailgrpc.core.fingerprint import fingerprint
from mailgrpc.core.ids import MESSAGE, new_message_id, to_text
from mailgrpc.core.message import DEFAULT_CHANNEL, DEFAULT_EXPIRY, Submission
from mailgrpc.core.options import check_admissible
from mailgrpc.core.place import Place, encode_token
from mailgrpc.core.shape import checked_submission
from mailgrpc.db.engine import Database
from mailgrpc.db.messages import NewMessage, read_known_requests, read_statuses
from mailgrpc.errors import InvalidRequest, Reason, RequestIdMismatch, Violation
from mailgrpc.providers.provider import Provider
from mailgrpc.server import convert
from mailgrpc.server.feed import Feed
from mailgrpc.server.foresight import foreseen
from mailgrpc.server.intake import Accepted, Intake, is_same_request
from mailgrpc.server.interceptors import code_number, current_caller, translated
from mailgrpc.v1 import delivery_pb2
from mailgrpc.v1 import mail_service_pb2 as pb

MAX_BATCH_MESSAGES = 500
MAX_BATCH_DELIVERIES = 2000
_QUEUED = delivery_pb2.DELIVERY_STATE_QUEUED


class Enqueue:
    """The two ways in."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        channels: Mapping[str, Provider],
        feed: Feed,
        intake: Intake,
    ) -> None:
        self._bit_of = settings.categories
        self._database = database
        self._channels = channels
        self._feed = feed
        self._intake = intake
        self._last_token: tuple[int, Place | None, str] = (0, None, "")

    async def one(self, request: pb.EnqueueRequest) -> pb.EnqueueResponse:
        """Take one message in."""
        project_id = current_caller().project_id
        token = self._token(project_id)
        return await self._answer(project_id, await self._taken(project_id, request), token)

    async def many(self, request: pb.EnqueueBatchRequest) -> pb.EnqueueBatchResponse:
        """Take many in; each is answered for itself."""
        _check_batch(request)
        project_id = current_caller().project_id
        token = self._token(project_id)
        # Whoever gives up the batch gives up all that has not gone into a flush.
        taken = await asyncio.gather(
            *(self._begun(project_id, item) for item in request.requests), return_exceptions=True
        )
        results = []
        for item in taken:
            try:
                if isinstance(item, BaseException):
                    raise item
                response = self._plain_answer(item, token)
                if response is None:
                    response = await self._answer(project_id, item, token)
                results.append(pb.EnqueueResult(response=response))
            except Exception as error:  # noqa: BLE001  each item has its own answer
                ours = translated(error, "EnqueueBatch")
                results.append(pb.EnqueueResult(error=convert.item_error(ours, code_number(ours))))
        return pb.EnqueueBatchResponse(results=results)

    def _begun(
        self, project_id: int, request: pb.EnqueueRequest
    ) -> Awaitable[Accepted | pb.EnqueueResponse]:
        """`_taken`, begun at once: a future where nothing but the commit is waited for."""
        try:
            return self._taken(project_id, request)
        except Exception as error:  # noqa: BLE001  it is this item's
            failed: asyncio.Future[Accepted] = asyncio.get_running_loop().create_future()
            failed.set_exception(error)
            return failed

    def _taken(
        self, project_id: int, request: pb.EnqueueRequest
    ) -> Awaitable[Accepted | pb.EnqueueResponse]:
        """See one request taken in. Raises RequestError for what is wrong with it by itself."""
        if (unknown := convert.unknown_field(request)) is not None:
            raise InvalidRequest(unknown_violation(unknown))
        submission = checked_submission(convert.submission(request))
        new = self._admitted(project_id, submission, datetime.now(UTC))
        if isinstance(new, InvalidRequest):
            return self._replayed(project_id, submission, new)
        if submission.validate_only:
            return self._foreseen(new)
        return self._intake.put(new, request.ByteSize())

    def _admitted(
        self, project_id: int, submission: Submission, now: datetime
    ) -> NewMessage | InvalidRequest:
        """The message as it will be stored, or why settings or time refuse it."""
        options, message = submission.options, submission.message
        violations = check_admissible(
            submission, now=now, bit_of=self._bit_of, channels=self._channels.keys()
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
            flags=message.flags | flags_of(message.categories, self._bit_of),
            channel=channel,
            expire_at=options.expire_at or begins_at + DEFAULT_EXPIRY,
        )

    async def _replayed(
        self, project_id: int, submission: Submission, refusal: InvalidRequest
    ) -> Accepted:
        """The earlier acceptance of a request that would be refused today. Raises the refusal."""
        if not submission.request_id or submission.validate_only:
            raise refusal
        key = (project_id, submission.request_id)
        found = (await read_known_requests(self._database, [key])).get(key)
        if found is None:
            raise refusal
        if not is_same_request(submission, found):
            raise RequestIdMismatch(submission.request_id)
        await self._database.confirm()
        return Accepted(found.message_id, replayed=True)

    async def _foreseen(self, new: NewMessage) -> pb.EnqueueResponse:
        return pb.EnqueueResponse(not_queued=await foreseen(self._database, new))

    async def _answer(
        self, project_id: int, taken: Accepted | pb.EnqueueResponse, token: str
    ) -> pb.EnqueueResponse:
        if (plain := self._plain_answer(taken, token)) is not None:
            return plain
        assert isinstance(taken, Accepted)
        message_id = taken.message_id
        statuses = await read_statuses(self._database, project_id, [message_id])
        if (status := statuses.get(message_id)) is None:  # cleared since
            return pb.EnqueueResponse(
                message_id=to_text(MESSAGE, message_id),
                replayed=taken.replayed,
                resume_token=token,
            )
        return pb.EnqueueResponse(
            message_id=to_text(MESSAGE, message_id),
            state=int(status.state),  # type: ignore[arg-type]
            replayed=taken.replayed,
            not_queued=[
                convert.delivery(d) for d in status.deliveries if d.state is State.SUPPRESSED
            ],
            resume_token=token,
        )

    def _plain_answer(
        self, taken: Accepted | pb.EnqueueResponse, token: str
    ) -> pb.EnqueueResponse | None:
        """The answer where it needs no look at the database."""
        if isinstance(taken, pb.EnqueueResponse):
            return taken
        if taken.replayed or taken.has_suppressed:
            return None
        return pb.EnqueueResponse(
            message_id=to_text(MESSAGE, taken.message_id), state=_QUEUED, resume_token=token
        )

    def _token(self, project_id: int) -> str:
        """A place just before anything that this call will cause."""
        place = self._feed.place
        # While nobody watches the place moves once a minute, and never in itself.
        if self._last_token[0] != project_id or self._last_token[1] is not place:
            self._last_token = (project_id, place, encode_token(project_id, place))
        return self._last_token[2]


def unknown_violation(path: str) -> Violation:
    """That a field of the request is not known here."""
    return Violation(
        path, Reason.UNKNOWN_FIELD, "this server does not know this field and will not ignore it"
    )


def _check_batch(request: pb.EnqueueBatchRequest) -> None:
    """Refuse what is wrong with the batch itself; what an item says is that item's error."""
    if (unknown := convert.unknown_number(request)) is not None:
        raise InvalidRequest(unknown_violation(unknown))
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

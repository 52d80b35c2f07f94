"""Enqueue and EnqueueBatch: convert → check the shape → check what depends on settings → intake.

The order matters: a retry of something that was accepted is answered as replayed even when it would
be refused today, so a refusal that does not follow from the request alone first looks whether the
request_id is known.

The way of a message that is plainly taken in has one wait in it, for its commit. Calls that come at
the same time are read one behind the other (together.py), and a batch makes no task for each of its
messages. Whatever is not plain (a replay, a refusal by the settings of the day, a dry run, a
recipient who is not queued) may cost more, and goes on in the task of its call.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeAlias, TypeGuard

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
from mailgrpc.server.interceptors import bare, code_number, current_caller, translated
from mailgrpc.server.together import Together
from mailgrpc.v1 import delivery_pb2
from mailgrpc.v1 import mail_service_pb2 as pb

MAX_BATCH_MESSAGES = 500
MAX_BATCH_DELIVERIES = 2000
_QUEUED = delivery_pb2.DELIVERY_STATE_QUEUED

_NotPlain: TypeAlias = Callable[[], Coroutine[Any, Any, Accepted | pb.EnqueueResponse]]
"""What is left to be done for a request that is not plainly taken in."""


@dataclass(slots=True, eq=False)
class _Asked:
    """A request, and where its answer goes: an error, Accepted, or what is left to be done."""

    project_id: int
    request: pb.EnqueueRequest
    answer: asyncio.Future[Accepted | _NotPlain]


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
        self._reading = Together(self._read)
        self._last_token: tuple[int, Place | None, str] = (0, None, "")

    async def one(self, request: pb.EnqueueRequest) -> pb.EnqueueResponse:
        """Take one message in."""
        project_id = current_caller().project_id
        token = self._token(project_id)
        asked = _Asked(project_id, request, asyncio.get_running_loop().create_future())
        self._reading.add(asked)
        return await self._answer(project_id, await asked.answer, token)

    async def many(self, request: pb.EnqueueBatchRequest) -> pb.EnqueueBatchResponse:
        """Take many in; each is answered for itself."""
        _check_batch(request)
        project_id = current_caller().project_id
        token = self._token(project_id)
        new_answer = asyncio.get_running_loop().create_future
        items = [_Asked(project_id, item, new_answer()) for item in request.requests]
        self._read(items)
        taken: list[Accepted | _NotPlain | Exception] = []
        try:
            for item in items:
                try:
                    taken.append(await item.answer)
                except Exception as error:  # noqa: BLE001  it is this item's
                    taken.append(error)
        finally:
            # Whoever gives up the batch gives up all that has not gone into a flush.
            for item in items[len(taken) :]:
                if not item.answer.cancel() and not item.answer.cancelled():
                    item.answer.exception()  # nobody will ask for it
        results = {
            n: pb.EnqueueResult(response=_plain(each, token))
            for n, each in enumerate(taken)
            if _is_plain(each)
        }
        others = [n for n in range(len(taken)) if n not in results]
        late = await asyncio.gather(*(self._result(project_id, taken[n], token) for n in others))
        results.update(zip(others, late, strict=True))
        return pb.EnqueueBatchResponse(results=[results[n] for n in range(len(taken))])

    def _read(self, items: Sequence[_Asked]) -> None:
        """Read requests, and see those taken in that can be; each gets its own error. Never raises."""
        for asked in items:
            if asked.answer.done():  # the caller gave up
                continue
            try:
                self._take_in(asked)
            except Exception as error:  # noqa: BLE001  it is this caller's
                asked.answer.set_exception(error)

    def _take_in(self, asked: _Asked) -> None:
        """See one request taken in. Raises RequestError for what is wrong with it by itself."""
        project_id, request = asked.project_id, asked.request
        size = convert.refuse_unknown_fields(request)
        submission = checked_submission(convert.submission(request))
        new = self._admitted(project_id, submission, datetime.now(UTC))
        if isinstance(new, InvalidRequest):
            asked.answer.set_result(partial(self._replayed, project_id, submission, new))
        elif submission.validate_only:
            asked.answer.set_result(partial(self._foreseen, new))
        else:
            self._intake.put(new, size, asked.answer)

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

    async def _result(
        self, project_id: int, taken: Accepted | _NotPlain | Exception, token: str
    ) -> pb.EnqueueResult:
        """The answer to an item of a batch; its error is its own."""
        try:
            if isinstance(taken, Exception):
                raise taken
            return pb.EnqueueResult(response=await self._answer(project_id, taken, token))
        except Exception as error:  # noqa: BLE001  translated logs what nobody foresaw
            ours = translated(error, "EnqueueBatch")
            # By its frames it holds the whole batch, and the batch holds it.
            bare(error)
            return pb.EnqueueResult(error=convert.item_error(ours, code_number(ours)))

    async def _answer(
        self, project_id: int, taken: Accepted | _NotPlain, token: str
    ) -> pb.EnqueueResponse:
        if _is_plain(taken):
            return _plain(taken, token)
        if not isinstance(taken, Accepted):
            done = await taken()
            if isinstance(done, pb.EnqueueResponse):
                return done
            taken = done
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

    def _token(self, project_id: int) -> str:
        """A place just before anything that this call will cause."""
        place = self._feed.place
        # While nobody watches the place moves once a minute, and never in itself.
        if self._last_token[0] != project_id or self._last_token[1] is not place:
            self._last_token = (project_id, place, encode_token(project_id, place))
        return self._last_token[2]


def _is_plain(taken: object) -> TypeGuard[Accepted]:
    """Whether the answer needs no look at the database."""
    return isinstance(taken, Accepted) and not taken.replayed and not taken.has_suppressed


def _plain(taken: Accepted, token: str) -> pb.EnqueueResponse:
    return pb.EnqueueResponse(
        message_id=to_text(MESSAGE, taken.message_id), state=_QUEUED, resume_token=token
    )


def _check_batch(request: pb.EnqueueBatchRequest) -> None:
    """Refuse what is wrong with the batch itself; what an item says is that item's error."""
    if (unknown := convert.unknown_number(request)) is not None:
        raise InvalidRequest(convert.unknown_violation(unknown))
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

"""The one edge where calls come in: who calls, and what errors become.

Promises. A call never hangs: a handler that is cancelled from inside, or that fails in a way nobody
foresaw, still answers. What the server did not expect is INTERNAL with an error id and nothing
else; the log has the rest under that id. A call without a deadline gets the server's. One that has
a deadline and waits for the store is told so just before that. A request that
is too large or broken is not read, and still answered by the contract: left to itself, gRPC would
answer UNKNOWN with the text of an exception. Details stay under 4 kB, because they travel in
trailers, and past 8 kB the caller sees another error.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import grpc
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from mailgrpc.core.message import MAX_REQUEST_BYTES
from mailgrpc.db.engine import Database
from mailgrpc.db.projects import DEFAULT_CALLER, Caller, find_caller
from mailgrpc.errors import (
    Exhausted,
    Reason,
    RequestError,
    StoreUnavailable,
    Unauthenticated,
    Unavailable,
)
from mailgrpc.server.convert import SHOWN_VIOLATIONS, shown_violations
from mailgrpc.server.deadlines import Deadlines, Limit
from mailgrpc.v1 import mail_service_pb2

log = logging.getLogger(__name__)

DOMAIN = "mailgrpc"
LONGEST_WAIT_S = 60
"""How long ListEvents may be asked to wait for the first event."""
_RETRY_STORE = timedelta(seconds=1)
_TO_ANSWER_S = 0.25  # left of the caller's time to tell it that the store was silent
_DETAILS_BYTES = 3900  # under 4 kB with what gRPC adds
_TEXT_CHARACTERS = 300

_caller: ContextVar[Caller] = ContextVar("caller")


def current_caller() -> Caller:
    """Who made the call that this task serves."""
    return _caller.get()


_RANGES = (
    (1, 17, grpc.StatusCode.INVALID_ARGUMENT),
    (30, 30, grpc.StatusCode.NOT_FOUND),
    (31, 31, grpc.StatusCode.ALREADY_EXISTS),
    (32, 36, grpc.StatusCode.FAILED_PRECONDITION),
    (37, 37, grpc.StatusCode.OUT_OF_RANGE),
    (50, 51, grpc.StatusCode.UNAUTHENTICATED),
    (52, 53, grpc.StatusCode.PERMISSION_DENIED),
    (60, 63, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (70, 71, grpc.StatusCode.UNAVAILABLE),
    (72, 72, grpc.StatusCode.UNIMPLEMENTED),
    (73, 73, grpc.StatusCode.INTERNAL),
)


def status_of(reason: Reason) -> grpc.StatusCode:
    """The status that a reason is answered with; part of the contract."""
    for first, last, code in _RANGES:
        if first <= reason <= last:
            return code
    return grpc.StatusCode.UNKNOWN


def code_number(error: RequestError) -> int:
    """The number of the google.rpc.Code of an error."""
    return int(code_pb2.Code.Value(status_of(error.reason).name))


def error_details(error: RequestError) -> bytes:
    """The google.rpc.Status of an error, serialized; under 4 kB."""
    for shown in (SHOWN_VIOLATIONS, 10, 3):
        status = _rich_status(error, shown)
        if status.ByteSize() < _DETAILS_BYTES:
            break
    return bytes(status.SerializeToString())


def _rich_status(error: RequestError, shown: int) -> status_pb2.Status:
    anchor = error.reason.name.lower().replace("_", "-")
    details: list[Message] = [
        error_details_pb2.ErrorInfo(
            reason=error.reason.name, domain=DOMAIN, metadata={"help": f"README.md#{anchor}"}
        )
    ]
    if error.violations:
        bad = error_details_pb2.BadRequest()
        for v in shown_violations(error.violations, shown):
            bad.field_violations.add(field=v.field, description=v.description, reason=v.reason.name)
        details.append(bad)
    if error.retry_after is not None:
        delay = Duration()
        delay.FromTimedelta(error.retry_after)
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    if error.quota is not None:
        quota = error_details_pb2.QuotaFailure()
        quota.violations.add(subject=error.quota, description=error.text[:200])
        details.append(quota)
    status = status_pb2.Status(code=code_number(error), message=error.text[:_TEXT_CHARACTERS])
    for detail in details:
        status.details.add().Pack(detail)
    return status


async def _abort(context: Any, error: RequestError) -> NoReturn:
    if isinstance(error, _NoAnswer):
        await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, error.text)
    await context.abort(
        status_of(error.reason),
        error.text[:_TEXT_CHARACTERS],
        trailing_metadata=(("grpc-status-details-bin", error_details(error)),),
    )
    raise AssertionError("unreachable: abort raises")


def translated(error: BaseException, method: str) -> RequestError:
    """What a caller is told of an exception."""
    if isinstance(error, RequestError):
        return error
    if isinstance(error, StoreUnavailable):
        log.warning("%s: the store is unavailable: %s", method, error)
        return Unavailable(
            Reason.STORE_UNAVAILABLE,
            "the store cannot be asked now; the same call with its request_id is safe to repeat",
            retry_after=_RETRY_STORE,
        )
    error_id = secrets.token_hex(6)
    log.error("%s failed, error id %s", method, error_id, exc_info=error)
    return RequestError(Reason.INTERNAL, f"internal error {error_id}")


ErrorT = TypeVar("ErrorT", bound=BaseException)


class _NoAnswer(RequestError):
    """The server's own deadline has passed. Not of the contract's reasons: plain gRPC says it."""

    def __init__(self) -> None:
        super().__init__(
            Reason.UNSPECIFIED,
            "no answer in the time that this server gives a call without a deadline",
        )


def bare(error: ErrorT) -> ErrorT:
    """The error without the frames that it came through."""
    error.__traceback__ = error.__context__ = error.__cause__ = None
    return error


def _is_callers(context: Any) -> bool:
    """Whether the cancellation under way is the caller's or the server's end, not from inside."""
    task = asyncio.current_task()
    return (task is not None and task.cancelling() > 0) or context.cancelled()


@dataclass(frozen=True, slots=True)
class _Unread:
    """What stands in the place of a request that was not read, and why it was not."""

    error: RequestError


def _reading(parse: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    """The deserializer of a method, which never raises: nobody could translate that."""

    def read(data: bytes) -> Any:
        if len(data) > MAX_REQUEST_BYTES:
            return _Unread(Exhausted(Reason.REQUEST_TOO_LARGE, "a request has at most 10 MiB"))
        try:
            return parse(data)
        except DecodeError:
            text = "the bytes are not a request of this method, or a string in it is not UTF-8"
            return _Unread(RequestError(Reason.OUT_OF_RANGE, text))

    return read


def _read(request: Any) -> Any:
    """The request, where it could be read. Raises RequestError."""
    if isinstance(request, _Unread):
        raise request.error
    return request


class Edge:
    """Wraps every method of a service before it is registered.

    Not an interceptor of gRPC's: one of those is asked anew at each call, for 15 µs of its time.
    """

    def __init__(self, database: Database, *, keys: bool, deadline_s: float) -> None:
        self._database = database
        self._keys = keys
        self._deadline_s = deadline_s
        self._deadlines = Deadlines()
        self._known: dict[str, tuple[float, Caller]] = {}

    def around(self, server: grpc.aio.Server) -> Any:
        """What a service is added to in place of `server`, so that its methods are wrapped."""
        return _Registrar(self, server)

    def wrapped(self, name: str, handler: Any) -> Any:
        """The handler of a method, which lets in, bounds, and translates what goes wrong."""
        read, write = _reading(handler.request_deserializer), handler.response_serializer
        if handler.response_streaming:
            streaming = self._streaming(handler.unary_stream, name)
            return grpc.unary_stream_rpc_method_handler(streaming, read, write)
        return grpc.unary_unary_rpc_method_handler(
            self._unary(handler.unary_unary, name), read, write
        )

    def _unary(
        self, call: Callable[[Any, Any], Awaitable[Any]], name: str
    ) -> Callable[[Any, Any], Awaitable[Any]]:
        async def run(request: Any, context: Any) -> Any:
            limit = self._deadlines.within(self._bound_s(request, context))
            try:
                with limit:
                    _caller.set(await self._identify(context) if self._keys else DEFAULT_CALLER)
                    return await call(_read(request), context)
            except TimeoutError as error:
                failure = self._timed_out(error, limit, context, name)
            except asyncio.CancelledError:
                # The caller has gone, or a future of our own was cancelled under us: in that case
                # the caller is still there, and raising this would leave it without an answer.
                if _is_callers(context):
                    raise
                failure = translated(RuntimeError("cancelled from inside"), name)
            except grpc.aio.AbortError:
                raise
            except Exception as error:  # noqa: BLE001  translated logs what nobody foresaw
                failure = translated(error, name)
            # gRPC keeps what `abort` raises in a cycle with the call, and by its frames all that
            # they hold. A refused request of megabytes must not wait there to be found.
            request = None
            return await _abort(context, bare(failure))

        return run

    @staticmethod
    def _timed_out(error: TimeoutError, limit: Limit, context: Any, name: str) -> RequestError:
        if not limit.expired:  # one of our own, from within
            return translated(error, name)
        if context.time_remaining() is not None:
            return translated(StoreUnavailable("no answer within the caller's time"), name)
        return _NoAnswer()

    def _streaming(
        self, call: Callable[[Any, Any], AsyncIterator[Any]], name: str
    ) -> Callable[[Any, Any], AsyncIterator[Any]]:
        async def run(request: Any, context: Any) -> AsyncIterator[Any]:
            try:
                _caller.set(await self._identify(context) if self._keys else DEFAULT_CALLER)
                async for response in call(_read(request), context):
                    yield response
            except asyncio.CancelledError:
                if _is_callers(context):
                    raise
                await _abort(context, translated(RuntimeError("cancelled from inside"), name))
            except (GeneratorExit, grpc.aio.AbortError):
                raise
            except Exception as error:
                if context.cancelled() or type(error).__name__ == "ExecuteBatchError":
                    raise  # the subscriber has gone; nobody is left to tell
                await _abort(context, translated(error, name))

        return run

    def _bound_s(self, request: Any, context: Any) -> float | None:
        """How long a call may take; None where the caller's own deadline ends it."""
        wait_s = 0.0
        if isinstance(request, mail_service_pb2.ListEventsRequest):
            wait_s = request.wait.seconds + request.wait.nanos / 1e9
        remaining_s: float | None = context.time_remaining()
        if remaining_s is None:
            # A caller who asked to wait gets the wait, and then as long as everybody.
            return self._deadline_s + max(0.0, min(wait_s, LONGEST_WAIT_S))
        if wait_s > 0:
            return None  # it may wait for events and not for the store
        left_s = max(remaining_s - _TO_ANSWER_S, remaining_s / 2)
        if isinstance(request, mail_service_pb2.ClearRequest):
            return left_s  # it takes as long as there is to remove
        return min(self._deadline_s, left_s)

    async def _identify(self, context: Any) -> Caller:
        """Who shows an API key. Raises Unauthenticated, StoreUnavailable."""
        shown = ""
        for key, value in context.invocation_metadata():
            if key == "authorization" and isinstance(value, str):
                shown = value
        if not shown:
            raise Unauthenticated(
                Reason.KEY_MISSING, "send metadata `authorization: Bearer KEY` with an API key"
            )
        scheme, _, key = shown.partition(" ")
        if scheme.lower() != "bearer":
            raise Unauthenticated(Reason.KEY_INVALID, "`authorization` is not `Bearer KEY`")
        now = asyncio.get_running_loop().time()
        if (known := self._known.get(key)) is not None and known[0] > now:
            return known[1]
        if (caller := await find_caller(self._database, key)) is None:
            raise Unauthenticated(Reason.KEY_INVALID, "this API key is unknown or revoked")
        if len(self._known) >= _KEYS_REMEMBERED:
            self._known.clear()
        self._known[key] = (now + _KEY_TRUSTED_S, caller)
        return caller


class _Registrar:
    """Takes what the generated code registers, and passes it on wrapped.

    As generic handlers and not by their names: of each name gRPC's server waits for the next call
    apart, and goes through all these waits at every call.
    """

    def __init__(self, edge: Edge, server: grpc.aio.Server) -> None:
        self._edge = edge
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Passed over: the same methods come by their names."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        wrapped = {name: self._edge.wrapped(name, h) for name, h in handlers.items()}
        generic = grpc.method_handlers_generic_handler(service, wrapped)
        self._server.add_generic_rpc_handlers((generic,))


_KEYS_REMEMBERED = 10_000
_KEY_TRUSTED_S = 10.0
"""How long a key is not asked again: a revoked one may work for so long."""

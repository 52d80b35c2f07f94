"""A transport to the real server that breaks on demand, and whose time passes only by waiting."""

from __future__ import annotations

from collections import deque
from enum import Enum

import grpc
from google.protobuf.message import Message

from mailgrpc.client.endpoint import Endpoint
from mailgrpc.client.errors import MailError, UnavailableError
from mailgrpc.client.transport import BlockingTransport, Silence, Stream


class Lost(Enum):
    """What breaks of one try."""

    NOTHING = 0
    REQUEST = 1  # it never arrives
    ANSWER = 2  # it is carried out, and nobody hears of it


def unavailable(text: str = "connection reset", retry_after_s: float | None = None) -> MailError:
    return UnavailableError(grpc.StatusCode.UNAVAILABLE, text, retry_after_s=retry_after_s)


class BreakingTransport(BlockingTransport):
    """Calls go through unless `faults` says otherwise; streams break after `breaks_after` reads.

    `requests` holds what was tried, `slept` the waits in seconds.
    """

    def __init__(self, target: str) -> None:
        super().__init__(Endpoint(target=target))
        self.faults: deque[Lost | MailError] = deque()
        self.breaks_after: deque[tuple[int, Exception | None]] = deque()
        self.requests: list[tuple[str, Message]] = []
        self.slept: list[float] = []
        self._now = 1000.0

    async def call(self, method: str, request: Message, timeout_s: float) -> Message:
        self.requests.append((method, request))
        fault = self.faults.popleft() if self.faults else Lost.NOTHING
        if isinstance(fault, MailError):
            raise fault
        if fault is Lost.REQUEST:
            raise unavailable()
        answer = await super().call(method, request, timeout_s)
        if fault is Lost.ANSWER:
            raise unavailable()
        return answer

    def stream(self, method: str, request: Message) -> Stream:
        self.requests.append((method, request))
        stream = super().stream(method, request)
        return BreakingStream(stream, *self.breaks_after.popleft()) if self.breaks_after else stream

    def now(self) -> float:
        return self._now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self._now += seconds

    def request_ids(self, method: str) -> list[str]:
        """The request_id of each try."""
        return [request.request_id for name, request in self.requests if name == method]  # type: ignore[attr-defined]


class BreakingStream:
    """Ends with `error` instead of its read number `reads`; None: it ends without a word."""

    def __init__(self, stream: Stream, reads: int, error: Exception | None) -> None:
        self._stream = stream
        self._left = reads
        self._error = error

    async def read(self, timeout_s: float) -> Message | None:
        if self._left == 0:
            self._stream.cancel()
            if self._error is None:
                return None
            raise self._error
        self._left -= 1
        return await self._stream.read(timeout_s)

    def cancel(self) -> None:
        self._stream.cancel()


SILENCE = Silence()

"""The two ways to speak gRPC, asyncio and blocking, behind one interface.

What the client does (`calls`, `watching`) is written once, as coroutines over a Transport. In
`AioTransport` they wait for an event loop. In `BlockingTransport` the coroutines never wait: each
step blocks the thread and is done when it returns, so that `run_blocking` gets from a coroutine's
start to its end without any loop. There is no second thread and no second copy of the logic, and
a blocking call raises, stops at Ctrl-C and forks as any other blocking gRPC call does.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
import weakref
from collections.abc import Coroutine
from typing import Any, Protocol, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import Message

from mailgrpc.client.endpoint import Endpoint
from mailgrpc.client.errors import error_from_call
from mailgrpc.v1.mail_service_pb2_grpc import MailServiceStub

T = TypeVar("T")


class Silence(Exception):
    """Nothing was read from a stream in the time allowed; the stream is cancelled."""


class Stream(Protocol):
    """A server's stream under way."""

    async def read(self, timeout_s: float) -> Message | None:
        """The next response; None at the end. Raises MailError, Silence."""

    def cancel(self) -> None:
        """End it, from any thread; a `read` under way returns None."""


class Transport(Protocol):
    """How calls are made and how time passes. Methods are those of MailService, by name."""

    async def call(self, method: str, request: Message, timeout_s: float) -> Message:
        """Make one try of a unary call. Raises MailError."""

    def stream(self, method: str, request: Message) -> Stream:
        """Begin a call that is answered by a stream."""

    def now(self) -> float:
        """Seconds on a clock that only goes forward."""

    async def sleep(self, seconds: float) -> None:
        """Let time pass."""

    async def close(self) -> None:
        """End the connection; calls under way are cancelled."""


class AioTransport:
    """grpc.aio. The channel belongs to the event loop of the first call."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._channel: grpc.aio.Channel | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def call(self, method: str, request: Message, timeout_s: float) -> Message:
        """Make one try."""
        try:
            answer: Message = await self._method(method)(
                request, timeout=timeout_s, metadata=self._endpoint.metadata
            )
        except grpc.RpcError as error:
            raise error_from_call(error) from error
        return answer

    def stream(self, method: str, request: Message) -> Stream:
        """Begin a stream."""
        return _AioStream(self._method(method)(request, metadata=self._endpoint.metadata))

    def now(self) -> float:
        """Seconds of the monotonic clock."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Let time pass for this task."""
        await asyncio.sleep(seconds)

    async def close(self) -> None:
        """End the connection."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None

    def _method(self, name: str) -> Any:
        loop = asyncio.get_running_loop()
        if self._channel is None:
            self._loop = loop
            self._channel = self._endpoint.aio_channel()
        elif self._loop is not loop:
            raise RuntimeError("this AsyncMailClient belongs to another event loop")
        return getattr(MailServiceStub(self._channel), name)


class _AioStream:
    def __init__(self, call: Any) -> None:
        self._call = call
        self._cancelled = False

    async def read(self, timeout_s: float) -> Message | None:
        try:
            async with asyncio.timeout(timeout_s):
                response = await self._call.read()
        except TimeoutError:
            self._call.cancel()
            raise Silence from None
        except grpc.RpcError as error:
            raise error_from_call(error) from error
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._cancelled and (task is None or not task.cancelling()):
                return None  # the stream was cancelled, not whoever reads it
            raise
        return None if response is grpc.aio.EOF else response

    def cancel(self) -> None:
        self._cancelled = True
        self._call.cancel()


class BlockingTransport:
    """grpc with threads. May be shared by threads. After a fork the child connects anew."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._endpoint = endpoint
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._channel: grpc.Channel | None = None
        self._stub: MailServiceStub | None = None
        self._pid = 0

    async def call(self, method: str, request: Message, timeout_s: float) -> Message:
        """Make one try."""
        try:
            answer: Message = self._method(method)(
                request, timeout=timeout_s, metadata=self._endpoint.metadata
            )
        except grpc.RpcError as error:
            raise error_from_call(error) from error
        return answer

    def stream(self, method: str, request: Message) -> Stream:
        """Begin a stream."""
        return _BlockingStream(self._method(method)(request, metadata=self._endpoint.metadata))

    def now(self) -> float:
        """Seconds of the monotonic clock."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Let time pass for this thread, unless the client is closed."""
        self._closed.wait(seconds)

    async def close(self) -> None:
        """End the connection; who waits between two tries is woken."""
        with self._lock:
            self._closed.set()
            channel, self._channel, self._stub = self._channel, None, None
        if channel is not None:
            channel.close()

    def _method(self, name: str) -> Any:
        with self._lock:
            if self._closed.is_set():
                raise RuntimeError("this MailClient is closed")
            # A channel does not survive a fork: its threads and its place in the connection are
            # the parent's. The parent's is left alone here, not closed.
            if self._stub is None or self._pid != os.getpid():
                self._channel = self._endpoint.channel()
                self._stub = MailServiceStub(self._channel)
                self._pid = os.getpid()
            return getattr(self._stub, name)


class _BlockingStream:
    def __init__(self, call: Any) -> None:
        self._call = call
        self._cancelled = False
        self._watchdog = _Watchdog(call)

    async def read(self, timeout_s: float) -> Message | None:
        self._watchdog.arm(timeout_s)
        try:
            response: Message = next(self._call)
        except StopIteration:
            return None
        except grpc.RpcError as error:
            if self._cancelled:
                return None
            if self._watchdog.has_bitten:
                raise Silence from None
            raise error_from_call(error) from error
        finally:
            self._watchdog.disarm()
        return response

    def cancel(self) -> None:
        self._cancelled = True
        self._call.cancel()
        self._watchdog.stop()

    def __del__(self) -> None:
        self.cancel()


class _Watchdog:
    """Cancels a call that makes its reader wait for too long.

    A blocking read of gRPC knows no time-out. One thread a stream looks after it; it only wakes
    where a limit has passed, so that a fast stream does not pay for it.
    """

    def __init__(self, call: Any) -> None:
        self.has_bitten = False
        self._condition = threading.Condition()
        self._due: float | None = None  # None: nobody waits
        self._wakes_at = float("inf")
        self._stopped = False
        threading.Thread(
            target=self._run, args=(weakref.ref(call),), name="mailgrpc-watchdog", daemon=True
        ).start()

    def arm(self, timeout_s: float) -> None:
        with self._condition:
            self._due = time.monotonic() + timeout_s
            if self._due < self._wakes_at:
                self._condition.notify()

    def disarm(self) -> None:
        with self._condition:
            self._due = None

    def stop(self) -> None:
        with self._condition:
            self._stopped = True
            self._condition.notify()

    def _run(self, call: weakref.ref[Any]) -> None:
        with self._condition:
            while not self._stopped:
                now = time.monotonic()
                if self._due is not None and self._due <= now:
                    self.has_bitten = True
                    if (alive := call()) is not None:
                        alive.cancel()
                    return
                self._wakes_at = float("inf") if self._due is None else self._due
                self._condition.wait(None if self._due is None else self._due - now)


def run_blocking(coroutine: Coroutine[Any, Any, T]) -> T:
    """Take a coroutine over a BlockingTransport from its start to its end."""
    try:
        coroutine.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    coroutine.close()
    raise RuntimeError("a blocking call waited for an event loop")

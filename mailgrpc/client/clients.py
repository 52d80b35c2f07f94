"""The two faces of the client. Neither has logic of its own: see `calls` and `transport`.

`MailClient` has the methods of `AsyncMailClient`, with the same arguments and types, blocking: they
are made from them, one line each.
"""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, Self, TypeVar

from mailgrpc.client.calls import MailCalls
from mailgrpc.client.endpoint import DEFAULT_TARGET, Endpoint
from mailgrpc.client.policy import CallPolicy
from mailgrpc.client.transport import AioTransport, BlockingTransport, Transport, run_blocking
from mailgrpc.client.watching import OnRetry, Update, Watcher
from mailgrpc.v1.event_pb2 import Event

if TYPE_CHECKING:
    from mailgrpc.config import Settings

P = ParamSpec("P")
T = TypeVar("T")
S = TypeVar("S")
V = TypeVar("V")


class Source(Protocol):
    """Where events come from: a Watcher, or a Following."""

    @property
    def token(self) -> str:
        """The place up to which all was handed over and dealt with."""

    async def next_event(self) -> Event | None:
        """The next event; None at the end."""

    def close(self) -> None:
        """End it, from any thread."""


class AsyncEvents:
    """An iterator of events. `token` is the place up to which the reader has dealt with them."""

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def token(self) -> str:
        """The place up to which the reader has dealt with them: the one to store."""
        return self._source.token

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        event = await self._source.next_event()
        if event is None:
            raise StopAsyncIteration
        return event

    def close(self) -> None:
        """End the iteration; the reader that waits for the next event is let go."""
        self._source.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()


class AsyncWatch(AsyncEvents):
    """A watch: events one by one, or whole responses by `updates()`. Use one of the two."""

    def __init__(self, watcher: Watcher) -> None:
        super().__init__(watcher)
        self._watcher = watcher

    async def updates(self) -> AsyncIterator[Update]:
        """The responses, with snapshots, `caught_up` and heartbeats."""
        while (update := await self._watcher.next_update()) is not None:
            yield update


class Events:
    """An iterator of events. `token` is the place up to which the reader has dealt with them.

    To be read by one thread; `close` may come from another.
    """

    def __init__(self, source: Source) -> None:
        self._source = source

    @property
    def token(self) -> str:
        """The place up to which the reader has dealt with them: the one to store."""
        return self._source.token

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Event:
        event = run_blocking(self._source.next_event())
        if event is None:
            raise StopIteration
        return event

    def close(self) -> None:
        """End the iteration; the thread that waits for the next event is let go."""
        self._source.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Watch(Events):
    """A watch: events one by one, or whole responses by `updates()`. Use one of the two."""

    def __init__(self, watcher: Watcher) -> None:
        super().__init__(watcher)
        self._watcher = watcher

    def updates(self) -> Iterator[Update]:
        """The responses, with snapshots, `caught_up` and heartbeats."""
        while (update := run_blocking(self._watcher.next_update())) is not None:
            yield update


def _opened(
    method: Callable[Concatenate[MailCalls, P], S], present: Callable[[S], V]
) -> Callable[Concatenate[AsyncMailClient, P], V]:
    @functools.wraps(method)
    def call(client: AsyncMailClient, /, *args: P.args, **kwargs: P.kwargs) -> V:
        return present(method(client, *args, **kwargs))

    return call


class AsyncMailClient(MailCalls):
    """The client for asyncio. It belongs to the event loop in which it is first used.

    async with AsyncMailClient("mail.internal:50051", api_key=key) as client:
        receipt = await client.send(
            sender="shop@example.org", to="ada@example.org", subject="Receipt", text="…"
        )
        async for event in client.watch(token=receipt.response.resume_token):
            …
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        api_key: str | None = None,
        ca_file: Path | None = None,
        tls: bool = False,
        policy: CallPolicy | None = None,
        on_retry: OnRetry | None = None,
        transport: Transport | None = None,
    ) -> None:
        endpoint = Endpoint(target=target, api_key=api_key, ca_file=ca_file, tls=tls)
        super().__init__(transport or AioTransport(endpoint), policy or CallPolicy(), on_retry)

    @classmethod
    def from_settings(cls, settings: Settings | None = None, **rest: Any) -> Self:
        """With the target, key and roots of the settings: by default those of the environment."""
        return cls(**_connection(settings), **rest)

    watch = _opened(MailCalls.watcher, AsyncWatch)
    follow = _opened(MailCalls.following, AsyncEvents)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def _blocking(
    method: Callable[Concatenate[MailCalls, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate[MailClient, P], T]:
    @functools.wraps(method)
    def call(client: MailClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return run_blocking(method(client.calls, *args, **kwargs))

    return call


def _blocking_opened(
    method: Callable[Concatenate[MailCalls, P], S], present: Callable[[S], V]
) -> Callable[Concatenate[MailClient, P], V]:
    @functools.wraps(method)
    def call(client: MailClient, /, *args: P.args, **kwargs: P.kwargs) -> V:
        return present(method(client.calls, *args, **kwargs))

    return call


class MailClient:
    """The blocking client. Threads may share it, and a forked child may go on using it.

    with MailClient("mail.internal:50051", api_key=key) as client:
        receipt = client.send(
            sender="shop@example.org", to="ada@example.org", subject="Receipt", text="…"
        )
        for event in client.watch(token=receipt.response.resume_token):
            …
    """

    def __init__(
        self,
        target: str = DEFAULT_TARGET,
        *,
        api_key: str | None = None,
        ca_file: Path | None = None,
        tls: bool = False,
        policy: CallPolicy | None = None,
        on_retry: OnRetry | None = None,
        transport: Transport | None = None,
    ) -> None:
        endpoint = Endpoint(target=target, api_key=api_key, ca_file=ca_file, tls=tls)
        self.calls = MailCalls(
            transport or BlockingTransport(endpoint), policy or CallPolicy(), on_retry
        )

    @classmethod
    def from_settings(cls, settings: Settings | None = None, **rest: Any) -> Self:
        """With the target, key and roots of the settings: by default those of the environment."""
        return cls(**_connection(settings), **rest)

    send = _blocking(MailCalls.send)
    wait_until_ended = _blocking(MailCalls.wait_until_ended)
    watch = _blocking_opened(MailCalls.watcher, Watch)
    follow = _blocking_opened(MailCalls.following, Events)
    enqueue = _blocking(MailCalls.enqueue)
    enqueue_batch = _blocking(MailCalls.enqueue_batch)
    get_status = _blocking(MailCalls.get_status)
    get_message = _blocking(MailCalls.get_message)
    list_messages = _blocking(MailCalls.list_messages)
    resend = _blocking(MailCalls.resend)
    cancel_message = _blocking(MailCalls.cancel_message)
    delete_message = _blocking(MailCalls.delete_message)
    clear = _blocking(MailCalls.clear)
    update_prefs = _blocking(MailCalls.update_prefs)
    get_prefs = _blocking(MailCalls.get_prefs)
    move_prefs = _blocking(MailCalls.move_prefs)
    list_events = _blocking(MailCalls.list_events)
    close = _blocking(MailCalls.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _connection(settings: Settings | None) -> dict[str, Any]:
    if settings is None:
        from mailgrpc.config import load_settings  # noqa: PLC0415  only who asks reads them

        settings = load_settings()
    return {"target": settings.target, "api_key": settings.api_key, "ca_file": settings.ca_file}

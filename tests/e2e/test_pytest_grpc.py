"""Blocking stubs by pytest-grpc's fixtures, against the real asyncio server in another thread.

pytest-grpc starts a blocking server itself, and its fake mode calls servicers in place; neither
can serve coroutines. So `grpc_addr` and `grpc_server` are those of the real one; the fixtures on
the client's side (`grpc_channel`, `grpc_stub`) stay as they are.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import Future

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from mailgrpc.config import HostPort, Settings
from mailgrpc.v1 import delivery_pb2
from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1.mail_service_pb2_grpc import MailServiceStub
from tests.conftest import TEMPLATE, Cluster
from tests.gateway import PATIENCE_S, Gateway, enqueue


class Thread:
    """A gateway in a thread with an event loop of its own."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._ready: Future[tuple[str, asyncio.AbstractEventLoop, asyncio.Event]] = Future()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()))

    async def _main(self) -> None:
        async with Gateway(self._settings) as gateway:
            stopped = asyncio.Event()
            self._ready.set_result((gateway.target, asyncio.get_running_loop(), stopped))
            await stopped.wait()

    def start(self) -> str:
        self._thread.start()
        target, self._loop, self._stopped = self._ready.result(30)
        return target

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopped.set)
        self._thread.join(30)


@pytest.fixture(scope="module")
def grpc_addr(cluster: Cluster, valkey: object) -> Iterator[str]:
    cluster.run(f"CREATE DATABASE pytest_grpc TEMPLATE {TEMPLATE}")
    settings = Settings(
        listen=HostPort("127.0.0.1", 0),
        database_url=cluster.url_of("pytest_grpc"),
        redis_url=valkey.url,  # type: ignore[attr-defined]
        channels={"default": "capture:"},
        grace_s=5.0,
    )
    thread = Thread(settings)
    yield thread.start()
    thread.stop()
    cluster.run("DROP DATABASE pytest_grpc WITH (FORCE)")


@pytest.fixture(scope="module")
def grpc_server(grpc_addr: str) -> str:
    """It runs already; this is what `grpc_channel` waits for."""
    return grpc_addr


@pytest.fixture(scope="module")
def grpc_stub_cls() -> type[MailServiceStub]:
    return MailServiceStub


def test_a_blocking_stub_sends_a_mail_and_reads_its_end(grpc_stub: MailServiceStub) -> None:
    accepted = grpc_stub.Enqueue(enqueue("ada@example.org"), timeout=PATIENCE_S)
    watch = pb.WatchStatusRequest(resume_token=accepted.resume_token)
    stream = grpc_stub.WatchStatus(watch, timeout=PATIENCE_S)
    states = []
    for response in stream:
        states += [event.state_changed.delivery.state for event in response.events]
        if delivery_pb2.DELIVERY_STATE_SENT in states:
            break
    stream.cancel()
    assert states == [
        delivery_pb2.DELIVERY_STATE_QUEUED,
        delivery_pb2.DELIVERY_STATE_SENDING,
        delivery_pb2.DELIVERY_STATE_SENT,
    ]


def test_a_blocking_stub_is_told_what_is_wrong(grpc_stub: MailServiceStub) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        grpc_stub.Enqueue(enqueue("nobody"), timeout=PATIENCE_S)
    error: grpc.Call = caught.value  # type: ignore[assignment]
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    [details] = [v for k, v in error.trailing_metadata() if k == "grpc-status-details-bin"]
    info = error_details_pb2.ErrorInfo()
    status_pb2.Status.FromString(details).details[0].Unpack(info)
    assert (info.domain, info.reason) == ("mailgrpc", "INVALID_ADDRESS")


def test_a_channel_of_pytest_grpc_serves_any_call(grpc_channel: grpc.Channel) -> None:
    stub = MailServiceStub(grpc_channel)
    answer = stub.GetPrefs(pb.GetPrefsRequest(address="x@example.org"), timeout=PATIENCE_S)
    assert answer.prefs.accepts_all


def test_many_threads_share_a_channel(grpc_stub: MailServiceStub) -> None:
    requests = [enqueue("ada@example.org", request_id=f"r-{n % 10}") for n in range(100)]
    calls = [grpc_stub.Enqueue.future(request, timeout=PATIENCE_S) for request in requests]
    assert len({call.result().message_id for call in calls}) == 10

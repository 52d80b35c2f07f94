"""`mailgrpc serve --processes`: several real servers on one port, kept by one parent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from mailgrpc.config import HostPort, Settings
from mailgrpc.db.engine import Database
from mailgrpc.errors import SettingsError
from mailgrpc.server import port as server_port
from mailgrpc.server.port import reserved
from mailgrpc.v1 import mail_service_pb2_grpc
from tests.gateway import PATIENCE_S, enqueue

Start = Callable[..., "Parent"]


class Parent:
    """`mailgrpc serve` as a process, its words, and its children."""

    def __init__(self, environ: dict[str, str], *flags: str) -> None:
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mailgrpc", "serve", *flags],
            env=environ,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines.extend(iter(self.process.stderr.readline, ""))

    def says(self, pattern: str) -> str:
        """Wait for a line; its first group."""
        found: list[str] = []

        def said() -> bool:
            found[:] = re.findall(pattern, "".join(self.lines))
            return bool(found)

        until(said)
        return found[0]

    @property
    def address(self) -> str:
        return self.says(r"serving on (\S+)")

    def children(self) -> list[int]:
        pid = self.process.pid
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(2 * PATIENCE_S)
        self._reader.join(PATIENCE_S)
        return code


def until(condition: Callable[[], bool]) -> None:
    ends_at = time.monotonic() + 2 * PATIENCE_S
    while not condition():
        assert time.monotonic() < ends_at, "it did not come to that"
        time.sleep(0.02)


def lives(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.fixture
def start(settings: Settings) -> Iterator[Start]:
    """`start("--processes", "2")`: a parent over a database of its own, ended with the test."""
    environ = {k: v for k, v in os.environ.items() if not k.startswith("MAILGRPC_")} | {
        "MAILGRPC_DATABASE_URL": settings.database_url or "",
        "MAILGRPC_REDIS_URL": settings.redis_url or "",
        "MAILGRPC_CHANNEL_URL": "capture:",
        "MAILGRPC_GRACE_S": "5",
        "MAILGRPC_LISTEN": "127.0.0.1:0",
        "MAILGRPC_LOG_FORMAT": "text",
    }
    started: list[Parent] = []

    def begin(*flags: str, **changed: str) -> Parent:
        started.append(Parent(environ | changed, *flags))
        return started[-1]

    yield begin
    for parent in started:
        if parent.process.poll() is None:
            parent.end()


async def call_often(address: str, times: int = 24) -> None:
    """Enqueue, each over a connection of its own."""
    for _ in range(times):
        options = [("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.insecure_channel(address, options=options) as channel:
            stub = mail_service_pb2_grpc.MailServiceStub(channel)
            await stub.Enqueue(enqueue(), timeout=PATIENCE_S, wait_for_ready=True)


async def lanes_written(db: Database) -> set[int]:
    return {row["lane"] for row in await db.fetch("SELECT DISTINCT lane FROM events")}


async def test_connections_spread_over_the_processes_and_each_has_a_lane(
    start: Start, db: Database
) -> None:
    parent = start("--processes", "2")
    await call_often(await asyncio.to_thread(lambda: parent.address))
    assert len(await lanes_written(db)) == 2
    assert len(parent.children()) == 2
    assert await asyncio.to_thread(parent.end) == 0
    # One line for all of them.
    assert [line.strip() for line in parent.lines] == [
        f"serving on {parent.address} in 2 processes"
    ]


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="Linux alone has it")
async def test_siblings_give_way_to_whoever_has_the_processor(start: Start) -> None:
    parent = start("--processes", "2")
    await call_often(await asyncio.to_thread(lambda: parent.address), 1)
    for child in parent.children():
        threads = [int(path.name) for path in Path(f"/proc/{child}/task").iterdir()]
        assert {os.sched_getscheduler(thread) for thread in threads} == {os.SCHED_BATCH}
    assert os.sched_getscheduler(parent.process.pid) == os.SCHED_OTHER


async def test_the_setting_is_as_good_as_the_flag(start: Start) -> None:
    parent = start(MAILGRPC_PROCESSES="3")
    await asyncio.to_thread(lambda: parent.address)
    assert len(parent.children()) == 3


async def test_a_child_that_is_killed_is_survived_and_comes_back(start: Start) -> None:
    parent = start("--processes", "2")
    address = await asyncio.to_thread(lambda: parent.address)
    victim, survivor = parent.children()
    os.kill(victim, signal.SIGKILL)
    await asyncio.to_thread(parent.says, rf"({victim})\) ended by SIGKILL; starting another")
    await call_often(address, 4)
    successor = int(await asyncio.to_thread(parent.says, r"server process (\d+) serves"))
    assert set(parent.children()) == {survivor, successor}
    await call_often(address, 4)
    assert await asyncio.to_thread(parent.end, signal.SIGINT) == 0


def test_children_end_when_the_parent_is_killed(start: Start) -> None:
    parent = start("--processes", "2")
    assert parent.address
    children = parent.children()
    parent.end(signal.SIGKILL)
    until(lambda: not any(map(lives, children)))


def test_a_stop_while_it_starts_leaves_nothing(start: Start) -> None:
    parent = start("--processes", "2")
    until(lambda: bool(parent.children()))
    children = parent.children()
    assert parent.end() == 0
    assert not any(map(lives, children))


@pytest.mark.parametrize(("first", "second"), [("2", "2"), ("2", "1"), ("1", "2")])
def test_a_second_server_on_the_port_fails_with_a_clear_line(
    start: Start, first: str, second: str
) -> None:
    parent = start("--processes", first)
    address = parent.address
    other = start("--processes", second, "--listen", address)
    assert other.process.wait(PATIENCE_S) == 2
    other._reader.join(PATIENCE_S)
    line = other.lines[-1]  # gRPC says something of its own before
    assert f"cannot listen on {address}: the port is taken" in line
    assert "MAILGRPC_LISTEN chooses another" in line


def test_what_is_wrong_with_the_settings_is_said_once(start: Start) -> None:
    parent = start("--processes", "3", MAILGRPC_DATABASE_URL="postgresql://u@127.0.0.1:1/x")
    assert parent.process.wait(PATIENCE_S) == 1
    parent._reader.join(PATIENCE_S)
    [line] = parent.lines
    assert "MAILGRPC_DATABASE_URL" in line


def _listening(port: int, *, shared: bool) -> socket.socket:
    place = socket.socket()
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, int(shared))
    try:
        place.bind(("127.0.0.1", port))
        place.listen()
    except OSError:
        place.close()
        raise
    return place


def test_a_reserved_port_is_open_to_children_alone() -> None:
    with reserved(HostPort("127.0.0.1", 0)) as where:
        with pytest.raises(OSError, match="in use"):  # not even before a child listens
            _listening(where.port, shared=False)
        with _listening(where.port, shared=True), _listening(where.port, shared=True):
            pass


def test_a_port_is_reserved_once_also_while_nobody_listens() -> None:
    with reserved(HostPort("127.0.0.1", 0)) as where:
        pass
    with reserved(where), pytest.raises(SettingsError, match="taken"), reserved(where):
        pass
    with reserved(where):
        pass


def test_who_shares_a_port_without_us_holds_it_too() -> None:
    with _listening(0, shared=True) as place:
        where = HostPort("127.0.0.1", place.getsockname()[1])
        with pytest.raises(SettingsError, match="taken"), reserved(where):
            pass


def test_a_port_that_an_earlier_server_has_just_left_is_free() -> None:
    with _listening(0, shared=False) as place:
        port = place.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)), contextlib.closing(place.accept()[0]):
            pass  # the server's end closes first, and lingers in TIME_WAIT
    with reserved(HostPort("127.0.0.1", port)) as where, _listening(where.port, shared=True):
        pass


def test_a_name_of_which_this_machine_lacks_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `localhost` where there is no IPv6: gRPC listens on what there is."""
    found = [(socket.AF_INET, "192.0.2.1"), (socket.AF_INET, "127.0.0.1")]
    monkeypatch.setattr(server_port, "_addresses", lambda _listen: found)
    with reserved(HostPort("somewhere", 0)) as where, _listening(where.port, shared=True):
        pass


def test_an_address_that_is_not_ours() -> None:
    with pytest.raises(SettingsError, match="MAILGRPC_LISTEN"), reserved(HostPort("192.0.2.1", 1)):
        pass


@pytest.mark.parametrize("host", ["a" * 70, "x..y"])
def test_a_name_that_cannot_be_a_host_is_told(host: str) -> None:
    with pytest.raises(SettingsError, match="no host"), reserved(HostPort(host, 1)):
        pass

"""How gRPC wakes the event loop of a server. In a process of its own: gRPC's asyncio begins once."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest.mock import AsyncMock

import pytest

from mailgrpc.cli import serve

CALLS = 300
SCRIPT = f"""
import asyncio, grpc, uvloop
from mailgrpc.server import wakeups

taken = []
recv = wakeups.Reader.recv

def counted(self, size, flags=0):
    found = recv(self, size, flags)
    taken.append(len(found))
    return found

wakeups.Reader.recv = counted

async def answer(request, context):
    return request

async def main():
    with wakeups.gathered():
        server = grpc.aio.server()
        echo = grpc.unary_unary_rpc_method_handler(answer)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("t", {{"echo": echo}}),))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        with grpc.insecure_channel(f"127.0.0.1:{{port}}") as channel:
            # Sent from the loop itself, which so finds several events when it is woken.
            calls = [channel.unary_unary("/t/echo").future(b"%d" % n) for n in range({CALLS})]
            answers = await asyncio.to_thread(lambda: [call.result(10) for call in calls])
        await server.stop(None)
    assert answers == [b"%d" % n for n in range({CALLS})]
    print(len(taken), max(taken, default=0))

uvloop.run(main())
"""


@pytest.fixture(scope="module")
def wakings() -> tuple[int, int]:
    """How often the loop was woken for CALLS calls, and for how many events at once at the most."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], check=False, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    times, most = map(int, done.stdout.split())
    return times, most


def test_every_call_is_answered_and_the_loop_is_woken_for_several_events(
    wakings: tuple[int, int],
) -> None:
    times, most = wakings
    assert most > 1
    assert times < 4 * CALLS  # the events of so many calls


def test_serve_gathers_before_grpc_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    @contextlib.contextmanager
    def gathered() -> Iterator[None]:
        done.append("gathered")
        yield
        done.append("let go")

    class Server:
        def __init__(self, *_: Any) -> None:
            done.append("made")

        async def start(self) -> str:
            return "nowhere"

        async def stop(self) -> None:
            done.append("stopped")

    monkeypatch.setattr(serve.gc, "freeze", lambda: None)
    monkeypatch.setattr(serve, "notify_ready", lambda *_: None)
    monkeypatch.setattr("mailgrpc.server.wakeups.gathered", gathered)
    monkeypatch.setattr("mailgrpc.server.app.MailServer", Server)
    monkeypatch.setattr("mailgrpc.db.engine.Database", lambda *_, **__: AsyncMock())
    stop = asyncio.Event()
    stop.set()
    settings = SimpleNamespace(database_url="", database_pool=1, sibling=0, ready_fd=None)
    asyncio.run(serve._serve(settings, stop))
    assert done == ["gathered", "made", "stopped", "let go"]

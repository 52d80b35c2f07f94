"""The family is kept running, or ends with a reason; it ends in reverse order."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from mailgrpc.embedded import supervisor as supervisor_module
from mailgrpc.embedded.command import Command
from mailgrpc.embedded.process import inherited_environ
from mailgrpc.embedded.supervisor import STARTS_IN_A_ROW, Supervisor
from mailgrpc.errors import EmbeddedError

from .watching import is_alive, wait_until

READY = "echo ready it > /dev/fd/$MAILGRPC_READY_FD; "
LASTS = "while :; do sleep 0.02; done"


class Log:
    """What the supervisor and its servers said, in order."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, name: str, text: str) -> None:
        self.lines.append(f"{name}: {text}")

    async def wait_for(self, line: str) -> None:
        await asyncio.to_thread(wait_until, lambda: line in self.lines, what=line)


@pytest.fixture
def log() -> Log:
    return Log()


@pytest.fixture
async def supervisor(log: Log, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Supervisor]:
    monkeypatch.setattr(supervisor_module, "BACKOFF_S", (0.0, 0.01))
    supervisor = Supervisor(log.say)
    yield supervisor
    supervisor.hurry()
    await supervisor.stop()


Shell = Callable[[str, str], Command]


@pytest.fixture
def shell(log: Log) -> Shell:
    def command(name: str, script: str) -> Command:
        return Command(
            name,
            ["/bin/sh", "-c", script],
            inherited_environ(),
            grace_s=5.0,
            on_line=lambda line: log.say(name, line),
        )

    return command


async def test_who_dies_is_started_again(supervisor: Supervisor, log: Log, shell: Shell) -> None:
    server = shell("a", READY + LASTS)
    assert await supervisor.start(server) == ["it"]
    for _ in range(STARTS_IN_A_ROW + 2):  # deaths after a good start are not failed starts
        assert server.process is not None
        os.kill(server.process.pid, signal.SIGKILL)
        await log.wait_for("a: running again")
        log.lines.clear()
    assert server.process is not None
    assert is_alive(server.process.pid)


async def test_who_cannot_start_again_ends_the_family(
    supervisor: Supervisor, log: Log, shell: Shell, tmp_path: Path
) -> None:
    script = f"[ -e {tmp_path}/broken ] && {{ echo no luck; exit 3; }}; {READY}{LASTS}"
    server = shell("a", script)
    await supervisor.start(server)
    (tmp_path / "broken").touch()
    assert server.process is not None
    os.kill(server.process.pid, signal.SIGKILL)
    with pytest.raises(EmbeddedError, match=r"a did not start: it ended with exit code 3(.|\n)*no"):
        await asyncio.wait_for(supervisor.wait(), 10)
    assert log.lines.count("a: no luck") == STARTS_IN_A_ROW


async def test_a_first_start_that_fails_is_told_at_once(
    supervisor: Supervisor, log: Log, shell: Shell
) -> None:
    other = shell("b", READY + LASTS)
    with pytest.raises(EmbeddedError, match="a did not start: it ended with exit code 2"):
        await supervisor.start(shell("a", "echo no luck; exit 2"), other)
    await supervisor.stop()
    assert log.lines.count("a: no luck") == 1
    assert other.process is None or not is_alive(other.process.pid)


async def test_the_youngest_end_first(supervisor: Supervisor, log: Log, shell: Shell) -> None:
    says_bye = "trap 'echo bye; exit' TERM; " + READY + LASTS
    await supervisor.start(shell("a", says_bye))
    await supervisor.run(shell("step", "echo done"))
    await supervisor.start(shell("b", says_bye))
    await supervisor.stop()
    assert log.lines == ["step: done", "b: bye", "a: bye"]


async def test_a_failed_step_is_told(supervisor: Supervisor, shell: Shell) -> None:
    with pytest.raises(EmbeddedError, match="step failed: ended with exit code 1; its last lines"):
        await supervisor.run(shell("step", "echo the reason; exit 1"))


async def test_hurry_kills_who_does_not_listen(supervisor: Supervisor, shell: Shell) -> None:
    deaf = shell("a", "trap '' TERM; " + READY + LASTS)
    await supervisor.start(deaf)
    stopping = asyncio.create_task(supervisor.stop())
    done, _ = await asyncio.wait({stopping}, timeout=0.2)
    assert not done
    supervisor.hurry()
    await asyncio.wait_for(stopping, 3)
    assert deaf.process is not None
    assert not is_alive(deaf.process.pid)


async def test_a_stop_ends_a_start_under_way(
    supervisor: Supervisor, log: Log, shell: Shell
) -> None:
    never_ready = shell("a", "echo here; " + LASTS)
    starting = asyncio.create_task(supervisor.start(never_ready))
    await log.wait_for("a: here")
    await asyncio.wait_for(supervisor.stop(), 3)
    with pytest.raises(EmbeddedError):
        await starting
    assert never_ready.process is not None
    assert not is_alive(never_ready.process.pid)
    with pytest.raises(EmbeddedError, match="stopped"):
        await supervisor.start(never_ready)


async def test_a_child_that_never_says_ready_is_told(shell: Shell) -> None:
    with pytest.raises(EmbeddedError, match="a did not start: it ended with exit code 0"):
        await asyncio.to_thread(shell("a", "exit 0").start)

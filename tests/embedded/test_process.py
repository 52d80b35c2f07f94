"""Children are held by lifelines: how they end, and that nothing outlives its parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mailgrpc.embedded.process import Launch, Process, Slot, inherited_environ
from mailgrpc.errors import EmbeddedError

from .watching import is_alive, parent_of, wait_until

STUBBORN = "trap '' TERM INT; echo up; while :; do sleep 0.05; done"
"""A shell that only SIGKILL ends."""


def shell(script: str, **options: object) -> Launch:
    return Launch(
        name="shell",
        argv=["/bin/sh", "-c", script],
        environ=inherited_environ(),
        **options,  # type: ignore[arg-type]
    )


def test_the_exit_code_and_the_last_lines_are_told() -> None:
    heard: list[str] = []
    process = Process(shell("echo one; echo two >&2; exit 7"), heard.append)
    assert process.ended.wait(5)
    assert process.exit_code == 7
    assert heard == ["one", "two"]
    assert process.describe_end() == "ended with exit code 7; its last lines:\n    one\n    two"


def test_a_signal_is_told_by_its_name() -> None:
    process = Process(shell("kill -SEGV $$"))
    assert process.ended.wait(5)
    assert process.how_it_ended() == "ended by SIGSEGV"


def test_what_cannot_be_run_is_told() -> None:
    process = Process(Launch(name="x", argv=["/nonexistent/x"], environ={}))
    assert process.ended.wait(5)
    assert "cannot run /nonexistent/x: No such file or directory" in process.describe_end()


def test_stop_kills_who_does_not_listen() -> None:
    heard: list[str] = []
    process = Process(shell(STUBBORN), heard.append)
    wait_until(lambda: heard)
    process.stop(signal.SIGTERM, 0.1)
    assert process.how_it_ended() == "ended by SIGKILL"
    assert not is_alive(process.pid)


def test_kill_also_ends_what_the_child_had_started() -> None:
    heard: list[str] = []
    process = Process(shell("sleep 1000 & echo $!; wait"), heard.append)
    wait_until(lambda: heard)
    process.send(signal.SIGKILL)
    assert process.ended.wait(5)
    wait_until(lambda: not is_alive(int(heard[0])))


def test_a_killed_lifeline_takes_its_child_along() -> None:
    heard: list[str] = []
    process = Process(shell(STUBBORN), heard.append)
    wait_until(lambda: heard)
    lifeline = parent_of(process.pid)
    os.kill(lifeline, signal.SIGKILL)
    assert process.ended.wait(5)
    wait_until(lambda: not is_alive(process.pid))


def test_signals_to_the_whole_family_do_not_end_the_lifeline() -> None:
    heard: list[str] = []
    process = Process(
        shell("trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.05; done"), heard.append
    )
    wait_until(lambda: heard)
    lifeline = parent_of(process.pid)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(lifeline, number)
    assert not process.ended.wait(0.1)
    process.stop(signal.SIGTERM, 5.0)
    assert (process.exit_code, heard) == (3, ["up", "bye"])


def test_a_killed_parent_leaves_no_child_and_no_directory(place: Path) -> None:
    private = place / "private"
    private.mkdir()
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"""
import signal, threading
from pathlib import Path
from mailgrpc.embedded.process import Launch, Process, inherited_environ
process = Process(Launch(name="x", argv=["/bin/sh", "-c", {STUBBORN!r}],
    environ=inherited_environ(), remove=Path({str(private)!r}),
    orphan_plan=((signal.SIGTERM, 0.2), (signal.SIGINT, 0.2))))
print(process.pid, flush=True)
threading.Event().wait()
""",
        ],
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    with parent.stdout:
        child = int(parent.stdout.readline())
    assert is_alive(child)
    parent.kill()
    parent.wait()
    wait_until(lambda: not is_alive(child), 5)
    wait_until(lambda: not private.exists(), 5)


def test_a_closed_slot_starts_nothing() -> None:
    slot = Slot()
    slot.open()
    slot.close(signal.SIGTERM, 1)
    with pytest.raises(EmbeddedError, match="stopped before it was ready"):
        slot.launch(shell("exit 0"))


def test_a_slot_holds_one_process_at_a_time() -> None:
    slot = Slot()
    slot.open()
    slot.launch(shell("sleep 1000"))
    with pytest.raises(EmbeddedError, match="running already"):
        slot.open()
    slot.close(signal.SIGTERM, 5)

"""Programs are started with guards taken out only where that was asked for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.faults.entry import PATCHES

SHOW_GUARD = (
    "from tests.faults import entry; from mailgrpc.worker import sweep;"
    " before = sweep.Reaper.forget; entry.PATCHES['reap-without-looking']();"
    " print(before is sweep.Reaper.forget)"
)


def started(*arguments: str, patch: str = "") -> subprocess.CompletedProcess[str]:
    environ = {k: v for k, v in os.environ.items() if not k.startswith("MAILGRPC_")}
    return subprocess.run(
        [sys.executable, *arguments],
        env=environ | {"FAULTS_PATCH": patch},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_entry_runs_the_command_itself() -> None:
    done = started("-m", "tests.faults.entry", "work", "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Usage: mailgrpc work")


def test_a_patch_takes_a_guard_out() -> None:
    assert started("-c", SHOW_GUARD).stdout.strip() == "False"


@pytest.mark.parametrize("name", [*PATCHES, "lossy reap-without-looking"])
def test_a_patched_program_still_starts(name: str) -> None:
    done = started("-m", "tests.faults.entry", "--version", patch=name)
    assert done.returncode == 0, done.stderr


def test_a_patch_that_is_not_there_stops_the_program() -> None:
    assert started("-m", "tests.faults.entry", "--version", patch="no-such").returncode != 0

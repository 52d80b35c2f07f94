"""A program that is told to stop and hangs: it says where, and ends."""

from __future__ import annotations

import subprocess
import sys

_HANGS = """
import asyncio, os, signal
from mailgrpc.cli.process import run_until_stopped

async def stuck():
    while True:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            pass  # as no code of ours should

async def main(stop):
    os.kill(os.getpid(), signal.SIGTERM)
    await stop.wait()
    await stuck()

import mailgrpc.cli.process as process
process.OVERTIME_S = 0.1
run_until_stopped(main, 0.1)
"""


def test_a_stop_that_hangs_says_where_and_ends() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _HANGS], check=False, capture_output=True, text=True, timeout=30
    )
    assert ended.returncode == 1
    assert "told to stop, and still not over" in ended.stderr
    assert "> stuck (" in ended.stderr

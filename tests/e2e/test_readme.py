"""What the README prints works, and what it explains is complete."""

from __future__ import annotations

import asyncio
import re
import shutil
import sys
from pathlib import Path

import pytest

from mailgrpc.errors import Reason
from tests.gateway import Gateway

README = (Path(__file__).parents[2] / "README.md").read_text()
GRPCURL_PART = README[README.index("## The same by grpcurl") : README.index("## Watch")]
BLOCKS = re.findall(r"```\n(.*?)```", GRPCURL_PART, re.DOTALL)


@pytest.mark.parametrize("reason", [r for r in Reason if r is not Reason.UNSPECIFIED])
def test_each_reason_has_an_anchor_and_its_status(reason: Reason) -> None:
    from mailgrpc.server.interceptors import status_of

    anchor = reason.name.lower().replace("_", "-")
    assert f'<a id="{anchor}"></a>{reason.name} | {status_of(reason).name} |' in README


@pytest.mark.skipif(shutil.which("grpcurl") is None, reason="grpcurl is not installed")
async def test_the_grpcurl_commands_work_as_printed(gateway: Gateway) -> None:
    commands = BLOCKS[0].replace("127.0.0.1:50051", gateway.target)
    _, output = await _bash("set -uo pipefail\n" + commands.replace("-max-time 3", "-max-time 1"))
    # The stream ends by its own time-out; nothing else fails.
    assert output.count("ERROR:") == output.count("Code: DeadlineExceeded") == 1, output
    for expected in (
        "DELIVERY_STATE_QUEUED",
        "ERROR_REASON_INVALID_ADDRESS",
        '"rfcMessageId"',
        '"blockedCategories"',
        '"events"',
        '"clearedCount"',
    ):
        assert expected in output, f"{expected} is not in:\n{output}"


@pytest.mark.skipif(shutil.which("grpcurl") is None, reason="grpcurl is not installed")
async def test_an_error_prints_its_details(gateway: Gateway) -> None:
    first = BLOCKS[0].splitlines()[0].replace("127.0.0.1:50051", gateway.target)
    shown = BLOCKS[1]
    command = shown[shown.index("call") : shown.index("ERROR:")]
    _, output = await _bash(f"{first}\n{command}")
    assert "DUPLICATE_RECIPIENT" in output
    assert "message.to[1].address" in output
    assert re.search(r"Message: (.*)", shown)[1] in output


async def test_the_python_example_runs_as_printed(gateway: Gateway) -> None:
    part = README[README.index("## From Python") :]
    [example] = re.findall(r"```python\n(.*?)```", part, re.DOTALL)[:1]
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        example.replace("127.0.0.1:50051", gateway.target),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    output, _ = await asyncio.wait_for(process.communicate(), 30)
    assert process.returncode == 0, output.decode()
    assert output.decode().count("DELIVERY_STATE_SENT") == 2


async def _bash(script: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        "bash", "-c", script, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    return process.returncode or 0, output.decode()

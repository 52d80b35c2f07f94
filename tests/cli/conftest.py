"""The command against the real gateway of `mailgrpc.testing`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mailgrpc.cli.main import root

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def mailgrpc_options() -> dict[str, Any]:
    return {"categories": {"receipts": 1, "newsletter": 2}}


@pytest.fixture
def run(mailgrpc_target: str, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("status", "msg_…")`: the command in this process, its streams caught."""
    monkeypatch.setenv("MAILGRPC_TARGET", mailgrpc_target)

    def invoke(*arguments: str, stdin: str | None = None) -> Result:
        return CliRunner().invoke(root, arguments, input=stdin, prog_name="mailgrpc")

    return invoke


@pytest.fixture
def send(run: Run) -> Callable[..., str]:
    """Send a mail and wait for its end; its id."""

    def invoke(*arguments: str, to: str = "ada@example.org") -> str:
        needed = ("--from", "shop@example.org", "--to", to, "--subject", "Hi", "--text", "x")
        return run("send", *needed, "--wait", *arguments).stdout.strip()

    return invoke

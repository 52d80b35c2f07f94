"""How often long-running commands have Python look for cycles."""

from __future__ import annotations

from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from mailgrpc.cli import process, serve, work


@pytest.mark.parametrize(
    ("command", "collect_after"),
    [
        pytest.param(serve, process.COLLECT_AFTER_CALLS, id="serve: each call leaves a cycle"),
        pytest.param(work, process.COLLECT_AFTER, id="work: there are none"),
    ],
)
def test_what_answers_calls_frees_cycles_a_few_at_a_time(
    monkeypatch: pytest.MonkeyPatch, command: ModuleType, collect_after: int
) -> None:
    thresholds: list[Any] = []
    monkeypatch.setattr(
        command, "load", lambda **_: SimpleNamespace(sibling=None, processes=1, grace_s=1.0)
    )
    monkeypatch.setattr(process.gc, "freeze", lambda: None)
    monkeypatch.setattr(process.gc, "set_threshold", lambda *given: thresholds.append(given[0]))
    monkeypatch.setattr(process, "_give_memory_back", lambda: None)
    monkeypatch.setattr(process.uvloop, "run", lambda main: main.close())
    name = command.__name__.rpartition(".")[2]
    assert CliRunner().invoke(getattr(command, name), []).exit_code == 0
    assert thresholds == [collect_after]

"""Together: what is worked through in one go, and when."""

from __future__ import annotations

import asyncio

import pytest

from mailgrpc.server import together as together_module
from mailgrpc.server.together import FULL, Together


async def some_turns(turns: int) -> None:
    for _ in range(turns):
        await asyncio.sleep(0)


async def test_what_comes_in_the_same_turns_is_worked_through_together_and_in_order() -> None:
    worked: list[list[int]] = []
    together = Together(worked.append)
    for n in range(5):
        together.add(n)
        await asyncio.sleep(0)
    await some_turns(50)
    assert worked == [[0, 1, 2, 3, 4]]


async def test_who_comes_alone_waits_for_some_turns_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together_module, "_IDLE_S", 1.0)
    worked: list[list[int]] = []
    Together(worked.append).add(1)
    await some_turns(20)
    assert worked == [[1]]


@pytest.mark.parametrize(("idle_s", "expected"), [(0.0, [[1, 2]]), (1.0, [[1], [2]])])
async def test_turns_with_other_work_are_waited_through(
    monkeypatch: pytest.MonkeyPatch, idle_s: float, expected: list[list[int]]
) -> None:
    monkeypatch.setattr(together_module, "_IDLE_S", idle_s)
    worked: list[list[int]] = []
    together = Together(worked.append)
    together.add(1)
    await some_turns(25)
    together.add(2)
    await some_turns(100)
    assert worked == expected


async def test_other_work_without_end_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(together_module, "_IDLE_S", 0.0)
    worked: list[list[int]] = []
    Together(worked.append).add(1)
    await some_turns(50)
    assert worked == [[1]]


async def test_those_who_keep_coming_do_not_hold_up_the_first() -> None:
    worked: list[list[int]] = []
    together = Together(worked.append)
    for n in range(3 * FULL):
        together.add(n)
        await asyncio.sleep(0)
    await some_turns(50)
    assert [n for items in worked for n in items] == list(range(3 * FULL))
    assert len(worked) >= 3


async def test_what_is_added_by_the_work_itself_is_not_left() -> None:
    worked: list[list[int]] = []

    def work(items: list[int]) -> None:
        worked.append(items)
        if items[0] < 3:
            together.add(items[0] + 1)

    together = Together(work)
    together.add(1)
    await some_turns(100)
    assert worked == [[1], [2], [3]]

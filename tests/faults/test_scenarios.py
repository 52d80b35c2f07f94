"""Scenarios that are quick enough for every run; `make faults` plays all of them."""

from __future__ import annotations

import pytest

from tests.faults.scenarios import (
    Scenario,
    a_late_result_leaves_the_running_attempt_alone,
    few_in_doubt_when_a_worker_is_killed,
    play,
    what_was_written_down_survives_the_worker,
)


@pytest.mark.parametrize(
    "scenario",
    [
        few_in_doubt_when_a_worker_is_killed,
        what_was_written_down_survives_the_worker,
        a_late_result_leaves_the_running_attempt_alone,
    ],
)
async def test_scenario(scenario: Scenario) -> None:
    await play(scenario)

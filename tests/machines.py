"""How far a stateful test goes: a moderate, repeatable way in each run, far when asked.

`pytest tests/worker/test_machine.py --hypothesis-profile=long` explores anew each time, for long.
"""

from __future__ import annotations

from hypothesis import HealthCheck, Phase, settings

_SLOW_IS_FINE = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


def register_profiles() -> None:
    """Make the long way known to pytest's option."""
    settings.register_profile(
        "long",
        max_examples=1000,
        stateful_step_count=80,
        deadline=None,
        suppress_health_check=_SLOW_IS_FINE,
        print_blob=True,
    )


def steps(max_examples: int, stateful_step_count: int) -> settings:
    """The settings of a machine: these figures, or those of the profile that was asked for."""
    if settings.get_current_profile_name() == "long":
        return settings()
    return settings(
        max_examples=max_examples,
        stateful_step_count=stateful_step_count,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=_SLOW_IS_FINE,
    )

"""When a call is tried again, as a table."""

from __future__ import annotations

from random import Random

import grpc
import pytest

from mailgrpc.client import CallPolicy
from mailgrpc.client.errors import error_of

POLICY = CallPolicy()
CODE = grpc.StatusCode


def wait(
    code: grpc.StatusCode, tries: int = 1, left_s: float = 60.0, **more: object
) -> float | None:
    error = error_of(code)(code, "text", **more)  # type: ignore[arg-type]
    return POLICY.wait_before_retry(error, tries, left_s, Random(1))


@pytest.mark.parametrize("code", list(CODE))
def test_only_what_another_try_can_mend_is_tried_again(code: grpc.StatusCode) -> None:
    again = code in (CODE.UNAVAILABLE, CODE.DEADLINE_EXCEEDED)
    assert (wait(code) is not None) == again


def test_what_is_exhausted_is_tried_again_when_the_server_says_when() -> None:
    assert wait(CODE.RESOURCE_EXHAUSTED) is None
    assert wait(CODE.RESOURCE_EXHAUSTED, retry_after_s=2.0) == pytest.approx(2.2, rel=0.1)


def test_waits_double_up_to_the_longest() -> None:
    waits = [wait(CODE.UNAVAILABLE, tries) for tries in range(1, 12)]
    for tries, seconds in enumerate(waits):
        bound = min(POLICY.first_wait_s * 2**tries, POLICY.longest_wait_s)
        assert seconds is not None
        assert bound / 2 <= seconds <= bound


def test_many_thousand_failures_do_not_overflow() -> None:
    assert wait(CODE.UNAVAILABLE, 1_000_000) is not None


def test_a_wait_that_the_time_does_not_allow_is_not_begun() -> None:
    assert wait(CODE.UNAVAILABLE, left_s=0.01) is None


def test_what_no_server_looked_at_is_tried_again_and_what_the_caller_cancelled_is_not() -> None:
    turned_away = error_of(CODE.CANCELLED)(CODE.CANCELLED, "CANCELLED")
    cancelled_here = error_of(CODE.CANCELLED)(CODE.CANCELLED, "Channel closed!")
    assert POLICY.wait_before_retry(turned_away, 1, 60, Random(1)) is not None
    assert POLICY.wait_before_retry(cancelled_here, 1, 60, Random(1)) is None


@pytest.mark.parametrize("code", [CODE.INTERNAL, CODE.UNKNOWN, CODE.CANCELLED])
def test_a_stream_is_resumed_after_what_did_not_come_from_the_server(code: grpc.StatusCode) -> None:
    from_proxy = error_of(code)(code, "RST_STREAM")
    from_server = error_of(code)(code, "internal error 1", reason="INTERNAL")
    assert POLICY.wait_before_resume(from_proxy, 1, Random(1)) is not None
    assert POLICY.wait_before_resume(from_server, 1, Random(1)) is None
    assert POLICY.wait_before_retry(from_proxy, 1, 60, Random(1)) is None

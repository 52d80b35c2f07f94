"""What every provider owes (`providers/provider.py`), asked of each of them alike.

Every result of every test here is held to what a result may say at all: see `held`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import pytest_asyncio

from mailgrpc.core.delivery import Cause, Outcome, Result
from mailgrpc.core.message import Header
from mailgrpc.providers.provider import ProbeFailed, Provider, SendCall

from .calls import call_of, call_to, message
from .rigs import Rig, open_rig

ANN, BOB, CAT = "ann@example.org", "bob@example.org", "cat@example.org"


@pytest_asyncio.fixture(params=["smtp", "smtp-stepwise", "sendgrid", "capture"])
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    async with open_rig(request.param) as rig:
        rig.provider.send = held(rig.provider)  # type: ignore[method-assign]
        yield rig


def held(provider: Provider) -> Callable[[SendCall], Awaitable[list[Result]]]:
    """`send`, with what must hold for each result, whatever it is about."""
    send = provider.send

    async def send_and_hold(call: SendCall) -> list[Result]:
        results = await send(call)
        assert len(results) == len(call.addressees)
        for result in results:
            assert (result.outcome is Outcome.ACCEPTED) == (result.cause is Cause.UNSPECIFIED)
            # What stops a channel is tried again without using up an attempt: only ever by proof.
            assert not result.of_channel or result.outcome is Outcome.DEFERRED
        return results

    return send_and_hold


async def test_a_mail_is_accepted_and_the_peer_has_it(rig: Rig) -> None:
    call = call_to(ANN)
    [result] = await rig.provider.send(call)
    assert (result.outcome, result.cause) == (Outcome.ACCEPTED, Cause.UNSPECIFIED)
    assert result.provider_message_id
    [mail] = rig.received()
    assert mail.recipients == (ANN,)
    assert mail.message_id == call.rfc_message_id


async def test_one_call_carries_a_group_and_answers_in_its_order(rig: Rig) -> None:
    results = await rig.provider.send(call_to(ANN, BOB, CAT))
    assert [r.outcome for r in results] == [Outcome.ACCEPTED] * 3
    assert [m.recipients for m in rig.received()] == [(ANN, BOB, CAT)]


async def test_one_refused_recipient_does_not_refuse_the_others(rig: Rig) -> None:
    results = await rig.provider.send(call_to(ANN, rig.refused, CAT))
    assert [r.outcome for r in results] == [
        Outcome.ACCEPTED,
        Outcome.REJECTED,
        Outcome.ACCEPTED,
    ]
    assert results[1].cause is Cause.BAD_ADDRESS
    assert sorted(a for m in rig.received() for a in m.recipients) == [ANN, CAT]


async def test_all_refused_sends_nothing(rig: Rig) -> None:
    results = await rig.provider.send(call_to(rig.refused))
    assert [r.outcome for r in results] == [Outcome.REJECTED]
    assert rig.received() == []


async def test_a_refusal_leaves_the_provider_fit_for_the_next_call(rig: Rig) -> None:
    await rig.provider.send(call_to(rig.refused))
    [result] = await rig.provider.send(call_to(ANN))
    assert result.outcome is Outcome.ACCEPTED


async def test_a_temporary_refusal_is_deferred(rig: Rig) -> None:
    [result] = await rig.provider.send(call_to(rig.later))
    assert (result.outcome, result.cause) == (Outcome.DEFERRED, Cause.RATE_LIMITED)
    assert rig.received() == []


async def test_no_answer_after_the_last_byte_is_unknown(rig: Rig) -> None:
    [result] = await rig.provider.send(call_to(rig.silent))
    assert (result.outcome, result.cause) == (Outcome.UNKNOWN, Cause.TIMEOUT)
    assert len(rig.received()) == 1


async def test_a_connection_lost_after_the_last_byte_is_unknown(rig: Rig) -> None:
    [result] = await rig.provider.send(call_to(rig.drop))
    assert (result.outcome, result.cause) == (Outcome.UNKNOWN, Cause.CONNECTION)
    assert len(rig.received()) == 1


async def test_a_refused_connection_is_deferred(rig: Rig) -> None:
    if not rig.has_network:
        pytest.skip("connects to nothing")
    await rig.vanish()
    results = await rig.provider.send(call_to(ANN, BOB))
    assert [(r.outcome, r.cause) for r in results] == [(Outcome.DEFERRED, Cause.CONNECTION)] * 2
    assert all(r.of_channel for r in results)


async def test_refused_credentials_are_of_the_channel_as_a_whole(rig: Rig) -> None:
    if not rig.has_network:
        pytest.skip("has no credentials")
    rig.lock_out()
    results = await rig.provider.send(call_to(ANN, BOB))
    assert [(r.outcome, r.cause) for r in results] == [(Outcome.DEFERRED, Cause.CREDENTIALS)] * 2
    assert all(r.of_channel for r in results)


async def test_a_busy_peer_is_of_the_channel_as_a_whole(rig: Rig) -> None:
    if not rig.has_network:
        pytest.skip("is never busy")
    rig.be_busy()
    results = await rig.provider.send(call_to(ANN, BOB))
    assert [(r.outcome, r.cause) for r in results] == [(Outcome.DEFERRED, Cause.RATE_LIMITED)] * 2
    assert all(r.of_channel for r in results)
    assert rig.received() == []


async def test_what_may_be_about_one_mail_or_recipient_is_never_of_the_channel(rig: Rig) -> None:
    hostile = message(ANN, headers=(Header("X-Note", "a\r\nBcc: eve@example.org"),))
    for call in (
        call_to(rig.refused),
        call_to(ANN, rig.refused),
        call_to(rig.silent),
        call_to(rig.drop),
        call_to(ANN, last_look=lambda: False),
        call_of(hostile),
    ):
        assert not any(r.of_channel for r in await rig.provider.send(call))


async def test_a_last_look_that_says_no_sends_nothing(rig: Rig) -> None:
    results = await rig.provider.send(call_to(ANN, BOB, last_look=lambda: False))
    assert [(r.outcome, r.cause) for r in results] == [(Outcome.DEFERRED, Cause.WORKER_LOST)] * 2
    assert rig.received() == []
    [result] = await rig.provider.send(call_to(ANN))
    assert result.outcome is Outcome.ACCEPTED
    assert len(rig.received()) == 1


async def test_the_last_look_comes_before_the_peer_has_the_mail(rig: Rig) -> None:
    seen: list[int] = []

    def look() -> bool:
        seen.append(len(rig.received()))
        return True

    await rig.provider.send(call_to(ANN, last_look=look))
    assert seen == [0]


async def test_a_message_that_breaks_the_form_is_rejected_and_not_raised(rig: Rig) -> None:
    hostile = message(ANN, headers=(Header("X-Note", "a\r\nBcc: eve@example.org"),))
    [result] = await rig.provider.send(call_of(hostile))
    assert (result.outcome, result.cause) == (Outcome.REJECTED, Cause.CONTENT)
    assert rig.received() == []


async def test_a_cancelled_call_leaves_no_connection_behind(rig: Rig) -> None:
    if not rig.has_network:
        pytest.skip("has no connections")
    task = asyncio.create_task(rig.provider.send(call_to(rig.silent)))
    while not rig.received():
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert rig.idle_connections() == 0
    [result] = await rig.provider.send(call_to(ANN))
    assert result.outcome is Outcome.ACCEPTED


async def test_the_message_id_is_the_same_in_every_attempt(rig: Rig) -> None:
    call = call_to(ANN)
    await rig.provider.send(call)
    await rig.provider.send(call)
    assert [m.message_id for m in rig.received()] == [call.rfc_message_id] * 2


async def test_calls_run_side_by_side(rig: Rig) -> None:
    calls = [call_to(f"user{n}@example.org") for n in range(8)]
    results = await asyncio.gather(*map(rig.provider.send, calls))
    assert {r.outcome for [r] in results} == {Outcome.ACCEPTED}
    assert len(rig.received()) == 8


async def test_probe_says_in_a_line_that_the_channel_works(rig: Rig) -> None:
    line = await rig.provider.probe()
    assert line
    assert "\n" not in line
    assert rig.received() == []


async def test_probe_says_why_the_channel_does_not_work(rig: Rig) -> None:
    if not rig.has_network:
        pytest.skip("connects to nothing")
    await rig.vanish()
    with pytest.raises(ProbeFailed, match="CONNECTION"):
        await rig.provider.probe()


async def test_close_can_be_called_twice(rig: Rig) -> None:
    await rig.provider.send(call_to(ANN))
    await rig.provider.close()
    await rig.provider.close()
    assert rig.idle_connections() == 0


async def test_check_finds_nothing_wrong_with_a_plain_message(rig: Rig) -> None:
    assert rig.provider.check(message(ANN)) == []

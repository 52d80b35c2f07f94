"""The capture provider: the outbox, and recipients that misbehave on purpose."""

from __future__ import annotations

from mailgrpc.core.delivery import Outcome
from mailgrpc.core.mime import render
from mailgrpc.providers.capture import CaptureProvider

from .calls import call_to


async def test_the_outbox_holds_the_mail_as_it_would_leave() -> None:
    provider = CaptureProvider()
    call = call_to("ann@example.org", "permerror@example.test")
    results = await provider.send(call)
    [kept] = provider.outbox
    assert kept.call is call
    assert kept.raw == render(
        call.message, rfc_message_id=call.rfc_message_id, date=call.created_at
    )
    assert [r.address for r in kept.recipients] == ["ann@example.org"]
    assert list(kept.results) == results


async def test_temperror_recovers_after_so_many_tries_of_each_delivery() -> None:
    provider = CaptureProvider()
    first, second = call_to("temperror+2@example.test"), call_to("temperror+2@example.test")
    outcomes = [(await provider.send(first))[0].outcome for _ in range(3)]
    assert outcomes == [Outcome.DEFERRED, Outcome.DEFERRED, Outcome.ACCEPTED]
    assert (await provider.send(second))[0].outcome is Outcome.DEFERRED


async def test_the_outbox_is_bounded() -> None:
    provider = CaptureProvider(keep=3)
    calls = [call_to("ann@example.org") for _ in range(5)]
    for call in calls:
        await provider.send(call)
    assert [kept.call for kept in provider.outbox] == calls[-3:]

"""SMTP: a mail whose envelope went out behind the dot of another.

Whatever becomes of one of the two, the other comes to what it would have come to alone: it is taken
once, and a failure is charged to the mail that it is about.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from mailgrpc.core.message import Attachment, MailMessage, Recipient
from mailgrpc.providers import smtp as smtp_module
from mailgrpc.providers.provider import SendCall
from mailgrpc.providers.smtp import SmtpProvider

from .calls import call_of, call_to, message
from .phases import ANN, BOB, LONG_S, SHORT_S, send, told
from .smtp_peer import CLOSE, RESET, STALL, SmtpPeer, then
from .test_phases import DOT, GARBAGE, LATER, LEAVING, NEVER, smtp

FIRST, EVE = "first@example.org", "eve@example.org"
ACCEPTED = "ACCEPTED UNSPECIFIED"
FINE = {"MAIL": "250 2.1.0 ok", "RCPT": "250 2.1.5 ok", "DATA": "354 go on", "DOT": "250 2.0.0 ok"}


async def warm(provider: SmtpProvider, peer: SmtpPeer) -> None:
    """Send the first mail of a connection, which tells how quickly the server answers."""
    script, peer.script = peer.script, {}
    assert await send(provider, call_to(FIRST)) == ACCEPTED
    peer.script = script


def begun_behind(call: SendCall, following: SendCall) -> tuple[SendCall, list[SendCall]]:
    """The call, with `following` waiting behind it; and what of that was asked for."""
    asked: list[SendCall] = []

    def follow() -> SendCall:
        asked.append(following)
        return following

    return replace(call, following=follow), asked


def taken(peer: SmtpPeer) -> list[list[str]]:
    """Who got mail after the first, in order."""
    return [mail.recipients for mail in peer.taken[1:]]


async def test_the_envelope_goes_out_behind_the_dot() -> None:
    async with smtp(peer := SmtpPeer()) as provider:
        await warm(provider, peer)
        ann, bob = call_to(ANN), call_to(BOB, EVE)
        ann, asked = begun_behind(ann, bob)
        assert await send(provider, ann) == ACCEPTED
        assert asked == [bob]
        async with asyncio.timeout(LONG_S):  # without another word of ours
            while peer.commands[-1] != "DATA" or peer.commands[-3] != f"RCPT TO:<{BOB}>":
                await asyncio.sleep(0.001)
        assert taken(peer) == [[ANN]]
        assert await send(provider, bob) == ACCEPTED
        assert taken(peer) == [[ANN], [BOB, EVE]]
        assert bob.rfc_message_id.encode() in peer.taken[-1].content
        assert await send(provider, call_to(EVE)) == ACCEPTED
    assert peer.connections == 1


async def test_a_line_of_mails_goes_over_one_connection() -> None:
    async with smtp(peer := SmtpPeer()) as provider:
        await warm(provider, peer)
        calls = [call_to(f"a{n}@example.org") for n in range(20)]
        line = [replace(c, following=lambda n=n: calls[n + 1]) for n, c in enumerate(calls[:-1])]
        for call in [*line, calls[-1]]:
            assert await send(provider, call) == ACCEPTED
    assert taken(peer) == [[f"a{n}@example.org"] for n in range(20)]
    assert peer.connections == 1
    assert [m.content.count(b"Message-ID") for m in peer.taken] == [1] * 21


HALF = "250-2.0.0 half of"


@pytest.mark.parametrize(("phase", "way", "expected"), [d for d in DOT if d[1] != HALF])
async def test_whatever_comes_of_the_one_before(phase: str, way: str, expected: str) -> None:
    timeout_s = SHORT_S if "TIMEOUT" in expected else LONG_S
    peer = SmtpPeer(script={phase: [way]})
    async with smtp(peer, timeout_s=timeout_s) as provider:
        await warm(provider, peer)
        bob = call_to(BOB)
        ann, asked = begun_behind(call_to(ANN), bob)
        assert await send(provider, ann) == expected
        assert asked == [bob]
        assert await send(provider, bob) == ACCEPTED
        assert taken(peer).count([BOB]) == 1
        assert await send(provider, call_to(EVE)) == ACCEPTED


async def test_half_an_answer_is_ended_by_the_next_one() -> None:
    """The server said yes and went on: taken. It is out of step, and is given nothing more."""
    async with smtp(peer := SmtpPeer(script={"DOT": [HALF]})) as provider:
        await warm(provider, peer)
        bob = call_to(BOB)
        ann, _ = begun_behind(call_to(ANN), bob)
        assert await send(provider, ann) == ACCEPTED
        assert await send(provider, bob) == "DEFERRED PROVIDER"
        assert taken(peer) == [[ANN]]


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ({"MAIL": [NEVER]}, [ACCEPTED, ACCEPTED]),  # asked again by itself
        ({"MAIL": [GARBAGE]}, [ACCEPTED, ACCEPTED]),
        ({"MAIL": [CLOSE]}, [ACCEPTED, ACCEPTED]),
        ({"MAIL": [RESET]}, [ACCEPTED, ACCEPTED]),
        ({"MAIL": [LEAVING]}, [ACCEPTED, ACCEPTED]),
        ({"MAIL": [NEVER, NEVER]}, ["REJECTED PROVIDER"] * 2),
        ({"MAIL": [STALL]}, ["DEFERRED TIMEOUT"] * 2),
        ({f"RCPT {BOB}": NEVER}, ["REJECTED PROVIDER", ACCEPTED]),
        ({"RCPT": [LATER, LATER]}, ["DEFERRED PROVIDER"] * 2),
        ({"RCPT": [LEAVING]}, ["DEFERRED PROVIDER"] * 2),
        ({"RCPT": [CLOSE]}, ["DEFERRED CONNECTION"] * 2),
        ({"DATA": [NEVER]}, ["REJECTED PROVIDER"] * 2),
        ({"DATA": [RESET]}, ["DEFERRED CONNECTION"] * 2),
        ({"DOT": [NEVER]}, ["REJECTED PROVIDER"] * 2),
        ({"DOT": [CLOSE]}, ["UNKNOWN CONNECTION"] * 2),
        ({"DOT": [STALL]}, ["UNKNOWN TIMEOUT"] * 2),
        ({"DOT": [then("250 2.0.0 ok", RESET)]}, [ACCEPTED, ACCEPTED]),
    ],
)
async def test_what_comes_of_the_one_begun(
    script: dict[str, str | list[str]], expected: Sequence[str]
) -> None:
    timeout_s = SHORT_S if "TIMEOUT" in expected[0] else LONG_S
    async with smtp(peer := SmtpPeer(), timeout_s=timeout_s) as provider:
        await warm(provider, peer)
        # The first of each list is for the mail before.
        peer.script = {
            step: [FINE[step], *way] if isinstance(way, list) else way
            for step, way in script.items()
        }
        bob = call_to(BOB, EVE)
        ann, _ = begun_behind(call_to(ANN), bob)
        assert await send(provider, ann) == ACCEPTED
        results = await provider.send(bob)
        assert [told(r) for r in results] == expected
        assert not any(result.of_channel for result in results)
        assert taken(peer).count([BOB, EVE]) == (
            expected == [ACCEPTED] * 2 or "UNKNOWN" in expected[0]
        )
        peer.script = {}
        assert await send(provider, call_to(FIRST)) == ACCEPTED


async def test_a_server_that_reads_the_content_as_commands_spoils_no_other_mail() -> None:
    """It refuses before it has read, and then answers line by line what it takes for commands."""
    async with smtp(peer := SmtpPeer()) as provider:
        await warm(provider, peer)
        bob = call_to(BOB)
        peer.early = NEVER
        peer.script = {"DOT": "500 5.5.2 what?\r\n500 5.5.2 what?\r\n500 5.5.2 what?"}
        ann, _ = begun_behind(call_to(ANN), bob)
        assert await send(provider, ann) == "REJECTED PROVIDER"
        peer.early, peer.script = "", {}
        assert await send(provider, bob) == ACCEPTED


async def is_begun(provider: SmtpProvider, call: SendCall) -> bool:
    """Whether a mail is begun behind this one."""
    following = call_to(BOB)
    call, _ = begun_behind(call, following)
    await provider.send(call)
    begun = provider._begun.get(following.call_id)
    was_begun = begun is not None and begun.is_ready
    assert await send(provider, following) == ACCEPTED
    return was_begun


async def test_not_behind_the_first_mail_of_a_connection() -> None:
    async with smtp(SmtpPeer()) as provider:
        assert not await is_begun(provider, call_to(ANN))
        assert await is_begun(provider, call_to(ANN))


async def test_not_where_the_server_does_not_pipeline() -> None:
    async with smtp(peer := SmtpPeer(pipelining=False)) as provider:
        await warm(provider, peer)
        assert not await is_begun(provider, call_to(ANN))


async def test_not_behind_a_server_that_takes_its_time() -> None:
    async with smtp(peer := SmtpPeer()) as provider:
        await warm(provider, peer)
        provider.pool.idle[-1].answer_s = 1.0
        assert not await is_begun(provider, call_to(ANN))
        assert await is_begun(provider, call_to(ANN))


async def test_not_behind_the_last_mail_of_a_connection() -> None:
    async with smtp(peer := SmtpPeer(), max_mails=3) as provider:
        await warm(provider, peer)
        assert await is_begun(provider, call_to(ANN))
        assert peer.connections == 1
        assert not await is_begun(provider, call_to(ANN))


@pytest.mark.parametrize(
    "mail",
    [
        message("jürgen@example.org"),
        message(ANN, "jürgen@example.org"),
        message(ANN, attachments=(Attachment("a.bin", b"x" * 20_000, "image/png"),)),
    ],
    ids=["refused", "refused in part", "too large"],
)
async def test_not_a_mail_that_this_server_cannot_be_given(mail: MailMessage) -> None:
    """It is refused in its own turn, and only then."""
    async with smtp(peer := SmtpPeer(smtputf8=False, size=10_000)) as provider:
        await warm(provider, peer)
        following = call_of(mail)
        ann, asked = begun_behind(call_to(ANN), following)
        assert await send(provider, ann) == ACCEPTED
        assert asked == [following]
        assert provider.pool.idle[-1].begun is None
        results = await provider.send(following)
        assert "REJECTED" in {r.outcome.name for r in results}
        assert peer.connections == 1


async def test_not_a_mail_that_cannot_be_rendered() -> None:
    async with smtp(peer := SmtpPeer()) as provider:
        await warm(provider, peer)
        broken = call_of(message(ANN, subject="one\r\nBcc: all@example.org"))
        ann, _ = begun_behind(call_to(ANN), broken)
        assert await send(provider, ann) == ACCEPTED
        assert await send(provider, broken) == "REJECTED CONTENT"


async def test_not_a_mail_that_breaks_the_code(monkeypatch: pytest.MonkeyPatch) -> None:
    """It breaks in its own turn, and alone."""
    rendered = smtp_module.render

    def render(mail: MailMessage, **named: Any) -> bytes:
        if mail.subject == "poison":
            raise TypeError
        return rendered(mail, **named)

    monkeypatch.setattr(smtp_module, "render", render)
    async with smtp(peer := SmtpPeer()) as provider:
        await warm(provider, peer)
        poison = call_of(message(BOB, subject="poison"))
        ann, asked = begun_behind(call_to(ANN), poison)
        assert await send(provider, ann) == ACCEPTED
        assert asked == [poison]
        with pytest.raises(TypeError):
            await provider.send(poison)
        assert taken(peer) == [[ANN]]
        assert provider._slots._value == 2


async def test_a_mail_behind_one_that_waits_long_for_its_answer_goes_elsewhere() -> None:
    async with smtp(peer := SmtpPeer()) as provider:
        await warm(provider, peer)
        peer.script = {"DOT": [STALL]}
        bob = call_to(BOB)
        ann, _ = begun_behind(call_to(ANN), bob)
        task = asyncio.create_task(send(provider, ann))
        async with asyncio.timeout(LONG_S):
            while not peer.silences:
                await asyncio.sleep(0.001)
        assert await send(provider, bob) == ACCEPTED
        assert taken(peer) == [[ANN], [BOB]]
        await peer.drop_connections()
        assert await task == "UNKNOWN CONNECTION"
        assert provider._slots._value == 2
        assert not await is_begun(provider, call_to(ANN))


@pytest.mark.parametrize(
    ("script", "is_blamed"),
    [
        ({"MAIL": [FINE["MAIL"], LEAVING]}, False),  # so many mails and no more on a connection
        ({"MAIL": [FINE["MAIL"], NEVER, NEVER]}, False),  # refused alone too
        ({"MAIL": [FINE["MAIL"], NEVER]}, True),
        ({"MAIL": [FINE["MAIL"], CLOSE]}, True),
        ({"RCPT": [FINE["RCPT"], NEVER, STALL]}, True),
        ({"DOT": [FINE["DOT"], STALL]}, False),
    ],
)
async def test_what_begins_none_for_a_while(
    script: dict[str, str | list[str]], is_blamed: bool
) -> None:
    async with smtp(peer := SmtpPeer(), timeout_s=SHORT_S) as provider:
        await warm(provider, peer)
        peer.script = script
        bob = call_to(BOB, EVE)
        ann, _ = begun_behind(call_to(ANN), bob)
        assert await send(provider, ann) == ACCEPTED
        await provider.send(bob)
        assert (provider._begins_at > 0) == is_blamed


async def test_a_refusal_at_the_dot_keeps_the_connection() -> None:
    async with smtp(peer := SmtpPeer()) as provider:
        await warm(provider, peer)
        peer.script = {"DOT": [NEVER]}
        bob = call_to(BOB)
        ann, _ = begun_behind(call_to(ANN), bob)
        assert await send(provider, ann) == "REJECTED PROVIDER"
        assert await send(provider, bob) == ACCEPTED
    assert peer.connections == 1


async def test_not_for_a_while_after_a_connection_was_lost_over_it() -> None:
    async with smtp(peer := SmtpPeer()) as provider:
        await warm(provider, peer)
        peer.script = {"DOT": [CLOSE]}
        bob = call_to(BOB)
        ann, _ = begun_behind(call_to(ANN), bob)
        assert await send(provider, ann) == "UNKNOWN CONNECTION"
        assert await send(provider, bob) == ACCEPTED
        assert not await is_begun(provider, call_to(ANN))
        provider._begins_at -= 600.0
        assert await is_begun(provider, call_to(ANN))


async def test_the_last_look_of_the_one_before_says_no() -> None:
    async with smtp(peer := SmtpPeer()) as provider:
        await warm(provider, peer)
        bob = call_to(BOB)
        ann, _ = begun_behind(call_to(ANN, last_look=lambda: False), bob)
        assert await send(provider, ann) == "DEFERRED WORKER_LOST"
        assert await send(provider, bob) == ACCEPTED
        assert taken(peer) == [[BOB]]


async def test_its_own_last_look_is_asked_at_its_own_dot() -> None:
    async with smtp(peer := SmtpPeer()) as provider:
        await warm(provider, peer)
        bob = call_to(BOB, last_look=lambda: False)
        ann, _ = begun_behind(call_to(ANN), bob)
        assert await send(provider, ann) == ACCEPTED
        assert await send(provider, bob) == "DEFERRED WORKER_LOST"
        assert taken(peer) == [[ANN]]


async def test_the_one_before_is_cancelled() -> None:
    async with smtp(peer := SmtpPeer()) as provider:
        await warm(provider, peer)
        peer.script = {"DOT": [STALL]}
        bob = call_to(BOB)
        ann, asked = begun_behind(call_to(ANN), bob)
        task = asyncio.create_task(provider.send(ann))
        async with asyncio.timeout(LONG_S):
            while not peer.silences:
                await asyncio.sleep(0.001)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert asked == [bob]
        for call in (bob, call_to(EVE), call_to(EVE)):
            assert await send(provider, call) == ACCEPTED
        assert provider._slots._value == 2  # none is lost, and none is made


async def test_the_end_of_the_provider_drops_what_was_begun() -> None:
    async with smtp(peer := SmtpPeer()) as provider:
        await warm(provider, peer)
        ann, _ = begun_behind(call_to(ANN), call_to(BOB))
        assert await send(provider, ann) == ACCEPTED
        await provider.close()
        async with asyncio.timeout(LONG_S):
            while peer.open:
                await asyncio.sleep(0.001)
    assert taken(peer) == [[ANN]]


async def test_a_recipient_who_needs_more_than_ascii_is_begun_where_the_server_can() -> None:
    async with smtp(peer := SmtpPeer()) as provider:
        await warm(provider, peer)
        bob = call_of(
            message(recipients=(Recipient("jürgen@example.org", key="jürgen@example.org"),))
        )
        ann, _ = begun_behind(call_to(ANN), bob)
        assert await send(provider, ann) == ACCEPTED
        assert await send(provider, bob) == ACCEPTED
        assert "SMTPUTF8" in peer.taken[-1].parameters

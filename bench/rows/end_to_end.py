"""End to end: from the caller until the SMTP sink has the mail and SENT is recorded.

Against Postfix with the same mails, the same sink and as many connections to it. One server and one
worker, both beside PostgreSQL and the load on this machine, as Postfix's processes are. A round is
as many mails as its side does in SECONDS, so that both sides are measured for as long.

The same for SEND_ONCE against RETRYING, the one mode's rounds between the other's.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator

from bench.family import Family, batches, calls, generate
from bench.gateway import Gateway, gateway
from bench.journey import Round, Rounds, most_fitting, through_gateway, through_postfix
from bench.postfix import postfix, why_absent
from bench.report import median
from bench.row import Measured
from bench.sink import Sink, sink

ROUNDS = 3
SECONDS = 8.0
WARM_UP = 2000
CONNECTIONS = 20
"""To the sink, on either side."""
CALLS = 256
"""Enqueue calls in flight."""
_SEND_ONCE = 2

Way = Callable[[int], Round]


def run(family: Family) -> list[Measured]:
    calls_row = Measured("end to end, Enqueue one a call", "Postfix, tuned", at_least=4)
    batch_row = Measured("end to end, EnqueueBatch of 100", "Postfix, tuned", at_least=6)
    once_row = Measured(
        "SEND_ONCE, end to end", "RETRYING, end to end", at_least=0.5, against_itself=True
    )
    with sink() as taker, ways(family, taker) as by_name:
        ceiling = _ceiling(taker)
        found = _in_turns(by_name)
    peer = found.get("Postfix")
    for row, name in ((calls_row, "calls"), (batch_row, "batches"), (once_row, "once")):
        row.ours = found[name].rates
        row.facts["connections to the sink"] = f"{CONNECTIONS} on either side"
        row.facts["processor time a mail"] = found[name].cpu_text()
        found[name].close_books(row, "ours")
        _compare(row, found["calls"] if row is once_row else peer)
    calls_row.facts["what the sink takes in, pipelined"] = f"{ceiling:,.0f}/s"
    calls_row.limit("the sink takes 2 × what it was given", ceiling > 2 * median(batch_row.ours))
    return [calls_row, batch_row, once_row]


def _compare(row: Measured, other: Rounds | None) -> None:
    if other is None:
        row.facts["no counterpart"] = why_absent()
        return
    row.theirs = other.rates
    row.facts["theirs, processor time a mail"] = other.cpu_text()
    other.close_books(row, "theirs")


def _in_turns(ways: dict[str, Way]) -> dict[str, Rounds]:
    """A round of each, ROUNDS times; how many mails, its warm-up told."""
    mails = {name: _hundreds(way(WARM_UP).rate * SECONDS) for name, way in ways.items()}
    found = {name: Rounds() for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            found[name].rounds.append(way(mails[name]))
    return found


def _hundreds(mails: float) -> int:
    return max(int(mails) // 100, 1) * 100


@contextlib.contextmanager
def ways(family: Family, taker: Sink) -> Iterator[dict[str, Way]]:
    """All that stand ready to bring mails to the sink; each idles while another has its turn."""
    with contextlib.ExitStack() as stack:
        ours = stack.enter_context(gateway(family, taker, CONNECTIONS))
        ready = {
            "calls": functools.partial(by_calls, ours),
            "batches": functools.partial(_by_batches, ours),
            "once": functools.partial(by_calls, ours, mode=_SEND_ONCE),
        }
        if not why_absent():
            peer = stack.enter_context(postfix(taker.port, CONNECTIONS))
            clients = most_fitting(peer, taker, WARM_UP)
            ready["Postfix"] = functools.partial(through_postfix, peer, taker, clients=clients)
        yield ready


def by_calls(ours: Gateway, mails: int, mode: int = 0) -> Round:
    """Enqueue, one a call."""

    def load(count: int) -> dict:
        return calls(ours.server.address, messages=count, concurrency=CALLS, mode=mode)

    return through_gateway(ours, mails, load)


def _by_batches(ours: Gateway, mails: int) -> Round:
    def load(count: int) -> dict:
        return batches(ours.server.address, concurrency=8, size=100, messages=count)

    return through_gateway(ours, mails, load)


def _ceiling(taker: Sink) -> float:
    """Mails a second from a load of its own, with nothing in between."""
    found = generate("bench.load.smtp", taker.port, connections=CONNECTIONS, messages=30_000)
    taker.take()
    return found["rate"]

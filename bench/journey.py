"""Mails on their whole way to the sink, through mailgrpc or through Postfix: one round, its books.

A round is a fixed number of mails. Its clock starts at the first acknowledgement and ends, for
Postfix, when the sink has all; for mailgrpc, when also every delivery is recorded as SENT.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field

from bench.family import generate
from bench.gateway import Gateway
from bench.postfix import Postfix
from bench.row import Measured
from bench.sink import Sink, Taken

CLIENTS = (8, 20, 50, 100)
"""Connections to Postfix of which the best number is taken."""

Load = Callable[[int], dict]
"""Sends so many mails; what the generator says."""


@dataclass(frozen=True, slots=True)
class Round:
    rate: float
    books: dict[str, int]
    taken: Taken
    cpu_us: dict[str, float]
    """Processor time a mail, by who used it."""


@dataclass(slots=True)
class Rounds:
    """The rounds of one side of a row."""

    rounds: list[Round] = field(default_factory=list)

    @property
    def rates(self) -> list[float]:
        return [r.rate for r in self.rounds]

    def cpu_us(self, who: str) -> float:
        return statistics.median(r.cpu_us[who] for r in self.rounds)

    def cpu_text(self) -> str:
        """Processor time a mail of everyone concerned."""
        return ", ".join(f"{who} {self.cpu_us(who):.0f} µs" for who in self.rounds[0].cpu_us)

    def close_books(self, row: Measured, whose: str) -> None:
        """Void the row unless each mail was acknowledged once, came once, and stands once."""
        counts = {name: sum(r.books[name] for r in self.rounds) for name in self.rounds[0].books}
        row.check(f"books of {whose}", **counts)
        row.facts[f"{whose}: {' = '.join(counts)}"] = f"{counts['acknowledged']:,}"


def through_gateway(gateway: Gateway, mails: int, load: Load, *, since: str = "first_at") -> Round:
    """A round through mailgrpc; `since` is what starts its clock, of what the load says."""
    stored, sent, used = gateway.family.stored(), gateway.sent(), gateway.used()
    found = load(mails)
    ended_at, taken = gateway.settled(mails)
    now = gateway.used()
    books = {
        "acknowledged": found["messages"],
        "rows": gateway.family.stored() - stored,
        "ledger": taken.mails,
        "recipients": len(taken.at),
        "SENT": gateway.sent() - sent,
    }
    cpu_us = {who: (now[who] - used[who]) / mails * 1e6 for who in now}
    return Round(mails / (ended_at - found[since]), books, taken, cpu_us)


def through_postfix(peer: Postfix, sink: Sink, mails: int, clients: int) -> Round:
    """A round through Postfix, from so many clients that send as fast as they are answered."""
    used, sink_used = peer.cpu_s(), sink.cpu_s()
    found = generate("bench.load.smtp", peer.port, connections=clients, messages=mails)
    sink.wait(mails)
    taken = sink.take()
    books = {
        "acknowledged": found["messages"],
        "ledger": taken.mails,
        "recipients": len(taken.at),
    }
    cpu_us = {
        "Postfix": (peer.cpu_s() - used) / mails * 1e6,
        "sink": (sink.cpu_s() - sink_used) / mails * 1e6,
    }
    return Round(mails / (taken.last_at - found["first_at"]), books, taken, cpu_us)


def most_fitting(peer: Postfix, sink: Sink, mails: int) -> int:
    """With how many clients Postfix does best: more of them keep it busy, and crowd out what sends."""
    rates = {clients: through_postfix(peer, sink, mails, clients).rate for clients in CLIENTS}
    return max(rates, key=lambda clients: rates[clients])

"""Mails with an attachment of 5 MiB, 20 in flight, end to end: megabytes a second, and memory.

There is no counterpart: what is held to something is memory. A server has a request as gRPC's
buffers, as bytes, as a parsed request, as a message, as an argument and as the statement to
PostgreSQL, and memory of the same size again that its allocator has not given back: 8 times its size
for each mail in flight. A worker reads no more than 32 MiB of content at once, and has each as a
message, as MIME (4/3 of it) and on its way to the socket: twice its size for each connection. What
is more is a leak, or a queue without bound. The peak is the whole process's (VmHWM), with its
libraries.
"""

from __future__ import annotations

from bench.family import Child, Family, generate
from bench.gateway import Gateway, gateway
from bench.journey import Round, Rounds, through_gateway
from bench.row import Measured
from bench.sink import sink

ROUNDS = 3
MAILS = 80
WARM_UP = 20
IN_FLIGHT = 20
CONNECTIONS = 20
BYTES = 5 * 1024 * 1024
BESIDE_MB = 100
"""What a process may have without any mail."""
TIMES = {"server": 8, "worker": 2}
"""How many times its size each mail in flight may take."""


def run(family: Family) -> list[Measured]:
    row = Measured("mails with 5 MiB attached, end to end", unit=" MB/s")
    rounds = Rounds()
    refused = 0

    def through(ours: Gateway, mails: int) -> Round:
        def load(count: int) -> dict:
            nonlocal refused
            found = generate("bench.load.attachments", ours.server.address, count, BYTES, IN_FLIGHT)
            refused += found["refused"]
            return found

        return through_gateway(ours, mails, load, since="began_at")

    with sink() as taker, gateway(family, taker, CONNECTIONS) as ours:
        processes = {"server": ours.server, "worker": ours.worker}
        idle = {name: process.peak_mb() for name, process in processes.items()}
        through(ours, WARM_UP)
        for process in processes.values():
            process.forget_peak()
        refused = 0
        for _ in range(ROUNDS):
            rounds.rounds.append(through(ours, MAILS))
        for name, process in processes.items():
            _bound(row, name, process, idle[name])
    row.ours = [rate * BYTES / 1e6 for rate in rounds.rates]
    rounds.close_books(row, "ours")
    row.facts["processor time a mail"] = rounds.cpu_text()
    row.facts["in flight"] = f"{IN_FLIGHT} calls, {CONNECTIONS} connections to the sink"
    row.facts["refused for the queue's sake, and repeated"] = f"{refused:,}"
    return [row]


def _bound(row: Measured, name: str, process: Child, idle_mb: float) -> None:
    most = BESIDE_MB + IN_FLIGHT * BYTES / 2**20 * TIMES[name]
    peak = process.peak_mb()
    row.facts[f"{name}'s memory, idle and at its peak"] = f"{idle_mb:.0f} MiB, {peak:.0f} MiB"
    row.limit(
        f"{name} ≤ {most:.0f} MiB: {BESIDE_MB} + {TIMES[name]} × the size of each mail in flight",
        peak <= most,
    )

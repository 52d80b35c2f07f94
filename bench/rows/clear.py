"""How much others feel a Clear of a million messages: the p99 of Enqueue at half load, beside it.

An open loop: calls start when they are due, so whoever has to wait is counted for as long as it does.
"""

from __future__ import annotations

import statistics
import threading
import time
from datetime import UTC, datetime, timedelta

import grpc

from bench import past
from bench.family import Family, calls
from bench.row import Measured
from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1 import mail_service_pb2_grpc

MESSAGES = 1_000_000
WITHIN_S = 120.0
SECONDS = 8.0
ROUNDS = 6
AT_ONCE = 50_000


class Clearing(threading.Thread):
    """Clear all that is older than a day, call after call, as an operator's command does it."""

    def __init__(self, target: str) -> None:
        super().__init__(daemon=True)
        self._target = target
        self.cleared = 0
        self.took_s = 0.0

    def run(self) -> None:
        request = pb.ClearRequest(max_messages=AT_ONCE)
        request.filter.created_before.FromDatetime(datetime.now(UTC) - timedelta(days=1))
        began = time.monotonic()
        with grpc.insecure_channel(self._target) as channel:
            stub = mail_service_pb2_grpc.MailServiceStub(channel)
            more = True
            while more:
                answer = stub.Clear(request, timeout=60)
                self.cleared += answer.cleared_count
                more = answer.more
        self.took_s = time.monotonic() - began


def run(family: Family) -> list[Measured]:
    row = Measured(
        "p99 of Enqueue at half load while Clear removes a million",
        "the p99 before",
        unit="ms",
        at_most=2.0,
    )
    past.make_days(family)
    past.fill(family, MESSAGES, first_day=20, days=18)
    past.settle(family)
    before = family.stored()
    said = failed = 0
    with family.running("serve") as server:
        full = calls(server.address, seconds=4.0, concurrency=256)
        rate = full["rate"] / 2
        said += full["messages"]
        for _ in range(ROUNDS):
            found = calls(server.address, seconds=SECONDS, rate=rate)
            said += found["messages"]
            failed += found["failed"]
            row.theirs.append(found["p99_ms"])
        clearing = Clearing(server.address)
        clearing.start()
        while clearing.is_alive():
            found = calls(server.address, seconds=SECONDS, rate=rate)
            said += found["messages"]
            failed += found["failed"]
            if clearing.is_alive():  # beside it from the first call to the last
                row.ours.append(found["p99_ms"])
    row.check("books", acknowledged=said, rows=family.stored() - before + clearing.cleared)
    row.check("failed", failed=failed, none=0)
    row.check("cleared", asked=MESSAGES, cleared=clearing.cleared)
    row.limit(f"a million within {WITHIN_S:.0f} s", clearing.took_s <= WITHIN_S)
    row.facts = {
        "it took": f"{clearing.took_s:.0f} s",
        "half load": f"{rate:,.0f} /s",
        "the worst of the windows": f"{max(row.ours, default=0):.1f} ms beside it, "
        f"{max(row.theirs):.1f} ms before",
        "p99 before, median": f"{statistics.median(row.theirs):.1f} ms",
    }
    return [row]

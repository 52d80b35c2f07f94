"""What is measured end to end: one server, and one worker with a channel to the sink."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass

from bench.family import Child, Family
from bench.machine import PLACE
from bench.sink import Sink, Taken

_SENT = 4


@dataclass(frozen=True, slots=True)
class Gateway:
    family: Family
    server: Child
    worker: Child
    sink: Sink

    def settled(self, mails: int) -> tuple[float, Taken]:
        """When the sink had so many mails and no delivery was short of SENT; what the sink had."""
        self.sink.wait(mails)
        given_up_at = time.monotonic() + 30
        unsettled = "SELECT EXISTS (SELECT FROM deliveries WHERE state <> $1) AS any"
        while self.family.sql(unsettled, _SENT)[0]["any"] and time.monotonic() < given_up_at:
            time.sleep(0.02)
        return time.time(), self.sink.take()

    def sent(self) -> int:
        """How many deliveries are SENT."""
        found = self.family.sql("SELECT count(*) AS n FROM deliveries WHERE state = $1", _SENT)
        return int(found[0]["n"])

    def used(self) -> dict[str, float]:
        """Processor seconds so far, by who used them."""
        return {
            "server": self.server.cpu_s(),
            "worker": self.worker.cpu_s(),
            "PostgreSQL": self.family.postgres_cpu_s(),
            "sink": self.sink.cpu_s(),
        }


@contextlib.contextmanager
def gateway(family: Family, sink: Sink, connections: int) -> Iterator[Gateway]:
    """Serve and work, with at most so many connections to the sink."""
    with tempfile.TemporaryDirectory(prefix="mailgrpc-bench-journal-", dir=PLACE) as journal:
        settings = {
            "MAILGRPC_CHANNEL_URL": f"smtp://127.0.0.1:{sink.port}?tls=none",
            "MAILGRPC_SEND_CONCURRENCY": str(connections),
            "MAILGRPC_JOURNAL_DIR": journal,
        }
        with (
            family.running("serve", **settings) as server,
            family.running("work", **settings) as worker,
        ):
            yield Gateway(family, server, worker, sink)

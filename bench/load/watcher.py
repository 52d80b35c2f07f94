"""One subscriber of everything, over the generated stubs and gRPC's own client.

    python -m bench.load.watcher TARGET COUNT [TOKEN]   → `watching TOKEN` once live, one JSON line

Counts until COUNT events have come. With a token, the history behind it. Each event's id is kept,
so that one that came twice or not at all is known; of each response the lag of its oldest event
(`occurred_at` until receipt, one machine and one clock) is counted for all events in it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time

import grpc
import uvloop

from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1 import mail_service_pb2_grpc


class Watcher:
    """What one stream has told so far."""

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.token = ""
        self.live = asyncio.Event()  # caught up
        self._responses: list[tuple[float, float, int]] = []  # received at, lag, events

    def __len__(self) -> int:
        return len(self.ids)

    async def follow(self, target: str, count: float, token: str = "") -> None:
        """Read until so many events have come."""
        began = time.time()
        async with grpc.aio.insecure_channel(target) as channel:
            call = mail_service_pb2_grpc.MailServiceStub(channel).WatchStatus(
                pb.WatchStatusRequest(resume_token=token)
            )
            if token:
                self._responses.append((began, 0.0, 0))
            async for response in call:
                if response.caught_up:
                    self.token = response.resume_token
                    self.live.set()
                if events := response.events:
                    now, oldest = time.time(), events[0].occurred_at
                    lag = now - oldest.seconds - oldest.nanos * 1e-9
                    self._responses.append((now, lag, len(events)))
                    self.ids.extend([event.event_id for event in events])
                    if len(self.ids) >= count:
                        call.cancel()
                        return

    def found(self) -> dict:
        """Events, those of them that are different, their rate, lags, and events a response."""
        first, last = self._responses[0], self._responses[-1]
        told = [r for r in self._responses if r[2]]
        lags = sorted((lag, events) for _, lag, events in told)
        return {
            "events": len(self.ids),
            "different": len(set(self.ids)),
            # From the first response on, whose own events came before the clock started.
            "rate": (len(self.ids) - first[2]) / (last[0] - first[0]),
            "lag_p50_ms": _quantile(lags, len(self.ids) * 0.5) * 1e3,
            "lag_p99_ms": _quantile(lags, len(self.ids) * 0.99) * 1e3,
            "lag_last_ms": last[1] * 1e3,
            "a_response": len(self.ids) / len(told),
        }


def _quantile(lags: list[tuple[float, int]], events: float) -> float:
    for lag, more in lags:
        events -= more
        if events <= 0:
            return lag
    return lags[-1][0]


async def main(target: str, count: int, token: str = "") -> None:
    watcher = Watcher()
    async with asyncio.TaskGroup() as tasks:
        following = tasks.create_task(watcher.follow(target, count, token))
        if not token:
            await watcher.live.wait()
            print("watching", watcher.token, flush=True)
        cpu = time.process_time()
        await following
    cpu = time.process_time() - cpu
    print(json.dumps(watcher.found() | {"cpu_us": cpu / len(watcher) * 1e6}))


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:]))

"""Streams of one message each, held open or opened and cancelled.

    python -m bench.load.idle TARGET hold COUNT    → `open N` once each has answered; holds them
                                                     until standard input ends
    python -m bench.load.idle TARGET churn COUNT   → one JSON line

Message ids are made up where nothing is stored under them: a stream of a message that does not
exist waits like any other. A stream counts as open once it was told that it is caught up.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys

import grpc
import uvloop

from mailgrpc.core.ids import MESSAGE, new_message_id, to_text
from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1 import mail_service_pb2_grpc

_A_CHANNEL = 100
_AT_ONCE = 100


class Streams:
    """Streams over channels with a connection of their own, 100 on each."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._channels: list[grpc.aio.Channel] = []
        self._calls: list[grpc.aio.UnaryStreamCall] = []
        self.refused = 0

    async def open(self, count: int, *, answered: bool = True) -> None:
        """Open so many more; `answered`: wait until each is caught up."""
        for first in range(0, count, _AT_ONCE):
            many = min(_AT_ONCE, count - first)
            await asyncio.gather(*(self._open(answered) for _ in range(many)))

    async def _open(self, answered: bool) -> None:
        if len(self._calls) >= _A_CHANNEL * len(self._channels):
            self._channels.append(
                grpc.aio.insecure_channel(
                    self._target, options=[("grpc.use_local_subchannel_pool", 1)]
                )
            )
        request = pb.WatchStatusRequest()
        request.filter.message_ids.append(to_text(MESSAGE, new_message_id()))
        call = mail_service_pb2_grpc.MailServiceStub(self._channels[-1]).WatchStatus(request)
        self._calls.append(call)
        if answered:
            try:
                await call.read()
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.RESOURCE_EXHAUSTED:
                    raise
                self.refused += 1
                self._calls.remove(call)

    def __len__(self) -> int:
        return len(self._calls)

    async def cancel(self) -> None:
        """Cancel them all and leave nothing open."""
        for call in self._calls:
            call.cancel()
        for channel in self._channels:
            await channel.close()
        self._calls, self._channels = [], []


async def hold(target: str, count: int) -> None:
    streams = Streams(target)
    await streams.open(count)
    print("open", len(streams), flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await streams.cancel()


async def churn(target: str, count: int) -> None:
    """Every other hundred is cancelled before it was answered."""
    streams = Streams(target)
    opened = 0
    for early in itertools.cycle((False, True)):
        if opened >= count:
            break
        await streams.open(_AT_ONCE, answered=not early)
        if early:
            await asyncio.sleep(0.02)  # some of them have reached the server, some have not
        opened += len(streams)
        await streams.cancel()
    print(json.dumps({"opened": opened, "refused": streams.refused}))


if __name__ == "__main__":
    uvloop.run({"hold": hold, "churn": churn}[sys.argv[2]](sys.argv[1], int(sys.argv[3])))

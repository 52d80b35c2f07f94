"""Callers and subscribers that do not give up, and the history of what they were told."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from dataclasses import dataclass, field
from typing import Any

import grpc

from mailgrpc.core.delivery import UNENDED
from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1 import mail_service_pb2_grpc, message_pb2
from tests.gateway import enqueue

_PASSING = frozenset(
    {
        grpc.StatusCode.UNAVAILABLE,
        grpc.StatusCode.DEADLINE_EXCEEDED,
        grpc.StatusCode.CANCELLED,
        grpc.StatusCode.RESOURCE_EXHAUSTED,
    }
)
_PASSING_CODES = frozenset(code.value[0] for code in _PASSING)
_INSIST_S = 120
_MOST_OPEN = 1500
"""Deliveries that have not ended: above it callers wait, or the healing would last for ever."""
_QUICK = [
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
]


@dataclass(slots=True)
class Acknowledged:
    """One request and the answers it got: more than one message id is a finding."""

    at: float
    once: bool
    recipients: tuple[str, ...]
    message_ids: set[str] = field(default_factory=set)


@dataclass(frozen=True, slots=True)
class Seen:
    """One event as a subscriber saw it."""

    event_id: str
    delivery_id: str
    version: int
    old_state: int
    state: int
    outcome: int = 0  # of the attempt that made the change


@dataclass(slots=True)
class History:
    """All that clients were told."""

    acknowledged: dict[str, Acknowledged] = field(default_factory=dict)
    watchers: list[list[Seen]] = field(default_factory=list)
    surprises: list[str] = field(default_factory=list)


class Clients:
    """Callers and watchers over some servers; `stop` ends the callers, `close` all."""

    def __init__(self, targets: list[str], seed: int) -> None:
        self.history = History()
        self._channels = [grpc.aio.insecure_channel(t, options=_QUICK) for t in targets]
        self._stubs = [mail_service_pb2_grpc.MailServiceStub(c) for c in self._channels]
        self._seed = seed
        self._stopping = False
        self._callers: list[asyncio.Task[None]] = []
        self._watchers: list[asyncio.Task[None]] = []
        self._tokens: list[str] = []
        self._open = 0  # deliveries that have not ended, as far as the first watcher was told

    def call(self, callers: int, pause_s: float, *, once: float = 0.5, http: float = 0.25) -> None:
        """Begin to enqueue: `once` and `http` are shares of the messages."""
        for number in range(callers):
            caller = self._call(number, pause_s, once, http)
            self._callers.append(asyncio.create_task(caller))

    async def watch(self, watchers: int) -> None:
        """Watch everything from now on; returns when all of them have a token."""
        self._tokens = [""] * watchers
        for number in range(watchers):
            self.history.watchers.append([])
            self._watchers.append(asyncio.create_task(self._watch(number)))
        while not all(self._tokens):
            await asyncio.sleep(0.05)

    async def stop(self) -> None:
        """No new requests; those under way are still acknowledged."""
        self._stopping = True
        done, waiting = await asyncio.wait(self._callers, timeout=_INSIST_S)
        if waiting:
            self.history.surprises.append(f"nothing, {len(waiting)} callers, for {_INSIST_S} s")
        for task in waiting:
            task.cancel()
        await asyncio.gather(*done)

    async def close(self) -> None:
        for task in self._watchers:
            task.cancel()
        await asyncio.gather(*self._watchers, return_exceptions=True)
        for channel in self._channels:
            await channel.close()

    async def _call(self, caller: int, pause_s: float, once: float, http: float) -> None:
        rng = random.Random(f"{self._seed}/{caller}")
        for number in itertools.count():
            if self._stopping:
                return
            size = rng.choice((1, 1, 1, 2, 10))
            requests = [
                _request(rng, f"{self._seed}-{caller}-{number}-{n}", once, http)
                for n in range(size)
            ]
            await self._insist(requests, rng)
            await asyncio.sleep(pause_s * rng.uniform(0.5, 1.5))
            while self._open > _MOST_OPEN and not self._stopping:
                await asyncio.sleep(0.1)

    async def _insist(self, requests: list[Any], rng: random.Random) -> None:
        """Until all of them are acknowledged, by whichever server answers."""
        open_ones = list(requests)
        while open_ones:
            stub = rng.choice(self._stubs)
            try:
                if rng.random() < 0.02:  # at two servers at once, as impatient callers do
                    both = (self._ask(s, open_ones) for s in (stub, rng.choice(self._stubs)))
                    await asyncio.gather(*both, return_exceptions=True)
                open_ones = await self._ask(stub, open_ones)
                # Some ask again though they were answered: a retry that was not needed.
                if not open_ones and rng.random() < 0.02:
                    await self._ask(stub, requests, again=True)
            except grpc.aio.AioRpcError as error:
                if error.code() not in _PASSING:
                    self.history.surprises.append(f"Enqueue: {error.code()} {error.details()}")
                    return
                await asyncio.sleep(0.1)

    async def _ask(self, stub: Any, requests: list[Any], *, again: bool = False) -> list[Any]:
        """Ask once; what is still to be asked. `again`: all of it was acknowledged before."""
        if len(requests) == 1:
            answer = await stub.Enqueue(requests[0], timeout=5)
            self._note(requests[0], answer, again)
            return []
        batch = await stub.EnqueueBatch(pb.EnqueueBatchRequest(requests=requests), timeout=5)
        left = []
        for request, result in zip(requests, batch.results, strict=True):
            if result.HasField("response"):
                self._note(request, result.response, again)
            elif result.error.code in _PASSING_CODES:
                left.append(request)
            else:
                self.history.surprises.append(f"EnqueueBatch: {result.error}")
        return left

    def _note(self, request: Any, answer: Any, again: bool) -> None:
        if again and not answer.replayed:
            self.history.surprises.append(f"that {request.request_id} is new, for the second time")
        once = request.options.mode == message_pb2.DELIVERY_MODE_SEND_ONCE
        recipients = tuple(r.address for r in request.message.to)
        known = self.history.acknowledged.setdefault(
            request.request_id, Acknowledged(time.time(), once, recipients)
        )
        known.message_ids.add(answer.message_id)

    async def _watch(self, number: int) -> None:
        seen, tokens = self.history.watchers[number], self._tokens
        for turn in itertools.count(number):
            stub = self._stubs[turn % len(self._stubs)]
            request = pb.WatchStatusRequest(resume_token=tokens[number])
            try:
                async for response in stub.WatchStatus(request):
                    told = [_seen(event) for event in response.events]
                    seen += told
                    if number == 0:
                        self._open += sum(map(_opens, told))
                    tokens[number] = response.resume_token or tokens[number]
            except grpc.aio.AioRpcError as error:
                if error.code() not in _PASSING:
                    self.history.surprises.append(f"WatchStatus: {error.code()} {error.details()}")
                    return
                await asyncio.sleep(0.1)


def _request(rng: random.Random, request_id: str, once: float, http: float) -> pb.EnqueueRequest:
    recipients = [f"r{n}.{request_id}@example.org" for n in range(rng.choice((1, 1, 1, 2, 3)))]
    request = enqueue(*recipients, request_id=request_id, subject=request_id)
    mode = (
        message_pb2.DELIVERY_MODE_SEND_ONCE
        if rng.random() < once
        else message_pb2.DELIVERY_MODE_RETRYING
    )
    request.options.mode = mode
    request.options.retry.initial_backoff.FromSeconds(1)
    request.options.retry.max_backoff.FromSeconds(3)
    request.options.retry.max_attempts = 100
    if rng.random() < http:
        request.options.channel = "http"
    return request


def _seen(event: Any) -> Seen:
    delivery = event.state_changed.delivery
    return Seen(
        event.event_id,
        delivery.delivery_id,
        delivery.version,
        event.state_changed.old_state,
        delivery.state,
        event.state_changed.attempt.result.outcome,
    )


def _opens(event: Seen) -> int:
    """1 for a new delivery, -1 for one that has ended now."""
    if not event.old_state:
        return 1
    return -1 if event.old_state in UNENDED and event.state not in UNENDED else 0

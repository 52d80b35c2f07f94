"""The doorbell: hints over Redis that there is something to do. Never the truth.

Two hints share it. `ring` says "deliveries may be due" to the workers; `hint_feed` says "events may be
new" to the servers. Losing any of them costs time, never mail: workers sweep and servers poll PostgreSQL
by themselves. So nothing here raises; Redis away is logged once, and once more when it is back. It also
lends its connection to the handing over of mail (`ask`, handover.py).

A ring is two things. A push on a list that idle workers block on, which is heard at once; and an
arq job `drain`, for workers run by arq's own command and so that what is queued is visible in
arq's tools. The list is kept short and rings are joined: the first goes out at once, those after it at
intervals that leave most of the time to other work, a few milliseconds on an idle process. There are
a few jobs a second, and none while jobs lie there that
nobody takes. A job never has a fixed id, because arq swallows one whose id is still known; only
`ring_at` uses one a second, where that is wanted.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import fields
from datetime import UTC, datetime
from typing import Any, TypeVar
from urllib.parse import urlsplit

import msgpack
from arq.connections import ArqRedis, RedisSettings
from redis.asyncio import ConnectionPool, Redis
from redis.asyncio.client import PubSub
from redis.asyncio.connection import parse_url
from redis.exceptions import RedisError

from mailgrpc.errors import SettingsError

T = TypeVar("T")
log = logging.getLogger(__name__)

QUEUE = "mailgrpc:arq"
DRAIN = "drain"
_RINGS = "mailgrpc:rings"
_FEED = "mailgrpc:feed"
_RINGS_KEPT = 16
_JOBS_KEPT = 16
# Between two of a kind, so many times as long as the last one took. A hint is cheaper than a ring,
# and who watches sees every millisecond of it.
_RING_REST, _HINT_REST = 3, 2
_LONGEST_REST_S = 0.010
_BUSY_REST_S = 0.04
_UNHEARD_REST_S = 0.05
"""After a hint that nobody heard: servers listen only while somebody watches."""
_JOB_EVERY_S = 0.25
_RECONNECT_S = 0.5
_AHEAD_S = 600.0
_EXPECTED = (
    "expected redis://USER:PASSWORD@HOST:PORT/NUMBER, rediss:// for TLS, or unix:///PATH;"
    " special characters in a password have to be percent-encoded"
)
_BROKEN = (RedisError, OSError, asyncio.TimeoutError)


class Doorbell:
    """One process's end of it. Without a URL every ring is silent and every wait times out.

    Raises SettingsError for a URL that is none.
    """

    def __init__(self, redis_url: str | None) -> None:
        self.url = redis_url
        self._redis: ArqRedis | None = None
        if redis_url:
            check_url(redis_url)
            pool = ConnectionPool.from_url(
                redis_url, socket_connect_timeout=1, socket_timeout=None, health_check_interval=30
            )
            self._redis = ArqRedis(
                pool,
                job_serializer=msgpack.packb,
                job_deserializer=msgpack.unpackb,
                default_queue_name=QUEUE,
            )
        self._rings: set[str] = set()
        self._hints: set[str] = set()
        self._ringing: asyncio.Task[None] | None = None
        self._hinting: asyncio.Task[None] | None = None
        self._hints_lightly = False
        self._job_at = 0.0
        self._reachable = True

    @property
    def exists(self) -> bool:
        """Whether a Redis is configured at all."""
        return self._redis is not None

    def ring(self) -> None:
        """Deliveries may be due. Returns at once."""
        self._ring(DRAIN)

    def hint_feed(self, *, lightly: bool = False) -> None:
        """Events may be new. Returns at once.

        `lightly`: who says so is busy, and has more to come; the next hint may wait longer.
        """
        if self._redis is None:
            return
        self._hints_lightly = lightly
        self._hints.add(_FEED)
        if self._hinting is None or self._hinting.done():
            hints = self._send(self._hints, _HINT_REST)
            self._hinting = asyncio.get_running_loop().create_task(hints)

    def ring_at(self, when: datetime) -> None:
        """Deliveries will be due at `when`: one deferred job a second.

        What lies further ahead is not rung for: `scheduled` holds it, and the sweeper moves it.
        """
        second = int(when.timestamp()) + 1
        if second - time.time() < _AHEAD_S:
            self._ring(str(second))

    async def heard_ring(self, timeout_s: float) -> bool:
        """Wait for a ring. False after the time-out, or soon when Redis cannot be asked."""
        if self._redis is None:
            await asyncio.sleep(timeout_s)
            return False

        async def pop(redis: Any) -> bool:
            return await redis.blpop([_RINGS], timeout=max(round(timeout_s), 1)) is not None

        heard = await self.ask(pop, timeout_s + 2)
        if heard is None:
            await asyncio.sleep(min(timeout_s, _RECONNECT_S))
        return bool(heard)

    async def ask(self, command: Callable[[Any], Awaitable[T]], within_s: float) -> T | None:
        """What a command answers that is given the connection; None where Redis did not in time.

        Raises what the command raises for other reasons.
        """
        if self._redis is None:
            return None
        try:
            # Never wait_for, here and in every loop: it loses a cancellation that comes together
            # with the answer, and who cancelled then waits for ever.
            async with asyncio.timeout(within_s):
                answer = await command(self._redis)
        except _BROKEN as error:
            self._note(error)
            return None
        self._note(None)
        return answer

    async def feed_hints(self) -> AsyncGenerator[None, None]:
        """Yield at each hint, and once whenever the subscription begins anew; never ends."""
        if self.url is None:
            await asyncio.Event().wait()
            return
        while True:
            try:
                async with self._subscribed() as hints:
                    self._note(None)
                    yield None
                    async for message in hints.listen():
                        if message["type"] == "message":
                            yield None
            except _BROKEN as error:
                self._note(error)
            await asyncio.sleep(_RECONNECT_S)

    @contextlib.asynccontextmanager
    async def _subscribed(self) -> AsyncGenerator[PubSub, None]:
        assert self.url is not None
        hints = Redis.from_url(self.url, socket_connect_timeout=1).pubsub()
        try:
            await hints.subscribe(_FEED)
            yield hints
        finally:
            # A goodbye that fails must not take the place of what ended it.
            with contextlib.suppress(*_BROKEN):
                await hints.aclose()

    async def probe(self) -> str:
        """The server's version, for `mailgrpc doctor`. Raises RedisError or OSError."""
        if self._redis is None:
            return "not configured"
        info = await asyncio.wait_for(self._redis.info("server"), 3)
        return str(info.get("valkey_version") or info.get("redis_version"))

    async def close(self) -> None:
        """Let the last ring out and end the connections."""
        for task in (self._ringing, self._hinting):
            if task is not None:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(asyncio.shield(task), 1)
                task.cancel()
        if self._redis is not None:
            with contextlib.suppress(*_BROKEN):
                await asyncio.wait_for(self._redis.aclose(close_connection_pool=True), 1)

    def _ring(self, what: str) -> None:
        if self._redis is None:
            return
        self._rings.add(what)
        if self._ringing is None or self._ringing.done():
            rings = self._send(self._rings, _RING_REST)
            self._ringing = asyncio.get_running_loop().create_task(rings)

    async def _send(self, wanted: set[str], rest: int) -> None:
        """Send what is wanted of one kind until nothing is, with rests between."""
        clock = asyncio.get_running_loop().time
        while wanted:
            taken = set(wanted)
            wanted.clear()
            began_at, heard = clock(), True
            try:
                async with asyncio.timeout(2):
                    if _FEED in taken:
                        heard = await self._publish()
                    else:
                        await self._push(taken)
                self._note(None)
            except _BROKEN as error:
                self._note(error)
            rest_s = min((clock() - began_at) * rest, _LONGEST_REST_S)
            if _FEED in taken and self._hints_lightly:
                rest_s = _BUSY_REST_S
            await asyncio.sleep(rest_s if heard else _UNHEARD_REST_S)

    async def _publish(self) -> bool:
        """Hint at new events; whether anybody heard it."""
        assert self._redis is not None
        return bool(await self._redis.publish(_FEED, b"1"))

    async def _push(self, wanted: set[str]) -> None:
        """Ring, now or for a second to come."""
        assert self._redis is not None
        seconds = wanted - {DRAIN}
        is_job_due = time.monotonic() - self._job_at > _JOB_EVERY_S
        redis: Any = self._redis  # whose methods may be awaited, which its types do not say
        if DRAIN in wanted and await redis.lpush(_RINGS, b"1") > _RINGS_KEPT:
            await redis.ltrim(_RINGS, 0, _RINGS_KEPT - 1)
        if not seconds and not is_job_due:
            return
        # Those whose time has come: what is deferred says nothing about who takes jobs.
        if await self._redis.zcount(QUEUE, "-inf", time.time() * 1000) > _JOBS_KEPT:
            return
        if DRAIN in wanted and is_job_due:
            self._job_at = time.monotonic()
            await self._redis.enqueue_job(DRAIN)
        for second in seconds:
            when = datetime.fromtimestamp(int(second), UTC)
            await self._redis.enqueue_job(DRAIN, _job_id=f"{DRAIN}:{second}", _defer_until=when)

    def _note(self, error: BaseException | None) -> None:
        if error is not None and self._reachable:
            # By its first words: a pipeline's error repeats the whole command.
            text = str(error).partition("(")[0] if str(error) else "time-out"
            log.warning("redis does not ring, mail flows by polling: %s", text)
        elif error is None and not self._reachable:
            log.info("redis is back")
        self._reachable = error is None


def redis_settings(url: str) -> RedisSettings:
    """The same Redis, for arq's worker."""
    options = check_url(url)
    known = {f.name for f in fields(RedisSettings)}
    return RedisSettings(
        **{name: value for name, value in options.items() if name in known},
        database=options.get("db", 0),
        unix_socket_path=options.get("path"),
        ssl=url.startswith("rediss:"),
        conn_retries=0,  # the supervisor in worker/main.py tries again
    )


def check_url(url: str) -> dict[str, Any]:
    """What a URL says, as the driver takes it. Raises SettingsError, which repeats none of it."""
    try:
        parts = urlsplit(url)
        strange = parts.netloc.count("@") > 1 or "@" in parts.path or bool(parts.fragment)
        options: dict[str, Any] = dict(parse_url(url))
        # The driver leaves these unsaid.
        if strange or not re.fullmatch("|/[0-9]*", "" if parts.scheme == "unix" else parts.path):
            raise ValueError("its user, password or database")
        ConnectionPool.from_url(url).make_connection()  # type: ignore[no-untyped-call]
    except (ValueError, TypeError) as error:
        unknown = re.search("unexpected keyword argument ('[a-z_]+')", str(error))
        what = f"unknown parameter {unknown[1]}" if unknown else _EXPECTED
        raise SettingsError(f"MAILGRPC_REDIS_URL: {what}") from None
    return options

"""The server as a whole: made, started, and ended without losing a call."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from mailgrpc.config import HostPort, Settings
from mailgrpc.core.message import MAX_REQUEST_BYTES
from mailgrpc.db.engine import FEED_S, LOOK_UP_S, Database
from mailgrpc.db.schema import check_schema, read_installation
from mailgrpc.db.workers import SessionRow, read_sessions
from mailgrpc.doorbell import Doorbell
from mailgrpc.errors import SettingsError, StoreUnavailable
from mailgrpc.handover import Handover
from mailgrpc.providers.provider import Provider
from mailgrpc.providers.registry import open_channels
from mailgrpc.server.clear import Clear
from mailgrpc.server.credits import Credits
from mailgrpc.server.feed import Feed
from mailgrpc.server.intake import Intake
from mailgrpc.server.interceptors import Edge
from mailgrpc.server.mail import MailService, Parts
from mailgrpc.server.port import reserved
from mailgrpc.server.preferences import Preferences
from mailgrpc.server.resend import Resend
from mailgrpc.server.tls import read_pair
from mailgrpc.server.watch import Watch
from mailgrpc.v1 import mail_service_pb2, mail_service_pb2_grpc

log = logging.getLogger(__name__)

SERVICE = mail_service_pb2.DESCRIPTOR.services_by_name["MailService"].full_name
WORKERS = "mailgrpc.workers"
"""The name under which health tells whether some worker lives and starts mail."""
_HEALTH_EVERY_S = 2.0
# What is somewhat too large is still received, so that it is refused with details (interceptors).
_RECEIVED_BYTES = MAX_REQUEST_BYTES * 6 // 5
LISTENERS = 4 if sys.platform == "linux" else 1
"""gRPC's servers in this process, on one port. Each asks for one call after the other, which takes
several turns of the event loop and a way through a thread; so connections are spread over several,
which take calls in side by side. Linux alone spreads them."""
WAITING_CALLS = 5_000
"""So many may wait in each of gRPC's servers until it asks for the next; a call costs 16 kB there, and what
a connection may send ahead is bounded by its window. gRPC itself lets 1,000 wait, and tells more and
more of the others CANCELLED, with nothing to go by (docs/decisions/0026)."""
# In the pool of descriptors, so that reflection can name them and error details print.
_TOLD_BY_REFLECTION = (error_details_pb2, status_pb2)


class Witness:
    """Tells whether some worker works, by the clock of this process alone.

    Who ends a silent session is a worker, and the last one has nobody left to do that. One that
    says it starts nothing, because its journal cannot be written, does not count.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[int, float]] = {}

    def any_works(self, sessions: Sequence[SessionRow], now: float) -> bool:
        """Whether a session that has not ended and starts mail was seen to beat within its lease.

        One that is new here has until then to show a beat.
        """
        before, self._seen = self._seen, {}
        for session in sessions:
            if session.ended_at is None:
                beat, since = before.get(session.session_id, (session.beat, now))
                self._seen[session.session_id] = (
                    session.beat,
                    since if beat == session.beat else now,
                )
        return any(
            session.session_id in self._seen
            and now - self._seen[session.session_id][1] < session.lease_s
            and not session.held
            for session in sessions
        )

    def forget(self) -> None:
        """The sessions could not be seen: their silence until now means nothing."""
        self._seen.clear()


class MailServer:
    """One server process over one database. `start` it, `stop` it; it does not migrate."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        *,
        channels: Mapping[str, Provider] | None = None,
    ) -> None:
        self._settings = settings
        # A server that has fallen silent holds nobody up for longer than what he asked should take.
        self._database = database.with_patience(FEED_S)
        chores, database = database, database.with_patience(LOOK_UP_S)
        self._doorbell = Doorbell(settings.redis_url)
        self._feed = Feed(self._database, self._doorbell)
        lane = _lane(settings)
        if channels is None:
            channels = open_channels(
                settings.channels,
                concurrency=settings.send_concurrency,
                attempt_timeout_s=settings.attempt_timeout_s,
            )
        self._channels = channels
        self._credits = Credits(Handover(self._doorbell), list(channels))
        self._intake = Intake(
            database,
            self._doorbell,
            self._feed,
            self._credits,
            lane=lane,
            limit=settings.queue_limit,
            is_sibling=settings.sibling is not None,
        )
        rung = (database, self._doorbell, self._feed)
        self._feed.is_busy = lambda: self._intake.is_busy
        self._service = MailService(
            Parts(
                settings=settings,
                database=database,
                channels=self._channels,
                feed=self._feed,
                intake=self._intake,
                watch=Watch(database, self._feed, max_streams=settings.max_streams),
                preferences=Preferences(database, settings.categories),
                resend=Resend(*rung, lane=lane),
                clear=Clear(chores, self._doorbell, self._feed, lane=lane),
            )
        )
        self._health = health.aio.HealthServicer()
        self._servers: list[grpc.aio.Server] = []
        self._port = contextlib.ExitStack()
        self._watcher: asyncio.Task[None] | None = None
        self._witness = Witness()

    async def start(self) -> HostPort:
        """Listen; where. Raises SettingsError, SchemaError, StoreUnavailable."""
        await check_schema(self._database)
        installation = await read_installation(self._database)
        self._warn_of_what_is_open()
        await self._feed.start()
        edge = Edge(
            self._database.with_patience(LOOK_UP_S),
            keys=self._settings.auth == "keys",
            deadline_s=self._settings.default_deadline_s,
        )
        self._servers = [self._made(edge) for _ in range(LISTENERS)]
        try:
            listen = self._listen()
            await self._tell_health()
            for server in self._servers:
                await server.start()
        except BaseException:
            await self._undo_start()
            raise
        self._watcher = asyncio.create_task(self._watch_health())
        self._credits.start(installation)
        return listen

    async def _undo_start(self) -> None:
        """Let go of the port, also where only some listen on it."""
        self._port.close()
        for server in self._servers:
            with contextlib.suppress(Exception):
                await server.start()  # one that never ran does not let go of its port
                await server.stop(None)
        await self._feed.stop()

    def _made(self, edge: Edge) -> grpc.aio.Server:
        """One of gRPC's servers, with all that is served."""
        server = grpc.aio.server(options=_options(shared=self._shares_port))
        mail_service_pb2_grpc.add_MailServiceServicer_to_server(self._service, edge.around(server))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            (SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        return server

    @property
    def _shares_port(self) -> bool:
        return LISTENERS > 1 or self._settings.sibling is not None

    async def stop(self, grace_s: float | None = None) -> None:
        """End: no new calls, waiting ones answered, streams told to resume elsewhere.

        Calls and flushes under way have `grace_s` together.
        """
        grace_s = self._settings.grace_s if grace_s is None else grace_s
        clock = asyncio.get_running_loop().time
        ends_at = clock() + grace_s
        if self._watcher is not None:
            self._watcher.cancel()
        with contextlib.suppress(Exception):
            await self._health.enter_graceful_shutdown()
        self._feed.end_streams()
        self._port.close()  # others may listen here as soon as ours do not
        await asyncio.gather(*(server.stop(grace_s) for server in self._servers))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._intake.drain(), max(0.0, ends_at - clock()))
        await self._feed.stop()
        await self._credits.stop()
        for provider in self._channels.values():
            await provider.close()
        await self._doorbell.close()

    async def wait(self) -> None:
        """Return when the server has ended."""
        await asyncio.gather(*(server.wait_for_termination() for server in self._servers))

    def _listen(self) -> HostPort:
        """Bind them all to the one port; where. Raises SettingsError."""
        listen, credentials = self._settings.listen, None
        cert, key = self._settings.tls_cert_file, self._settings.tls_key_file
        if cert is not None and key is not None:
            credentials = grpc.ssl_server_credentials([read_pair(cert, key)])
        if self._shares_port and self._settings.sibling is None:  # else whoever started us holds it
            listen = self._port.enter_context(reserved(listen))
        for server in self._servers:
            try:
                if credentials is None:
                    port = server.add_insecure_port(str(listen))
                else:
                    port = server.add_secure_port(str(listen), credentials)
            except RuntimeError as error:
                raise SettingsError(
                    f"cannot listen on {listen}: the port is taken or not ours "
                    "(MAILGRPC_LISTEN chooses another)"
                ) from error
            listen = HostPort(listen.host, port)
        return listen

    def _warn_of_what_is_open(self) -> None:
        loopback = self._settings.listen.host in ("127.0.0.1", "::1", "localhost")
        if not loopback and self._settings.auth == "off":
            log.warning(
                "%s is open to whoever reaches it: MAILGRPC_AUTH=keys asks for API keys",
                self._settings.listen,
            )
        if not self._channels:
            log.warning("no channel is configured (MAILGRPC_CHANNEL_URL): every Enqueue is refused")

    async def _watch_health(self) -> None:
        while True:
            await asyncio.sleep(_HEALTH_EVERY_S)
            await self._tell_health()

    async def _tell_health(self) -> None:
        """Tell health whether the store answers and some worker lives."""
        serving = health_pb2.HealthCheckResponse.SERVING
        not_serving = health_pb2.HealthCheckResponse.NOT_SERVING
        try:
            sessions = await read_sessions(self._database)
            now = asyncio.get_running_loop().time()
            store, worker = True, self._witness.any_works(sessions, now)
        except Exception as error:
            if not isinstance(error, StoreUnavailable):
                log.exception("the health check failed")
            self._witness.forget()
            store = worker = False
        for name, good in (("", store), (SERVICE, store), (WORKERS, worker)):
            await self._health.set(name, serving if good else not_serving)


def _lane(settings: Settings) -> int:
    """The feed's lane that this process writes to: siblings follow each other."""
    if settings.sibling is None:
        return secrets.randbelow(settings.feed_lanes)
    return settings.sibling % settings.feed_lanes


def _options(*, shared: bool) -> list[tuple[str, Any]]:
    return [
        # A second server on a taken port would start and take half of the calls. Siblings are to,
        # and who started them holds the port against others.
        ("grpc.so_reuseport", int(shared)),
        ("grpc.max_receive_message_length", _RECEIVED_BYTES),
        ("grpc.max_send_message_length", -1),
        ("grpc.server.max_pending_requests", WAITING_CALLS),
        ("grpc.server.max_pending_requests_hard_limit", WAITING_CALLS),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
    ]

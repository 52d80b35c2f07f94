"""`mailgrpc doctor`: all that mailgrpc needs, looked at one by one.

Each check is a coroutine that returns what it found or raises; none of them stops the others. Only
what the settings name is checked: a machine that merely calls a server has no database.
"""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum

import click
import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from mailgrpc.cli import running
from mailgrpc.cli.output import Output, Styled
from mailgrpc.cli.process import told
from mailgrpc.cli.session import Session, pass_session
from mailgrpc.cli.words import length
from mailgrpc.cli.workers import WORKS, state_of
from mailgrpc.client import AsyncMailClient, MailError
from mailgrpc.client.endpoint import Endpoint
from mailgrpc.config import Settings, load_settings
from mailgrpc.db.engine import Database
from mailgrpc.db.schema import check_schema, wanted_revision
from mailgrpc.db.workers import read_loads
from mailgrpc.doorbell import Doorbell
from mailgrpc.errors import MailgrpcError, SchemaError, SettingsError, StoreUnavailable
from mailgrpc.providers.provider import ProbeFailed
from mailgrpc.providers.registry import open_channel
from mailgrpc.server.tls import read_pair

_CHECK_S = 10.0
_SKEW_S = 2.0
_WORKERS = "mailgrpc.workers"
_WORKER_SEEN_S = 3.0


class Mark(Enum):
    """How it stands with one thing."""

    GOOD = "✓"
    BAD = "✗"
    ABSENT = "·"  # not configured here, which may be right


_STYLES = {Mark.GOOD: "green", Mark.BAD: "bold red", Mark.ABSENT: "dim"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, how it stands, and what to do about it."""

    name: str
    mark: Mark
    text: str
    is_setting: bool = False  # what is wrong is a setting


class Trouble(Exception):
    """A check found something wrong; the text says what to do."""


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One object a line: name, ok, text.")
@pass_session
def doctor(session: Session, as_json: bool) -> None:
    """Check all that mailgrpc needs.

    The settings, PostgreSQL and its schema, Redis, the log-in of each channel, and the server with
    its workers and its clock. Nothing is sent. A dot stands for what is not configured here.
    Exit code 1 when something is wrong, 2 when a setting is.
    """
    warnings: list[str] = []
    with told():
        settings = running.found(load_settings(overrides=session.overrides, warn=warnings.append))
    output = Output()
    findings = [Finding("settings", Mark.BAD, text, is_setting=True) for text in warnings]
    findings = findings or [Finding("settings", Mark.GOOD, "no unknown ones")]
    findings += asyncio.run(_look(settings, session.endpoint()))
    for finding in findings:
        if as_json:
            ok = None if finding.mark is Mark.ABSENT else finding.mark is Mark.GOOD
            output.json({"name": finding.name, "ok": ok, "text": finding.text})
        else:
            mark = Styled(finding.mark.value, _STYLES[finding.mark])
            output.line(mark, finding.name, finding.text, widths=[1, 18])
    if any(finding.is_setting for finding in findings):
        sys.exit(2)
    sys.exit(1 if any(finding.mark is Mark.BAD for finding in findings) else 0)


async def _look(settings: Settings, endpoint: Endpoint) -> list[Finding]:
    checks = (_bounded(*check) for check in _checks(settings, endpoint))
    return list(await asyncio.gather(*checks))


def _checks(settings: Settings, endpoint: Endpoint) -> Iterator[tuple[str, Awaitable[str | None]]]:
    yield "postgres", _check_postgres(settings)
    yield "workers", _check_workers(settings)
    yield "redis", _check_redis(settings)
    if not settings.channels:
        yield "channels", _absent()
    for name, url in sorted(settings.channels.items()):
        yield f"channel {name}", _check_channel(settings, name, url)
    if settings.tls_cert_file is not None:
        yield "tls", _check_tls(settings)
    yield "server", _check_server(settings, endpoint)


async def _bounded(name: str, check: Awaitable[str | None]) -> Finding:
    try:
        async with asyncio.timeout(_CHECK_S):
            text = await check
    except TimeoutError:
        return Finding(name, Mark.BAD, f"no answer within {_CHECK_S:g} s")
    except SettingsError as error:
        return Finding(name, Mark.BAD, str(error), is_setting=True)
    except (Trouble, ProbeFailed, MailgrpcError) as error:
        return Finding(name, Mark.BAD, str(error))
    except Exception as error:  # noqa: BLE001  one check's fault is a line, and stops no other
        return Finding(name, Mark.BAD, f"{type(error).__name__}: {error}")
    if text is None:
        return Finding(name, Mark.ABSENT, "not configured here")
    return Finding(name, Mark.GOOD, text)


async def _absent() -> None:
    return None


async def _check_postgres(settings: Settings) -> str | None:
    if settings.database_url is None:
        return None
    database = Database(settings.database_url, pool_size=1)
    try:
        began_at = time.monotonic()
        await database.open()
        took_s = time.monotonic() - began_at
        try:
            await check_schema(database)
        except SchemaError as error:
            raise Trouble(str(error)) from error
        [row] = await database.fetch(
            "SELECT current_setting('server_version'), clock_timestamp(),"
            " current_setting('synchronous_commit')"
        )
        release, now, synchronous = row
        if synchronous == "off":
            raise Trouble("synchronous_commit is off: what was acknowledged could be lost")
        skew_s = abs((datetime.now(UTC) - now).total_seconds())
        if skew_s > _SKEW_S:
            raise Trouble(f"its clock and ours differ by {length(skew_s)}: start NTP on both")
        return f"{release}, schema {wanted_revision()}, connected in {length(took_s)}"
    finally:
        await database.close()


async def _check_workers(settings: Settings) -> str | None:
    """Whether somebody starts mail, and who does not."""
    if settings.database_url is None:
        return None
    try:
        database = Database(settings.database_url, pool_size=1)
    except SettingsError:
        return None  # told with PostgreSQL
    try:
        await check_schema(database)
        loads = [load for load in await read_loads(database) if load.session.ended_at is None]
    except (SchemaError, StoreUnavailable) as error:
        raise Trouble("not known: see postgres") from error
    finally:
        await database.close()
    idle = [f"{load.session.name} {state_of(load)}" for load in loads if state_of(load) != WORKS]
    if not loads:
        raise Trouble("none has a session: start `mailgrpc work`")
    if idle:
        raise Trouble(f"{len(loads) - len(idle)} of {len(loads)} work; {'; '.join(idle)}")
    return f"{len(loads)} at work"


async def _check_redis(settings: Settings) -> str | None:
    if settings.redis_url is None:
        return None
    doorbell = Doorbell(settings.redis_url)
    try:
        return await doorbell.probe()
    except Exception as error:
        raise Trouble(
            f"{error or type(error).__name__}: check MAILGRPC_REDIS_URL; mail flows without it,"
            " up to two seconds later"
        ) from error
    finally:
        await doorbell.close()


async def _check_channel(settings: Settings, name: str, url: str) -> str:
    provider = open_channel(
        name, url, concurrency=1, attempt_timeout_s=min(_CHECK_S, settings.attempt_timeout_s)
    )
    try:
        return await provider.probe()
    finally:
        await provider.close()


async def _check_tls(settings: Settings) -> str:
    assert settings.tls_cert_file is not None
    assert settings.tls_key_file is not None
    read_pair(settings.tls_cert_file, settings.tls_key_file)
    return f"{settings.tls_cert_file} and its key fit each other"


async def _check_server(settings: Settings, endpoint: Endpoint) -> str:
    """Whether it answers, has workers, takes our key and agrees about the time."""
    try:
        async with AsyncMailClient.from_settings(settings) as client:
            watch = client.watch(stop_after_s=_CHECK_S / 2, give_up_after_s=0)
            async for update in watch.updates():
                server_time = update.response.server_time.ToDatetime(UTC)
                break
            else:
                raise Trouble(f"no answer from {settings.target}")
    except MailError as error:
        raise Trouble(_server_trouble(settings, error)) from error
    skew_s = abs((datetime.now(UTC) - server_time).total_seconds())
    if skew_s > _SKEW_S:
        raise Trouble(f"its clock and ours differ by {length(skew_s)}: start NTP on both")
    # The server looks for workers every two seconds: one that has just started is waited for.
    seen_by = asyncio.get_running_loop().time() + _WORKER_SEEN_S
    while not await _lives(endpoint, _WORKERS):
        if asyncio.get_running_loop().time() < seen_by:
            await asyncio.sleep(0.2)
            continue
        raise Trouble(
            f"{settings.target} answers, but no worker starts mail: see `mailgrpc workers`"
        )
    return f"{settings.target} answers, a worker starts mail, the clocks agree"


def _server_trouble(settings: Settings, error: MailError) -> str:
    if error.code is grpc.StatusCode.UNAVAILABLE and not error.reason:
        return f"{settings.target} does not answer ({error.text}): start it with `mailgrpc up`"
    return str(error)


async def _lives(endpoint: Endpoint, service: str) -> bool:
    """What grpc.health.v1 says of a service; one that it does not know is not missed."""
    request = health_pb2.HealthCheckRequest(service=service)
    async with endpoint.aio_channel() as channel:
        try:
            answer = await health_pb2_grpc.HealthStub(channel).Check(request, timeout=_CHECK_S / 2)
        except grpc.RpcError:
            return True
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

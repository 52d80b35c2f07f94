"""What a server shows of itself: reflection, health, and a clear word when it cannot start."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from mailgrpc.config import Settings, parse_host_port
from mailgrpc.db.engine import Database
from mailgrpc.db.workers import SessionRow, open_session
from mailgrpc.errors import SchemaError, SettingsError
from mailgrpc.server import app
from mailgrpc.server.app import LISTENERS, WORKERS, MailServer, Witness
from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1 import mail_service_pb2_grpc
from tests.gateway import PATIENCE_S, Gateway, enqueue, until

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def reflected(
    gateway: Gateway, request: reflection_pb2.ServerReflectionRequest
) -> reflection_pb2.ServerReflectionResponse:
    stub = reflection_pb2_grpc.ServerReflectionStub(gateway.channel)

    async def ask():
        yield request

    async for response in stub.ServerReflectionInfo(ask()):
        return response
    raise AssertionError("no answer")


async def test_reflection_lists_the_services(server_only: Gateway) -> None:
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    found = await reflected(server_only, request)
    assert {s.name for s in found.list_services_response.service} == {
        "mailgrpc.v1.MailService",
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
    }


@pytest.mark.parametrize(
    "name",
    [
        "mailgrpc.v1.MailService",
        "mailgrpc.v1.ErrorReason",
        *(f"google.rpc.{t}" for t in ("Status", "ErrorInfo", "BadRequest", "RetryInfo")),
        "google.rpc.QuotaFailure",
    ],
)
async def test_reflection_knows_all_that_an_answer_can_hold(
    server_only: Gateway, name: str
) -> None:
    request = reflection_pb2.ServerReflectionRequest(file_containing_symbol=name)
    found = await reflected(server_only, request)
    assert not found.HasField("error_response")
    assert found.file_descriptor_response.file_descriptor_proto


async def test_a_caller_who_has_only_reflection_can_read_error_details(
    server_only: Gateway,
) -> None:
    pool = descriptor_pool.DescriptorPool()
    for name in ("google/protobuf/duration.proto", "google/rpc/error_details.proto"):
        request = reflection_pb2.ServerReflectionRequest(file_by_filename=name)
        found = await reflected(server_only, request)
        for data in found.file_descriptor_response.file_descriptor_proto:
            pool.Add(descriptor_pb2.FileDescriptorProto.FromString(data))
    kind = message_factory.GetMessageClass(pool.FindMessageTypeByName("google.rpc.ErrorInfo"))
    told = error_details_pb2.ErrorInfo(reason="REQUIRED").SerializeToString()
    assert kind.FromString(told).reason == "REQUIRED"


async def health(gateway: Gateway, service: str) -> int:
    stub = health_pb2_grpc.HealthStub(gateway.channel)
    return (await stub.Check(health_pb2.HealthCheckRequest(service=service))).status


async def test_health_is_told_from_the_first_call_on(server_only: Gateway) -> None:
    assert await health(server_only, "") == SERVING
    assert await health(server_only, "mailgrpc.v1.MailService") == SERVING
    assert await health(server_only, WORKERS) == NOT_SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health(server_only, "unheard.of")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_health_tells_that_a_worker_lives(gateway: Gateway) -> None:
    async with Gateway(gateway.settings, worker=False) as second:
        assert await health(second, WORKERS) == SERVING


async def test_health_tells_that_the_last_worker_died_without_a_word(
    settings: Settings, db: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app, "_HEALTH_EVERY_S", 0.02)
    await open_session(db, "killed", ["default"], lease_s=0.3)
    async with Gateway(settings, worker=False) as gateway:
        assert await health(gateway, WORKERS) == SERVING
        async with asyncio.timeout(PATIENCE_S):
            while await health(gateway, WORKERS) == SERVING:
                await asyncio.sleep(0.01)
        assert await health(gateway, "") == SERVING


def test_a_session_lives_as_long_as_its_beat_moves() -> None:
    def session(number: int, beat: int, *, ended: bool = False, held: str = "") -> SessionRow:
        now = datetime(2026, 1, 1, tzinfo=UTC)
        ended_at = now if ended else None
        return SessionRow(number, "", (), now, beat, now, ended_at, ended, 10.0, held, ())

    witness = Witness()
    assert not witness.any_works([], 0.0)
    assert witness.any_works([session(1, 5)], 100.0)
    assert witness.any_works([session(1, 5)], 109.0)
    assert not witness.any_works([session(1, 5)], 110.0)
    assert not witness.any_works([session(1, 5)], 120.0)
    assert witness.any_works([session(1, 6)], 121.0)
    assert witness.any_works([session(1, 6), session(2, 0)], 131.0)
    assert not witness.any_works([session(1, 6), session(2, 1, ended=True)], 132.0)
    witness.forget()  # the store was away, and the beats with it
    assert witness.any_works([session(1, 6)], 200.0)
    assert not witness.any_works([session(1, 7, held="its journal's disk is full")], 201.0)


async def test_stop_takes_no_longer_than_its_grace(
    server_only: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    intake = server_only.server._intake
    for_ever = asyncio.Event()

    async def stuck(*_: object) -> None:
        await for_ever.wait()

    monkeypatch.setattr(intake, "_flush", stuck)
    call = asyncio.ensure_future(server_only.stub.Enqueue(enqueue()))
    await until(lambda: intake._flusher is not None)
    clock = asyncio.get_running_loop().time
    begun_at = clock()
    await server_only.server.stop(1.0)
    assert clock() - begun_at < 1.7
    for_ever.set()
    with pytest.raises(grpc.aio.AioRpcError):
        await call


async def test_a_second_server_on_a_taken_port_fails_clearly(server_only: Gateway) -> None:
    taken = replace(server_only.settings, listen=parse_host_port(server_only.target))
    second = MailServer(taken, server_only.database, channels=server_only.channels)
    with pytest.raises(SettingsError, match=f"{server_only.target}.*taken.*MAILGRPC_LISTEN"):
        await second.start()
    assert await health(server_only, "") == SERVING


async def test_connections_are_spread_and_each_is_served_all(server_only: Gateway) -> None:
    # Each channel has a connection of its own; which of gRPC's servers takes it is the kernel's choice.
    alone = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(server_only.target, alone) for _ in range(4 * LISTENERS)]
    for channel in channels:
        stub = mail_service_pb2_grpc.MailServiceStub(channel)
        sent = await stub.Enqueue(enqueue())
        status = await stub.GetStatus(pb.GetStatusRequest(message_id=sent.message_id))
        assert status.status.message_id == sent.message_id
        answer = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert answer.status == SERVING
    await asyncio.gather(*(channel.close() for channel in channels))


async def test_calls_that_come_while_the_server_does_something_else_wait(
    server_only: Gateway,
) -> None:
    with grpc.insecure_channel(server_only.target) as channel:
        check = health_pb2_grpc.HealthStub(channel).Check
        # From the server's own loop, which so takes none of them in before all have come.
        calls = [check.future(health_pb2.HealthCheckRequest()) for _ in range(2500)]
        with pytest.raises(grpc.FutureTimeoutError):
            calls[0].exception(0.3)
        errors = await asyncio.to_thread(lambda: [call.exception(PATIENCE_S) for call in calls])
    assert {str(error) for error in errors} == {"None"}


async def test_a_key_file_that_is_missing_is_named(settings: Settings, db: Database) -> None:
    broken = replace(settings, tls_cert_file=Path("/no/cert"), tls_key_file=Path("/no/key"))
    with pytest.raises(SettingsError, match=r"MAILGRPC_TLS_KEY_FILE = /no/key: No such file"):
        await MailServer(broken, db, channels={}).start()


async def test_a_server_does_not_start_on_an_empty_database(
    settings: Settings, empty_database_url: str
) -> None:
    database = Database(empty_database_url, pool_size=1)
    with pytest.raises(SchemaError, match="mailgrpc migrate"):
        await MailServer(settings, database, channels={}).start()
    await database.close()

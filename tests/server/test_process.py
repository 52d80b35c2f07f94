"""What a server shows of itself: reflection, health, and a clear word when it cannot start."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from mailgrpc.config import Settings, parse_host_port
from mailgrpc.db.engine import Database
from mailgrpc.errors import SchemaError, SettingsError
from mailgrpc.server.app import WORKERS, MailServer
from tests.gateway import Gateway

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


async def test_a_second_server_on_a_taken_port_fails_clearly(server_only: Gateway) -> None:
    taken = replace(server_only.settings, listen=parse_host_port(server_only.target))
    second = MailServer(taken, server_only.database, channels=server_only.channels)
    with pytest.raises(SettingsError, match=f"{server_only.target}.*taken.*MAILGRPC_LISTEN"):
        await second.start()
    assert await health(server_only, "") == SERVING


async def test_a_key_file_that_is_missing_is_named(settings: Settings, db: Database) -> None:
    broken = replace(settings, tls_cert_file=Path("/no/cert"), tls_key_file=Path("/no/key"))
    with pytest.raises(SettingsError, match=r"MAILGRPC_TLS_CERT_FILE.*/no/key"):
        await MailServer(broken, db, channels={}).start()


async def test_a_server_does_not_start_on_an_empty_database(
    settings: Settings, empty_database_url: str
) -> None:
    database = Database(empty_database_url, pool_size=1)
    with pytest.raises(SchemaError, match="mailgrpc migrate"):
        await MailServer(settings, database, channels={}).start()
    await database.close()

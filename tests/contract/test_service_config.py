"""clients/service-config.json: every method is in it as it should be, and gRPC takes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from mailgrpc.v1 import mail_service_pb2, mail_service_pb2_grpc

SERVICE = "mailgrpc.v1.MailService"
TEXT = (Path(__file__).resolve().parents[2] / "clients/service-config.json").read_text()
config = json.loads(TEXT)


def test_every_unary_method_stands_in_it_once(contract: Any) -> None:
    named = [name["method"] for entry in config["methodConfig"] for name in entry["name"]]
    unary = [rpc.proto.name for rpc in contract.of_kind("rpc") if not rpc.proto.server_streaming]
    # Not the stream: it has no deadline, and its reader resumes it from the last token.
    assert sorted(named) == sorted(unary)
    assert {name["service"] for entry in config["methodConfig"] for name in entry["name"]} == {
        SERVICE
    }


def test_what_nobody_answered_or_looked_at_is_tried_again() -> None:
    """DEADLINE_EXCEEDED has no time left; RESOURCE_EXHAUSTED says itself when to come back."""
    for entry in config["methodConfig"]:
        assert entry["retryPolicy"] == {
            "maxAttempts": 4,
            "initialBackoff": "0.1s",
            "maxBackoff": "2s",
            "backoffMultiplier": 2,
            "retryableStatusCodes": ["UNAVAILABLE", "CANCELLED"],
        }


def test_list_events_may_wait_its_60_s() -> None:
    [entry] = [e for e in config["methodConfig"] if {"ListEvents"} & methods(e)]
    assert float(entry["timeout"].removesuffix("s")) > 60


def methods(entry: dict[str, Any]) -> set[str]:
    return {name["method"] for name in entry["name"]}


class Flaky(mail_service_pb2_grpc.MailServiceServicer):
    """Is unavailable three times, and then there."""

    calls = 0

    def GetPrefs(self, request: Any, context: Any) -> Any:
        self.calls += 1
        if self.calls < 4:
            context.abort(grpc.StatusCode.UNAVAILABLE, "not now")
        return mail_service_pb2.GetPrefsResponse()


@contextmanager
def stub_of(servicer: Any, serving: int) -> Iterator[mail_service_pb2_grpc.MailServiceStub]:
    with ThreadPoolExecutor(max_workers=4) as pool:
        server = grpc.server(pool)
        mail_service_pb2_grpc.add_MailServiceServicer_to_server(servicer, server)
        checks = health.HealthServicer()
        checks.set(SERVICE, serving)
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        try:
            options = [("grpc.service_config", TEXT), ("grpc.enable_http_proxy", 0)]
            with grpc.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
                yield mail_service_pb2_grpc.MailServiceStub(channel)
        finally:
            server.stop(None).wait()


def test_a_client_that_loads_it_rides_out_unavailable() -> None:
    flaky = Flaky()
    with stub_of(flaky, health_pb2.HealthCheckResponse.SERVING) as stub:
        stub.GetPrefs(mail_service_pb2.GetPrefsRequest(address="ada@example.org"))
    assert flaky.calls == 4


def test_a_client_that_loads_it_keeps_away_from_a_server_that_is_not_serving() -> None:
    flaky = Flaky()
    with (
        stub_of(flaky, health_pb2.HealthCheckResponse.NOT_SERVING) as stub,
        pytest.raises(grpc.RpcError) as caught,
    ):
        stub.GetPrefs(mail_service_pb2.GetPrefsRequest(address="ada@example.org"), timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert flaky.calls == 0

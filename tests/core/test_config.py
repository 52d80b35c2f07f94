"""What is shown of the settings shows no secret."""

from __future__ import annotations

import pytest

from mailgrpc.config import hide_password, load_settings
from mailgrpc.errors import SettingsError

SECRETS = (
    "smtp://shop:s3cret@host:587?tls=starttls",
    "smtp://shop:pa/s3cret#w?x@host",
    "redis://:s3cret#1@host:6379",
    "redis://:p?s3cret@host",
    "sendgrid://:s3cret@",
    "postgresql://shop@host/name?password=s3cret&sslmode=require",
    "postgresql://shop@host/name?sslPassword=s3cret",
)


@pytest.mark.parametrize("url", SECRETS)
def test_no_password_shows_however_it_is_written(url: str) -> None:
    assert "s3cret" not in hide_password(url)
    assert "****" in hide_password(url)


def test_what_holds_no_password_is_shown_as_it_is() -> None:
    url = "postgresql:///mailgrpc?host=/run/postgresql"
    assert hide_password(url) == url


def test_an_empty_variable_is_as_good_as_none() -> None:
    settings = load_settings({"MAILGRPC_REDIS_URL": "", "MAILGRPC_CHANNEL_URL": ""})
    assert settings.redis_url is None
    assert settings.channels == {}


def test_a_port_is_written_in_plain_digits() -> None:
    with pytest.raises(SettingsError, match="MAILGRPC_LISTEN"):
        load_settings({"MAILGRPC_LISTEN": "127.0.0.1:\uff11\uff12"})


def test_what_kubernetes_injects_for_a_service_of_our_name_is_not_told() -> None:
    told: list[str] = []
    environ = {
        "MAILGRPC_PORT": "tcp://10.0.0.1:50051",
        "MAILGRPC_SERVICE_HOST": "10.0.0.1",
        "MAILGRPC_SERVICE_PORT_GRPC": "50051",
        "MAILGRPC_PORT_50051_TCP_ADDR": "10.0.0.1",
        "MAILGRPC_WORKER_SERVICE_PORT": "1",
        "MAILGRPC_LEASE": "3",
    }
    load_settings(environ, warn=told.append)
    assert len(told) == 1
    assert told[0].startswith("MAILGRPC_LEASE is not a setting")

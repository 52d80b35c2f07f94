"""How the client shows who it is: API keys, and TLS to a server that it can trust."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from mailgrpc.client import AccessDeniedError, AsyncMailClient, CallPolicy, UnavailableError
from mailgrpc.client.endpoint import Endpoint
from mailgrpc.config import Settings
from mailgrpc.db.engine import Database
from mailgrpc.db.projects import create_key
from mailgrpc.server.app import MailServer
from mailgrpc.v1 import mail_service_pb2 as pb

PREFS = pb.GetPrefsRequest(address="x@example.org")


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(certificate, key) of 127.0.0.1, which vouches for itself."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    directory = tmp_path_factory.mktemp("tls")
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
            "-subj",
            "/CN=127.0.0.1",
            "-addext",
            "subjectAltName=IP:127.0.0.1",
            "-keyout",
            "key.pem",
            "-out",
            "cert.pem",
        ],
        cwd=directory,
        check=True,
        capture_output=True,
    )
    return directory / "cert.pem", directory / "key.pem"


@pytest.fixture
async def guarded(
    settings: Settings, db: Database, certificate: tuple[Path, Path]
) -> AsyncIterator[str]:
    """A server with TLS that asks for keys; where it listens."""
    cert, key = certificate
    server = MailServer(replace(settings, auth="keys", tls_cert_file=cert, tls_key_file=key), db)
    yield str(await server.start())
    await server.stop(0.5)


async def test_a_key_over_tls_is_let_in(
    guarded: str, db: Database, certificate: tuple[Path, Path]
) -> None:
    key = await create_key(db, "shop", "shop-1")
    async with AsyncMailClient(guarded, api_key=key, ca_file=certificate[0]) as client:
        assert (await client.get_prefs(PREFS)).prefs.accepts_all
        async for update in client.watch().updates():
            assert update.caught_up
            break


@pytest.mark.parametrize(("key", "reason"), [(None, "KEY_MISSING"), ("mg_no", "KEY_INVALID")])
async def test_a_caller_who_may_not_is_told_so_once(
    guarded: str, certificate: tuple[Path, Path], key: str | None, reason: str
) -> None:
    tries: list[object] = []
    async with AsyncMailClient(
        guarded, api_key=key, ca_file=certificate[0], on_retry=lambda *told: tries.append(told)
    ) as client:
        with pytest.raises(AccessDeniedError) as caught:
            await client.get_prefs(PREFS)
        with pytest.raises(AccessDeniedError):
            await anext(aiter(client.watch()))
    assert caught.value.reason == reason
    assert tries == []


@pytest.mark.parametrize("tls", [True, False])
async def test_a_server_that_is_not_trusted_gets_no_call(guarded: str, tls: bool) -> None:
    policy = CallPolicy(timeout_s=1, try_timeout_s=1)
    async with AsyncMailClient(guarded, api_key="mg_secret", tls=tls, policy=policy) as client:
        with pytest.raises(UnavailableError):
            await client.get_prefs(PREFS)


def test_the_key_is_not_shown() -> None:
    assert "secret" not in repr(Endpoint(api_key="mg_secret"))


def test_roots_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    async def call() -> None:
        async with AsyncMailClient(ca_file=tmp_path / "none.pem") as client:
            await client.get_prefs(PREFS)

    with pytest.raises(FileNotFoundError, match=r"none\.pem"):
        asyncio.run(call())

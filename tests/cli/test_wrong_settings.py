"""A wrong setting ends a program with one line that names it, and never shows a password."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from mailgrpc.cli.main import root
from mailgrpc.embedded.accounts import account_for_data, make_private_directory
from mailgrpc.embedded.binaries import copy_where_reachable, find_binaries
from tests.failover.pair import Node, until

SECRET = "hunter2"
WRONG, UNREACHABLE = 2, 1
Outcome = tuple[int, str]  # exit code, the one line
Ends = Callable[..., Outcome]


@pytest.fixture
def ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ends]:
    """`ends("serve", MAILGRPC_…=…)`: how the command ends, and the line that says why."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MAILGRPC_TARGET", "127.0.0.1:1")
    monkeypatch.setenv("MAILGRPC_CHANNEL_URL", "capture:")
    logger = logging.getLogger()
    before, level = list(logger.handlers), logger.level

    def run(command: str, **environ: str) -> Outcome:
        result = CliRunner().invoke(root, [command], env=environ)
        assert SECRET not in result.output
        assert "Traceback" not in result.output
        lines = [line for line in result.output.splitlines() if "MAILGRPC_" in line]
        if command != "doctor":  # which goes on, and tells of all that it looks at
            assert lines == result.output.splitlines()
        [line] = lines
        return result.exit_code, line

    yield run
    logger.handlers[:] = before
    logger.setLevel(level)


BAD_DATABASE_URLS = {
    "postgres:/x": "expected postgresql://",
    "mysql://u:hunter2@h/x": "expected postgresql://",
    "u:hunter2@h/x": "expected postgresql://",
    "postgresql://u:hunter2@h:port/x": "port",
    "postgresql://u:hunter2@h:99999/x": "port",
    "postgresql://u:hunter2@h:0/x": "port",
    "postgresql://u:p/hunter2@h/x": "percent-encoded",
    "postgresql://u:p@hunter2@h/x": "percent-encoded",
    "postgresql://u:p#hunter2@h/x": "percent-encoded",
    "postgresql://u:hunter2@[::1/x": "host",
    "postgresql://u:hunter2@h,,i/x": "hosts",
    "postgresql://u:hunter2@/x?host=a,b&port=1,2,3": "more ports than hosts",
    "postgresql://u:hunter2@h/x?sslmode": "NAME=VALUE",
    "postgresql://u:hunter2@127.0.0.1/x?sslmode=perhaps": "sslmode",
}


@pytest.mark.parametrize("command", ["serve", "work", "migrate", "doctor"])
def test_a_database_url_that_is_none(ends: Ends, command: str) -> None:
    for url, text in BAD_DATABASE_URLS.items():
        code, line = ends(command, MAILGRPC_DATABASE_URL=url)
        assert (code, "MAILGRPC_DATABASE_URL" in line, text in line) == (WRONG, True, True), line


@pytest.mark.parametrize("command", ["serve", "work", "migrate", "doctor"])
def test_a_database_that_is_not_there(ends: Ends, command: str) -> None:
    for hosts in ("127.0.0.1:1", "127.0.0.1:1,127.0.0.1:2"):
        url = f"postgresql://u:{SECRET}@{hosts}/x"
        code, line = ends(command, MAILGRPC_DATABASE_URL=url)
        assert code == UNREACHABLE
        assert "MAILGRPC_DATABASE_URL" in line
        assert "127.0.0.1:1: " in line


@pytest.fixture(scope="module")
def guarded() -> Iterator[Node]:
    """A server that asks the role `mailgrpc` for its password, which is `right`."""
    account = account_for_data(None)
    home = make_private_directory(account)
    binaries = find_binaries()
    if account is not None:
        binaries = copy_where_reachable(binaries, account)
    node = Node("guarded", home / "data", binaries, account)
    try:
        node.create()
        node.start()
        node.run("ALTER ROLE mailgrpc PASSWORD 'right'")
        rules = node.place / "pg_hba.conf"
        rules.write_text("host all mailgrpc 127.0.0.1/32 scram-sha-256\n" + rules.read_text())
        node.run("SELECT pg_reload_conf()")
        until(lambda: node.value("SELECT count(*) FROM pg_hba_file_rules") == 3)
        yield node
    finally:
        node.stop()
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.parametrize("command", ["serve", "work", "migrate", "doctor"])
def test_a_database_that_does_not_let_us_in(ends: Ends, guarded: Node, command: str) -> None:
    at = f"127.0.0.1:{guarded.port}"
    for url, text in {
        f"postgresql://mailgrpc:{SECRET}@{at}/mailgrpc": "password authentication failed",
        f"postgresql://mailgrpc:right@{at}/nowhere": 'database "nowhere" does not exist',
        f"postgresql://mailgrpc:right@{at}/mailgrpc?pool=3": '"pool"',
        f"postgresql://nobody:{SECRET}@{at}/mailgrpc": "nobody",
    }.items():
        code, line = ends(command, MAILGRPC_DATABASE_URL=url)
        assert (code, "MAILGRPC_DATABASE_URL" in line, text in line) == (WRONG, True, True), line


@pytest.mark.parametrize("command", ["serve", "work", "doctor"])
def test_a_redis_url_that_is_none(ends: Ends, database_url: str, command: str) -> None:
    for url in (
        "redis:/x",
        "http://:hunter2@h",
        "redis://:hunter2@h:port",
        "redis://:hunter2@h:99999",
        "redis://:p/hunter2@h",
        "redis://:p@hunter2@h",
        "redis://:hunter2@h/name",
        "redis://:hunter2@h?what=this",
        "redis://:hunter2@h?socket_timeout=long",
    ):
        environ = {"MAILGRPC_REDIS_URL": url, "MAILGRPC_DATABASE_URL": database_url}
        code, line = ends(command, **environ)
        assert (code, "MAILGRPC_REDIS_URL" in line) == (WRONG, True), line


@pytest.fixture(scope="module")
def pems(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two certificates and their keys: `a.pem`, `a.key`, `b.pem`, `b.key`."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl makes the certificate")
    folder = tmp_path_factory.mktemp("pems")
    for name in "ab":
        making = (
            "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2"
            f" -subj /CN=localhost -keyout {name}.key -out {name}.pem"
        )
        subprocess.run(making.split(), cwd=folder, check=True, capture_output=True)
    locked = f"openssl ec -in a.key -aes256 -passout pass:{SECRET} -out locked.key"
    subprocess.run(locked.split(), cwd=folder, check=True, capture_output=True)
    (folder / "garbage").write_text("garbage")
    return folder


BAD_PAIRS = [
    ("missing", "a.key", "MAILGRPC_TLS_CERT_FILE"),
    ("a.pem", "missing", "MAILGRPC_TLS_KEY_FILE"),
    ("garbage", "a.key", "MAILGRPC_TLS_CERT_FILE"),
    ("a.pem", "garbage", "MAILGRPC_TLS_KEY_FILE"),
    ("a.pem", "b.key", "MAILGRPC_TLS_KEY_FILE"),
    ("a.pem", "locked.key", "MAILGRPC_TLS_KEY_FILE"),
]


@pytest.mark.parametrize(("cert", "key", "named"), BAD_PAIRS)
def test_doctor_looks_at_certificate_and_key(
    ends: Ends, pems: Path, cert: str, key: str, named: str
) -> None:
    environ = {
        "MAILGRPC_TLS_CERT_FILE": str(pems / cert),
        "MAILGRPC_TLS_KEY_FILE": str(pems / key),
    }
    code, line = ends("doctor", **environ)
    assert (code, named in line) == (WRONG, True), line


@pytest.mark.parametrize(("cert", "key", "named"), BAD_PAIRS[1::3])
def test_a_server_does_not_start_without_its_key(
    pems: Path, database_url: str, cert: str, key: str, named: str
) -> None:
    """As a process of its own: all that it says is one line."""
    base = {k: v for k, v in os.environ.items() if not k.startswith("MAILGRPC_")}
    environ = {
        "MAILGRPC_DATABASE_URL": database_url,
        "MAILGRPC_CHANNEL_URL": "capture:",
        "MAILGRPC_LISTEN": "127.0.0.1:0",
        "MAILGRPC_TLS_CERT_FILE": str(pems / cert),
        "MAILGRPC_TLS_KEY_FILE": str(pems / key),
    }
    done = subprocess.run(
        [sys.executable, "-m", "mailgrpc", "serve"],
        env=base | environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    [line] = done.stderr.splitlines()
    assert (done.returncode, named in line) == (WRONG, True), line

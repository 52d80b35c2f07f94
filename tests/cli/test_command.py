"""The command as a whole: quick, honest about what is missing, one line for every error."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

import click
import pytest

from mailgrpc.cli.main import COMMANDS
from tests.cli.conftest import Run


def python(code: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run some Python as a process of its own, in a base environment."""
    base = {name: text for name, text in os.environ.items() if not name.startswith("MAILGRPC_")}
    return subprocess.run(
        [sys.executable, "-c", code],
        env=base | environ,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def command(*arguments: str, missing: tuple[str, ...] = (), after: str = "") -> str:
    """Code that runs the command where some packages are not installed."""
    return (
        f"import sys\nsys.modules.update(dict.fromkeys({missing!r}))\n"
        f"sys.argv = ['mailgrpc', *{arguments!r}]\n"
        f"from mailgrpc.__main__ import main\ntry:\n    main()\nfinally:\n    {after or 'pass'}"
    )


@pytest.mark.parametrize("name", COMMANDS)
def test_the_table_says_what_the_command_says(name: str) -> None:
    found = getattr(importlib.import_module(f"mailgrpc.cli.{name}"), name)
    assert isinstance(found, click.Command)
    first_line = (found.help or "").strip().splitlines()[0]
    assert first_line.startswith(COMMANDS[name].help.rstrip("."))


def test_help_loads_nothing_that_takes_time() -> None:
    done = python(
        command(
            "--help",
            after="print(sorted({'grpc', 'google', 'rich', 'sqlalchemy'} & sys.modules.keys()))",
        )
    )
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "[]"
    for name in COMMANDS:
        assert f"\n  {name} " in done.stdout


def test_every_command_has_help(run: Run) -> None:
    for name in COMMANDS:
        result = run(name, "--help")
        assert result.exit_code == 0, name
        assert "Usage: mailgrpc" in result.stdout


def test_a_base_install_says_what_to_install() -> None:
    done = python(command("send", missing=("click",)))
    assert done.returncode == 1
    assert done.stderr == "mailgrpc: the command needs click: pip install 'mailgrpc[cli]'\n"


@pytest.mark.parametrize(
    ("name", "missing", "extra"),
    [
        ("serve", "sqlalchemy", "server"),
        ("work", "arq", "server"),
        ("migrate", "alembic", "server"),
        ("doctor", "asyncpg", "server"),
    ],
)
def test_a_missing_extra_is_named(name: str, missing: str, extra: str) -> None:
    done = python(command(name, missing=(missing,)))
    assert done.returncode == 1
    assert f"pip install 'mailgrpc[{extra}]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_no_server_is_one_line_that_says_how_to_start_one(run: Run) -> None:
    result = run("--target", "127.0.0.1:1", "--timeout", "0.2", "status", "msg_1")
    assert result.exit_code == 1
    assert result.stdout == ""
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Error: no server listens at 127.0.0.1:1: start one with `mailgrpc up`")


def test_a_watch_without_a_server_ends_too(run: Run) -> None:
    result = run("--target", "127.0.0.1:1", "--timeout", "0.2", "watch")
    assert result.exit_code == 1
    assert "mailgrpc up" in result.stderr


def test_a_file_that_is_not_there_is_one_line(run: Run) -> None:
    result = run("--ca-file", "/does/not/exist.pem", "status", "msg_1")
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert "/does/not/exist.pem" in line


def test_a_wrong_setting_is_one_line(run: Run) -> None:
    result = run("config", "--json")
    assert result.exit_code == 0
    done = python(command("config"), MAILGRPC_LISTEN="nonsense")
    assert done.returncode == 1
    [line] = done.stderr.splitlines()
    assert "MAILGRPC_LISTEN" in line


def test_config_hides_secrets_and_warns_of_what_it_does_not_know() -> None:
    done = python(
        command("--api-key", "very-secret", "config"),
        MAILGRPC_DATABASE_URL="postgresql://user:hidden@host/name",
        MAILGRPC_TARGT="typo",
    )
    assert done.returncode == 0
    assert "very-secret" not in done.stdout
    assert "hidden" not in done.stdout
    assert "postgresql://user:****@host/name" in done.stdout
    assert "MAILGRPC_TARGT" in done.stderr


def test_doctor_finds_a_server_and_its_worker(run: Run, mailgrpc_target: str) -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    lines = dict(line.split("\t")[1:] for line in result.stdout.splitlines())
    assert lines["server"] == f"{mailgrpc_target} answers, a worker starts mail, the clocks agree"
    assert lines["postgres"] == "not configured here"


def test_doctor_looks_at_each_thing_for_itself(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    database_url: str,
    empty_database_url: str,
    redis_url: str,
) -> None:
    def look() -> dict[str, tuple[str, str]]:
        found = {}
        for line in run("--target", "127.0.0.1:1", "doctor").stdout.splitlines():
            mark, name, text = line.split("\t")
            found[name] = (mark, text)
        return found

    monkeypatch.setenv("MAILGRPC_DATABASE_URL", database_url)
    monkeypatch.setenv("MAILGRPC_REDIS_URL", redis_url)
    monkeypatch.setenv("MAILGRPC_CHANNEL_URL", "capture:")
    monkeypatch.setenv("MAILGRPC_CHANNEL_BULK_URL", "smtp://127.0.0.1:1")
    found = look()
    assert found["postgres"][0] == "✓"
    assert "schema" in found["postgres"][1]
    assert found["redis"][0] == "✓"
    assert found["channel default"][0] == "✓"
    assert found["channel bulk"][0] == "✗"
    assert found["server"] == ("✗", found["server"][1])
    assert "mailgrpc up" in found["server"][1]

    monkeypatch.setenv("MAILGRPC_DATABASE_URL", empty_database_url)
    monkeypatch.setenv("MAILGRPC_REDIS_URL", "redis://127.0.0.1:1")
    found = look()
    assert found["postgres"][0] == "✗"
    assert "mailgrpc migrate" in found["postgres"][1]
    assert found["redis"][0] == "✗"


def test_doctor_exits_1_and_speaks_json(run: Run) -> None:
    import json

    result = run("--target", "127.0.0.1:1", "doctor", "--json")
    assert result.exit_code == 1
    found = [json.loads(line) for line in result.stdout.splitlines()]
    assert {entry["name"]: entry["ok"] for entry in found}["server"] is False

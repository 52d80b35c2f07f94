"""Commands that ask the database find the one that `mailgrpc up` runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from mailgrpc.cli import running
from mailgrpc.config import Settings


def test_what_up_runs_is_found_until_it_ends(tmp_path: Path) -> None:
    settings = Settings(data_dir=tmp_path)
    running.write(tmp_path, "postgresql:///mailgrpc?host=/there", "unix:///there.sock")
    found = running.found(settings)
    assert (found.database_url, found.redis_url) == (
        "postgresql:///mailgrpc?host=/there",
        "unix:///there.sock",
    )
    assert (tmp_path / "up.json").stat().st_mode & 0o077 == 0
    running.remove(tmp_path)
    assert running.found(settings) == settings


def test_a_database_that_is_set_wins(tmp_path: Path) -> None:
    running.write(tmp_path, "postgresql://up", None)
    settings = replace(Settings(data_dir=tmp_path), database_url="postgresql://mine")
    assert running.found(settings).database_url == "postgresql://mine"


def test_a_broken_file_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / "up.json").write_text("{")
    assert running.found(Settings(data_dir=tmp_path)).database_url is None

"""Where `mailgrpc up` says what it runs, so that other commands find its database.

A file in the data directory, for its owner alone: who can read it can reach the database. It is
there while `up` runs; after a kill it may point at nothing, which is then told as such.
"""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import replace
from pathlib import Path

from mailgrpc.config import Settings

_NAME = "up.json"


def write(data_dir: Path, database_url: str | None, redis_url: str | None) -> None:
    """Say what runs."""
    path = data_dir / _NAME
    remove(data_dir)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump({"database_url": database_url, "redis_url": redis_url}, file)


def remove(data_dir: Path) -> None:
    """Say no more."""
    with contextlib.suppress(OSError):
        (data_dir / _NAME).unlink()


def found(settings: Settings) -> Settings:
    """The settings, with the database and the Redis of a running `up` where none is set."""
    if settings.database_url is not None:
        return settings
    try:
        said = json.loads((settings.data_dir / _NAME).read_text())
        return replace(
            settings,
            database_url=said["database_url"],
            redis_url=settings.redis_url or said["redis_url"],
        )
    except (OSError, ValueError, KeyError):
        return settings

"""Logs, and the word to whoever started this process that it is ready."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import sys
import time
from typing import Any

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%H:%M:%S", time.localtime(record.created))
        line = (
            f"{moment}.{int(record.msecs):03d} {record.levelname.lower():7} {record.getMessage()}"
        )
        line += "".join(f"  {key}={value}" for key, value in _extras(record).items())
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        entry: dict[str, Any] = {
            "time": f"{moment}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_extras(record),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, ensure_ascii=False)


def _extras(record: logging.LogRecord) -> dict[str, Any]:
    return {key: value for key, value in vars(record).items() if key not in _STANDARD}


def start_logging(form: str, level: str, *, for_people: bool) -> None:
    """Log to standard error: text for people, JSON (one object a line) for machines.

    `form` is text, json, or auto: text when `for_people` or on a terminal.
    """
    as_json = form == "json" or (form == "auto" and not for_people and not sys.stderr.isatty())
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Json() if as_json else _Text())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Their own news are ours to tell, or nobody's.
    for noisy in ("arq", "alembic", "httpx", "httpcore", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def notify_ready(fd: int | None, text: str = "") -> None:
    """Tell the supervisor on the other end of `fd` that this process does its work."""
    if fd is None:
        return
    with contextlib.suppress(OSError):
        os.write(fd, f"ready {text}\n".encode())
        os.close(fd)

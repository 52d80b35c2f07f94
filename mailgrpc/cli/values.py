"""Times and durations on the command line."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import click

_LENGTH = re.compile(r"(?P<number>\d+(?:\.\d+)?)(?P<unit>ms|s|m|h|d|w)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0, "w": 604800.0}


def parse_duration(text: str) -> timedelta:
    """`90s`, `10m`, `1.5h`, `7d`. Raises ValueError."""
    match = _LENGTH.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a duration; write 90s, 10m, 2h or 7d")
    return timedelta(seconds=float(match["number"]) * _SECONDS[match["unit"]])


def parse_when(text: str, now: datetime, *, ago: bool) -> datetime:
    """A time: ISO 8601 (local where it names no zone), `now`, or a duration from now.

    A duration without a sign lies behind us if `ago`, else ahead. Raises ValueError.
    """
    if text == "now":
        return now
    if _LENGTH.fullmatch(text.lstrip("+-")):
        backwards = text[0] == "-" or (ago and text[0] != "+")
        length = parse_duration(text.lstrip("+-"))
        return now - length if backwards else now + length
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise ValueError(
            f"{text!r} is not a time; write 2026-11-20T15:00, 2026-11-20T14:00Z, or 10m, 2h, 7d"
        ) from None
    return moment.astimezone(UTC)


def ahead(text: str) -> datetime:
    """An option's value: a time, by default in the future."""
    return _given(text, ago_by_default=False)


def ago(text: str) -> datetime:
    """An option's value: a time, by default in the past."""
    return _given(text, ago_by_default=True)


def duration(text: str) -> timedelta:
    """An option's value: a duration."""
    try:
        return parse_duration(text)
    except (ValueError, OverflowError) as error:
        raise click.BadParameter(str(error)) from None


def pair(text: str) -> tuple[str, str]:
    """An option's value: KEY=VALUE."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise click.BadParameter(f"{text!r}: expected KEY=VALUE")
    return key, value


def _given(text: str, *, ago_by_default: bool) -> datetime:
    try:
        return parse_when(text, datetime.now(UTC), ago=ago_by_default)
    except (ValueError, OverflowError) as error:
        raise click.BadParameter(str(error)) from None

"""A channel's URL, taken apart and held to what its provider knows.

    scheme://user:password@host:port?parameter=value

User and password are percent-decoded. Every parameter must be asked for by the provider: a
misspelt `tsl=starttls` stops the program instead of sending passwords in the clear. No error shows
the URL, because a password with an unescaped `/` or `#` ends up in any of its parts.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar
from urllib.parse import parse_qsl, unquote, urlsplit

from mailgrpc.errors import SettingsError

T = TypeVar("T")


@dataclass(slots=True)
class ChannelUrl:
    """The parts of one channel's URL. Parameters are taken out one by one."""

    name: str
    scheme: str
    host: str = ""
    port: int | None = None
    user: str = ""
    password: str = field(default="", repr=False)
    parameters: dict[str, str] = field(default_factory=dict)
    _asked: list[str] = field(default_factory=list)

    def fault(self, text: str) -> SettingsError:
        """The error to raise for this channel."""
        return SettingsError(f"channel {self.name}: {text}")

    def parameter(self, name: str, parse: Callable[[str], T], default: T) -> T:
        """Take the parameter `name` out; `parse` raises ValueError for a wrong one."""
        self._asked.append(name)
        text = self.parameters.pop(name, None)
        if text is None:
            return default
        try:
            return parse(text)
        except ValueError as error:
            raise self.fault(f"{name}={text}: {error}") from None

    def finish(self) -> None:
        """Refuse parameters that nobody asked for."""
        for unknown in self.parameters:
            close = difflib.get_close_matches(unknown, self._asked, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(self._asked)}"
            raise self.fault(f"unknown parameter {unknown} ({hint})")


def parse_channel_url(name: str, url: str) -> ChannelUrl:
    """Take `url` apart. Raises SettingsError without showing any of it."""
    fault = SettingsError(
        f"channel {name}: not a URL of the form scheme://user:password@host:port?parameter=value"
        " (are special characters in the password percent-encoded?)"
    )
    try:
        parts = urlsplit(url)
        port = parts.port
        pairs = parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
    except ValueError:
        raise fault from None
    if not parts.scheme or parts.path not in ("", "/") or parts.fragment:
        raise fault
    if len(dict(pairs)) < len(pairs):
        raise SettingsError(f"channel {name}: a parameter of the URL stands twice")
    return ChannelUrl(
        name=name,
        scheme=parts.scheme.lower(),
        host=parts.hostname or "",
        port=port,
        user=unquote(parts.username or ""),
        password=unquote(parts.password or ""),
        parameters=dict(pairs),
    )


def seconds(text: str) -> float:
    """A parameter that is a time in seconds, more than none."""
    value = float(text)
    if not 0 < value < 1e6:
        raise ValueError("expected seconds, more than 0")
    return value


def existing_file(text: str) -> Path:
    """A parameter that is the path of a file."""
    path = Path(text)
    if not path.is_file():
        raise ValueError("no such file")
    return path


def choice(*allowed: str) -> Callable[[str], str]:
    """A parameter that is one of a few words."""

    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"expected one of {', '.join(allowed)}")
        return text

    return parse


def is_loopback(host: str) -> bool:
    """Whether what is said to `host` stays on this machine."""
    return host in ("localhost", "::1") or host.startswith("127.")

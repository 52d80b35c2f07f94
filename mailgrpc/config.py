"""The settings: the one place that reads the environment and `mailgrpc.toml`.

A setting NAME is looked for as `MAILGRPC_NAME`, for a secret also as `MAILGRPC_NAME_FILE` (a file
whose content, without a trailing newline, is the value), then as key `name` in `mailgrpc.toml`
(in the working directory, or the path in `MAILGRPC_CONFIG`), then its default. A wrong value or
an unknown key in the file stops the program with one line that names the setting. An unknown
environment variable only warns, and one that Kubernetes injects for a Service of our name does not.

Channels are URLs: `MAILGRPC_CHANNEL_URL` is the channel `default`, `MAILGRPC_CHANNEL_<NAME>_URL`
is the channel `<name>` (lowercased, `_` becomes `-`); in the file, a table `[channels]`.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mailgrpc.core.message import DEFAULT_CHANNEL
from mailgrpc.errors import SettingsError

PREFIX = "MAILGRPC_"
_CHANNEL_VARIABLE = re.compile(r"MAILGRPC_CHANNEL_(?:(?P<name>[A-Z0-9_]+)_)?URL(?P<file>_FILE)?")
_CHANNEL_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


_INJECTED = re.compile(
    r"MAILGRPC(_\w+)?_(SERVICE_(HOST|PORT(_\w+)?)|PORT(_\d+_(TCP|UDP)(_(PROTO|PORT|ADDR))?)?)"
)
"""What Kubernetes sets in every container beside a Service whose name begins with ours."""


@dataclass(frozen=True, slots=True)
class HostPort:
    """Where to listen or connect. IPv6 hosts are written in brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_host_port(text: str) -> HostPort:
    """`127.0.0.1:50051`, `[::1]:50051` or `:50051` (all interfaces)."""
    host, separator, port = text.rpartition(":")
    if not separator or not re.fullmatch("[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError("expected HOST:PORT, e.g. 127.0.0.1:50051")
    return HostPort(host.strip("[]") or "0.0.0.0", int(port))  # noqa: S104  the caller's own wish


def _parse_seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < 1e9:
            return value
    raise ValueError("expected seconds, more than 0, such as 30 or 0.5")


def _parse_count(text: str) -> int:
    with contextlib.suppress(ValueError):
        if (value := int(text)) >= 1:
            return value
    raise ValueError("expected a whole number of at least 1")


def _parse_categories(text: str) -> Mapping[str, int]:
    """`receipts=1,newsletter=2`: name = bit number, 1 to 30 (bit 0 is reserved)."""
    categories: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, separator, bit = part.partition("=")
        if not separator or not bit.isdigit() or not 1 <= int(bit) <= 30:
            raise ValueError(f"{part!r}: expected NAME=BIT with a bit from 1 to 30")
        if not re.fullmatch(r"[a-z0-9][a-z0-9_.-]{0,63}", name):
            raise ValueError(f"{name!r}: a category's name is lowercase letters, digits and _.-")
        if name in categories or int(bit) in categories.values():
            raise ValueError(f"{part!r}: name or bit stands twice")
        categories[name] = int(bit)
    return categories


def _choice(*allowed: str) -> Callable[[str], str]:
    def parse(text: str) -> str:
        if text not in allowed:
            raise ValueError(f"expected one of {', '.join(allowed)}")
        return text

    return parse


def _setting(default: Any, parse: Callable[[str], Any], doc: str, *, secret: bool = False) -> Any:
    # Without a `doc` it is between our own processes, and not shown.
    metadata = {"parse": parse, "doc": doc, "secret": secret}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Everything that can be set, with its default. Times end in `_s` and are seconds."""

    listen: HostPort = _setting(
        lambda: HostPort("127.0.0.1", 50051), parse_host_port, "where gRPC listens"
    )
    processes: int = _setting(1, _parse_count, "server processes that share the port (Linux)")
    database_url: str | None = _setting(
        None, str, "PostgreSQL, e.g. postgresql://user:password@host/mailgrpc", secret=True
    )
    redis_url: str | None = _setting(
        None,
        str,
        "Redis or Valkey, e.g. redis://host:6379/0; without it mail still flows, slower",
        secret=True,
    )
    categories: Mapping[str, int] = _setting(
        dict, _parse_categories, "names of flag bits, e.g. receipts=1,newsletter=2"
    )
    data_dir: Path = _setting(
        lambda: Path(".mailgrpc"),
        Path,
        "where `mailgrpc up` keeps its data, and a worker its journal",
    )
    journal_dir: Path | None = _setting(
        None, Path, "where a worker keeps results that PostgreSQL lacks; default DATA_DIR/journal"
    )
    log_format: str = _setting("auto", _choice("auto", "text", "json"), "auto, text or json")
    log_level: str = _setting(
        "info", _choice("debug", "info", "warning", "error"), "debug, info, warning or error"
    )
    inbox_smtp_listen: HostPort = _setting(
        lambda: HostPort("127.0.0.1", 1025), parse_host_port, "where the local inbox listens"
    )
    auth: str = _setting(
        "off",
        _choice("off", "keys"),
        "off: who reaches the port is project `default`; keys: API keys",
    )
    tls_cert_file: Path | None = _setting(None, Path, "PEM certificate chain of the gRPC server")
    tls_key_file: Path | None = _setting(None, Path, "PEM private key of the gRPC server")
    database_pool: int = _setting(8, _parse_count, "PostgreSQL connections a process may open")
    lease_s: float = _setting(30.0, _parse_seconds, "a worker silent for this long has ended")
    grace_s: float = _setting(25.0, _parse_seconds, "how long SIGTERM waits for work in flight")
    send_concurrency: int = _setting(8, _parse_count, "provider calls at once, a channel a worker")
    attempt_timeout_s: float = _setting(
        120.0,
        _parse_seconds,
        "bound on one attempt; the answer to a mail that was handed over may take a quarter more",
    )
    queue_limit: int = _setting(5000, _parse_count, "Enqueue calls that may wait in one server")
    max_streams: int = _setting(2000, _parse_count, "WatchStatus streams a server process serves")
    default_deadline_s: float = _setting(
        30.0,
        _parse_seconds,
        "bound on a unary call that brings no deadline, and on waits for the store",
    )
    feed_lanes: int = _setting(
        4, _parse_count, "lanes that processes of this installation write to"
    )
    event_retention_s: float = _setting(
        7 * 86400.0, _parse_seconds, "how long events can be resumed from (at least 72 h)"
    )
    retention_days: int | None = _setting(
        None, _parse_count, "whole days older than this are dropped; without it all is kept"
    )
    channels: Mapping[str, str] = field(default_factory=dict, metadata={"secret": True})

    # Set by `mailgrpc up` for its children: where to say that one is ready, and that there is one
    # log for all, for people.
    ready_fd: int | None = _setting(None, _parse_count, "")
    under_up: bool = _setting(False, lambda text: text == "1", "")
    # Set by `mailgrpc serve --processes` for its children: which of them this one is.
    sibling: int | None = _setting(None, _parse_count, "")
    # Set by the fault suite: see failpoints.py.
    failpoints: str = _setting("", str, "")

    test_database_url: str | None = _setting(
        None,
        str,
        "a PostgreSQL server for `mailgrpc.testing`, instead of an embedded one",
        secret=True,
    )

    # The client's own settings.
    target: str = _setting("127.0.0.1:50051", str, "the server that the client commands call")
    api_key: str | None = _setting(None, str, "the client's API key", secret=True)
    ca_file: Path | None = _setting(None, Path, "PEM roots to trust; turns TLS on in the client")


def load_settings(
    environ: Mapping[str, str] | None = None,
    *,
    path: Path | None = None,
    overrides: Mapping[str, str] | None = None,
    warn: Callable[[str], None] = lambda _text: None,
) -> Settings:
    """Read the settings.

    `overrides` (a command's flags; the same names as the fields, as text) win over all else.
    Raises SettingsError with one line that names the setting.
    """
    environ = os.environ if environ is None else environ
    texts: dict[str, tuple[str, str]] = {}  # field -> (text, where it was found)
    channels: dict[str, str] = {}
    known = {f.name: f for f in fields(Settings) if f.name != "channels"}

    _read_file(path or _settings_path(environ), known, texts, channels)
    for variable, text in environ.items():
        if not _is_ours(variable):
            continue
        if match := _CHANNEL_VARIABLE.fullmatch(variable):
            name = (match["name"] or DEFAULT_CHANNEL).lower().replace("_", "-")
            channels[name] = _read_secret(variable, text) if match["file"] else text
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name in known and not text:
            texts.pop(name, None)  # empty is as good as unset, and overrules the file
        elif name in known:
            texts[name] = (text, variable)
        elif (base := name.removesuffix("_file")) in known and known[base].metadata["secret"]:
            texts[base] = (_read_secret(variable, text), variable)
        else:
            warn(f"{variable} is not a setting of mailgrpc{_hint(name, known)}; ignored")
    for name, text in (overrides or {}).items():
        texts[name] = (text, f"--{name.replace('_', '-')}")

    channels = {name: url for name, url in channels.items() if url}
    values: dict[str, Any] = {"channels": _checked_channels(channels)}
    for name, (text, source) in texts.items():
        try:
            values[name] = known[name].metadata["parse"](text)
        except ValueError as error:
            shown = "(secret)" if known[name].metadata["secret"] else repr(text)
            raise SettingsError(f"{source} = {shown}: {error}") from None
    settings = Settings(**values)
    _check_together(settings)
    return settings


def describe_settings(settings: Settings) -> list[tuple[str, str, str]]:
    """(name, value with secrets hidden, what it is) of every setting, for `mailgrpc config`."""
    rows = []
    for f in fields(Settings):
        value = getattr(settings, f.name)
        if f.metadata.get("doc") == "":
            continue
        if f.name == "channels":
            for name, url in sorted({DEFAULT_CHANNEL: None, **value}.items()):
                part = "" if name == DEFAULT_CHANNEL else f"{name.upper().replace('-', '_')}_"
                shown = "-" if url is None else hide_password(url)
                rows.append((f"{PREFIX}CHANNEL_{part}URL", shown, f"where mail of {name} goes"))
            continue
        if value is None:
            text = "-"
        elif isinstance(value, Mapping):
            text = ",".join(f"{name}={bit}" for name, bit in value.items()) or "-"
        elif f.metadata["secret"]:
            text = hide_password(value) if "://" in value else "****"
        else:
            text = str(value)
        rows.append((f"{PREFIX}{f.name.upper()}", text, f.metadata["doc"]))
    return rows


def hide_password(url: str) -> str:
    """The URL with its password replaced, fit for a log.

    Up to the last `@`, whatever stands in between: a password that should have been encoded
    (`/`, `#`, `?`) must not show because of that.
    """
    url = re.sub(r"(?i)(?<=[?&])((?:ssl)?password=)[^&]*", r"\1****", url)
    return re.sub(r"(?s)(?<=://)([^:/?#@]*):.*@", r"\1:****@", url)


def _settings_path(environ: Mapping[str, str]) -> Path | None:
    if named := environ.get("MAILGRPC_CONFIG"):
        if not Path(named).is_file():
            raise SettingsError(f"MAILGRPC_CONFIG = {named!r}: no such file")
        return Path(named)
    usual = Path("mailgrpc.toml")
    return usual if usual.is_file() else None


def _read_file(
    path: Path | None,
    known: Mapping[str, Any],
    texts: dict[str, tuple[str, str]],
    channels: dict[str, str],
) -> None:
    if path is None:
        return
    try:
        content = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"{path}: {error}") from None
    for key, value in content.items():
        if key == "channels" and isinstance(value, dict):
            channels.update({name: str(url) for name, url in value.items()})
        elif key == "categories" and isinstance(value, dict):
            texts[key] = (",".join(f"{k}={v}" for k, v in value.items()), f"{path}: {key}")
        elif key in known and isinstance(value, bool | int | float | str):
            texts[key] = (str(value), f"{path}: {key}")
        elif key in known or key == "channels":
            raise SettingsError(f"{path}: {key}: expected a plain value")
        else:
            raise SettingsError(f"{path}: unknown key {key!r}{_hint(key, known)}")


def _is_ours(variable: str) -> bool:
    """Whether an environment variable is meant to be a setting."""
    named = variable.startswith(PREFIX) and variable != "MAILGRPC_CONFIG"
    return named and not _INJECTED.fullmatch(variable)


def _read_secret(variable: str, path: str) -> str:
    try:
        return Path(path).read_text().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{variable} = {path!r}: {error}") from None


def _checked_channels(channels: Mapping[str, str]) -> Mapping[str, str]:
    for name in channels:
        if not _CHANNEL_NAME.fullmatch(name):
            raise SettingsError(f"channel {name!r}: lowercase letters, digits and -, at most 63")
    return dict(channels)


def _check_together(settings: Settings) -> None:
    if (settings.tls_cert_file is None) != (settings.tls_key_file is None):
        raise SettingsError("MAILGRPC_TLS_CERT_FILE and MAILGRPC_TLS_KEY_FILE go together")
    if settings.event_retention_s < 72 * 3600:
        raise SettingsError(
            "MAILGRPC_EVENT_RETENTION_S: at least 259200 (72 h): tokens are promised that long"
        )
    if settings.retention_days is not None and settings.retention_days > 36500:
        raise SettingsError("MAILGRPC_RETENTION_DAYS: at most 36500; leave it out to keep all")
    if settings.lease_s < 3:
        raise SettingsError("MAILGRPC_LEASE_S: at least 3: workers look at each other each second")
    if settings.feed_lanes > 16:
        raise SettingsError("MAILGRPC_FEED_LANES: at most 16")
    if settings.processes > 64:
        raise SettingsError("MAILGRPC_PROCESSES: at most 64")


def _hint(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""

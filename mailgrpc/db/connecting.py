"""From the URL of a database to a connection that may be written to.

A URL may name several servers (`postgresql://user:password@host1,host2/name`, or `?host=a,b`): a
primary and its standbys. Only one that takes writes is used, so after a fail-over the same URL
leads to the new primary. They are asked in turn, first the one that was good the last time, and
each has its share of the time-out: one that is switched off, and answers nothing at all, must not
use up the time in which the next would have answered.

Nothing here shows a password. What of a broken URL is its password cannot be told, so the errors
about one say which part is wrong and repeat none of it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NoReturn, TypeAlias
from urllib.parse import parse_qsl, unquote, urlsplit

import asyncpg
from asyncpg.connect_utils import SessionAttribute

from mailgrpc.errors import MailgrpcError, SettingsError, StoreUnavailable

Connection: TypeAlias = "asyncpg.Connection[asyncpg.Record]"
Host: TypeAlias = tuple[str, int]
"""A name, an address or the directory of a socket; and the port."""

SCHEMA = "mailgrpc"
SETTING = "MAILGRPC_DATABASE_URL"
CONNECT_TIMEOUT_S = 5.0
"""For all hosts of a URL together."""
_DEFAULT_PORT = 5432
_ENCODE = "special characters in a user or password have to be percent-encoded"
# It was reached, and says that what the URL asks for is not to be had there.
_WRONG = (
    asyncpg.InvalidAuthorizationSpecificationError,  # and its child, the wrong password
    asyncpg.InvalidCatalogNameError,  # no such database
    asyncpg.UndefinedObjectError,  # no such parameter
    asyncpg.InvalidParameterValueError,
    asyncpg.CantChangeRuntimeParamError,
    asyncpg.InsufficientPrivilegeError,
)


class Refused(StoreUnavailable):
    """The server answers and does not let us in: at a start that is a wrong setting."""


def told_at_start(error: StoreUnavailable) -> MailgrpcError:
    """The same for whoever starts a program: with the setting that it is about."""
    if isinstance(error, Refused):
        return SettingsError(f"{SETTING}: {error}")
    return StoreUnavailable(f"PostgreSQL cannot be reached ({SETTING}): {error}")


def hosts_of(url: str) -> list[Host]:
    """The servers that a URL names, in its order; none where it leaves that to PGHOST.

    Raises SettingsError where it is no URL of a PostgreSQL.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        _fault("its host is broken")
    if parts.scheme not in ("postgresql", "postgres") or "://" not in url:
        _fault("expected postgresql://USER:PASSWORD@HOST/DATABASE")
    if parts.netloc.count("@") > 1 or "@" in parts.path or parts.fragment:
        _fault(f"it cannot be taken apart; {_ENCODE}")
    try:
        query = dict(parse_qsl(parts.query, strict_parsing=True)) if parts.query else {}
    except ValueError:
        _fault("what follows the ? is not NAME=VALUE&…")
    named = parts.netloc.rpartition("@")[2]
    if named:
        return [_host(text, None) for text in unquote(named).split(",")]
    names = list(filter(None, query.get("host", "").split(",")))
    ports = query["port"].split(",") if query.get("port") else []
    if len(ports) not in (0, 1, len(names)):
        _fault("it names more ports than hosts, or fewer")
    if len(ports) == 1:
        ports *= len(names)
    return [_host(name, ports[n] if ports else None) for n, name in enumerate(names)]


def _host(text: str, port: str | None) -> Host:
    if text.startswith("/"):
        return text, _port(port)
    found = re.fullmatch(
        r"(?:\[(?P<v6>[0-9A-Fa-f:.%\w]+)\]|(?P<name>[^:\[\]]*))(?::(?P<port>.*))?", text
    )
    if found is None or not (found["v6"] or found["name"]):
        _fault(f"one of its hosts is none; {_ENCODE}")
    return found["v6"] or found["name"], _port(found["port"] or port)


def _port(text: str | None) -> int:
    if not text:
        return _DEFAULT_PORT
    if not re.fullmatch("[0-9]{1,5}", text) or not 0 < int(text) < 65536:
        _fault(f"its port is not a number from 1 to 65535; {_ENCODE}")
    return int(text)


def _fault(text: str) -> NoReturn:
    raise SettingsError(f"{SETTING}: {text}") from None


class Connector:
    """Makes connections by one URL. Raises SettingsError at once where that is none."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._hosts = hosts_of(url)

    async def connect(self, *, command_timeout: float | None, application_name: str) -> Connection:
        """One connection to a server that takes writes, with our schema in its path.

        Raises StoreUnavailable where none can be had now, Refused where one says why not, and
        SettingsError where the URL asks for what the driver does not know.
        """
        tried: list[tuple[str, Exception]] = []
        hosts: list[Host | None] = [*self._hosts] or [None]
        for host in hosts:
            try:
                connection = await self._connect_to(host, command_timeout, application_name)
            except (OSError, asyncpg.PostgresError, asyncpg.InternalClientError) as error:
                tried.append((_shown(host), error))
            except ValueError as error:  # asyncpg.ClientConfigurationError is one
                # Refused, not SettingsError: a certificate that is just being replaced is there
                # again in a moment, and at a start this ends the program all the same.
                raise Refused(str(error)) from error
            except asyncpg.InterfaceError as error:
                tried.append((_shown(host), error))
            else:
                self._ask_first(host)
                return connection
        raise _outcome(tried)

    def met_silence(self) -> None:
        """The server that is in use did not answer: the others are asked before it."""
        self._hosts = self._hosts[1:] + self._hosts[:1]

    def _ask_first(self, host: Host | None) -> None:
        if host is not None and self._hosts[0] != host:
            self._hosts.remove(host)
            self._hosts.insert(0, host)

    async def _connect_to(
        self, host: Host | None, command_timeout: float | None, application_name: str
    ) -> Connection:
        return await asyncpg.connect(
            self._url,
            host=None if host is None else host[0],
            port=None if host is None else host[1],
            timeout=CONNECT_TIMEOUT_S / max(len(self._hosts), 1),
            command_timeout=command_timeout,
            target_session_attrs=SessionAttribute.read_write,
            server_settings={
                "application_name": application_name,
                "search_path": SCHEMA,
                # Short statements over arrays: compiling them costs more than running them.
                "jit": "off",
            },
        )


def _outcome(tried: Sequence[tuple[str, Exception]]) -> StoreUnavailable:
    wrong = [(where, error) for where, error in tried if isinstance(error, _WRONG)]
    text = "; ".join(f"{where}{_reason(error)}" for where, error in wrong or tried)
    return Refused(text) if wrong else StoreUnavailable(text)


def _reason(error: Exception) -> str:
    if isinstance(error, asyncpg.TargetServerAttributeNotMatched):
        return "it takes no writes"
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return " ".join(str(error).split()) or type(error).__name__


def _shown(host: Host | None) -> str:
    if host is None:
        return ""
    name, port = host
    return f"{name}: " if name.startswith("/") else f"{name}:{port}: "

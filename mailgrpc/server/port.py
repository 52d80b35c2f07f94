"""A port for several servers: held against everybody else, shared by ours.

What is promised: while `reserved` lasts, servers of this process and of its children can listen on
the port with SO_REUSEPORT, and nobody else's server gets it, also while none of them lives. If the
port is not free, that is an error here, before one of them starts.

What can go wrong: a second `serve --processes` would set SO_REUSEPORT too, so that the kernel lets
it in and half of the calls go to it. So one socket does both jobs, and never listens:

  - It is bound without SO_REUSEPORT, which the kernel refuses while anybody listens there, whatever
    he has set. (With SO_REUSEADDR: connections of an earlier server that are still in TIME_WAIT
    hold nobody up.)
  - Once bound it is given SO_REUSEPORT, so that the children may listen beside it, and loses
    SO_REUSEADDR, so that nobody without SO_REUSEPORT may.

Two that start at the same moment would both be bound before either has a child that listens. The
name of an abstract Unix socket is theirs to win before: taken by one at a time, in the same network
namespace as the port, gone with its process. (A lock file would need a directory that both can
write to, and containers that share a network rarely share one.) Linux alone has that, and on Linux
alone SO_REUSEPORT spreads connections.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
from collections.abc import Iterator

from mailgrpc.config import HostPort
from mailgrpc.errors import SettingsError


@contextlib.contextmanager
def reserved(listen: HostPort) -> Iterator[HostPort]:
    """Hold the port; where it is, with a number chosen in the place of 0. Raises SettingsError."""
    if sys.platform != "linux":
        raise SettingsError("--processes: several processes can share a port on Linux alone")
    with contextlib.ExitStack() as held:
        try:
            port = _reserve_all(held, listen)
        except (OSError, UnicodeError) as error:  # a name that cannot be one is a UnicodeError
            raise SettingsError(
                f"cannot listen on {listen}: {_why(error)} (MAILGRPC_LISTEN chooses another)"
            ) from error
        yield HostPort(listen.host, port)


def _reserve_all(held: contextlib.ExitStack, listen: HostPort) -> int:
    """The port, on each address of the host that this machine has, as gRPC listens."""
    port, reserved_any, missing = listen.port, False, None
    for family, host in _addresses(listen):
        try:
            port = _reserve(held, family, host, port)
            reserved_any = True
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
            missing = error  # `localhost` is also ::1 where there is no IPv6
    if missing is not None and not reserved_any:
        raise missing
    return port


def _addresses(listen: HostPort) -> list[tuple[socket.AddressFamily, str]]:
    """All that the host's name stands for."""
    found = socket.getaddrinfo(
        listen.host, listen.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )
    return [(family, str(address[0])) for family, _, _, _, address in found]


def _reserve(held: contextlib.ExitStack, family: socket.AddressFamily, host: str, port: int) -> int:
    if port:
        # Before the port itself: see above. A port that the kernel chooses is nobody else's.
        name = held.enter_context(socket.socket(socket.AF_UNIX))
        name.bind(f"\0mailgrpc-serve-{HostPort(host, port)}")
    place = held.enter_context(socket.socket(family, socket.SOCK_STREAM))
    if family == socket.AF_INET6:
        place.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    place.bind((host, port))
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 0)
    return int(place.getsockname()[1])


def _why(error: OSError | UnicodeError) -> str:
    if isinstance(error, UnicodeError):
        return "that is no host"
    if error.errno == errno.EADDRINUSE:
        return "the port is taken"
    return (error.strerror or str(error)).lower()

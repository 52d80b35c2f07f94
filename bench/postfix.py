"""Postfix, the peer: an instance of its own beside whatever else is installed here.

What it does is what mailgrpc does: take a mail, make it durable, answer, hand it to a relay. Its
durability is as it ships (a queue file is fsynced before the 250), and everything else is set for
throughput, as its own TUNING_README has it and as this machine showed:

    in_flow_delay = 0                       clients are never slowed for the queue's sake
    default_process_limit                   a process for each client and each relay connection
    default_destination_concurrency_limit   the connections to the sink: as many as mailgrpc opens,
    initial_destination_concurrency         and all of them from the first mail on
    qmgr_message_active_limit               no mail waits outside of the active queue
    smtp_connection_cache_destinations      connections to the sink are kept
    max_use, max_idle                       processes live on
    no DNS, no lists, no look-ups of names, no filters, no rate counters, no TLS, no chroot
    relay by address, loopback alone, no SMTPUTF8, nothing rewritten that need not be
    logs to a file of the instance, unsynced

Needs root, as Postfix does. Where it cannot be run, `why_absent` says why.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.family import tree, tree_cpu_s
from bench.machine import PLACE

_MAIN = """
compatibility_level = 3.6
queue_directory = {place}/queue
data_directory = {place}/data
mail_owner = postfix
setgid_group = postdrop
maillog_file = {place}/log
maillog_file_prefixes = {place}
myhostname = postfix.example.org
mydestination =
mynetworks = 127.0.0.0/8
inet_interfaces = 127.0.0.1
inet_protocols = ipv4
relayhost = [127.0.0.1]:{relay_port}
alias_maps =
alias_database =
local_recipient_maps =
disable_dns_lookups = yes
smtp_host_lookup = native
smtputf8_enable = no
biff = no

smtpd_peername_lookup = no
smtpd_recipient_restrictions =
smtpd_relay_restrictions = permit_mynetworks, reject
smtpd_client_connection_count_limit = 0
smtpd_client_port_logging = no
smtpd_tls_security_level = none
receive_override_options = no_address_mappings, no_header_body_checks, no_milters
smtp_tls_security_level = none

in_flow_delay = 0
default_process_limit = 400
max_use = 1000000
max_idle = 3600s
default_destination_concurrency_limit = {connections}
initial_destination_concurrency = {connections}
qmgr_message_active_limit = 200000
qmgr_message_recipient_limit = 200000
smtp_connection_cache_destinations = [127.0.0.1]:{relay_port}
smtp_connection_reuse_count_limit = 0
"""

# service type private unprivileged chroot wakeup limit command
_MASTER = """
127.0.0.1:{port} inet n - n - - smtpd
cleanup   unix  n - n - 0 cleanup
qmgr      unix  n - n 300 1 qmgr
rewrite   unix  - - n - - trivial-rewrite
bounce    unix  - - n - 0 bounce
defer     unix  - - n - 0 bounce
trace     unix  - - n - 0 bounce
smtp      unix  - - n - {connections} smtp
relay     unix  - - n - {connections} smtp
error     unix  - - n - - error
retry     unix  - - n - - error
proxymap  unix  - - n - - proxymap
scache    unix  - - n - 1 scache
anvil     unix  - - n - 1 anvil
tlsmgr    unix  - - n 1000? 1 tlsmgr
postlog   unix-dgram n - n - 1 postlogd
"""


_LIFELINE = 'setsid "$@" & read -r _; exec 2>/dev/null; kill $!; wait $!'
"""Ends master when the pipe on its input is closed, which it is too when the bench is killed. Master
has a session of its own, because at its end it signals its whole process group."""


def why_absent() -> str:
    """Why there is no Postfix to measure; empty: there is."""
    if not shutil.which("postfix"):
        return "Postfix is not installed here"
    return "" if os.geteuid() == 0 else "Postfix has to be started by root"


@dataclass(frozen=True, slots=True)
class Postfix:
    port: int
    pid: int
    place: Path

    def cpu_s(self) -> float:
        """Processor seconds of all its processes so far."""
        return tree_cpu_s(self.pid)

    def queued(self) -> int:
        """How many mails it still holds."""
        queues = ("maildrop", "incoming", "active", "deferred", "hold")
        return sum(len(files) for q in queues for *_, files in os.walk(self.place / "queue" / q))


@contextlib.contextmanager
def postfix(relay_port: int, connections: int) -> Iterator[Postfix]:
    """Run it, with so many connections to the relay on this port of the loopback."""
    with tempfile.TemporaryDirectory(prefix="mailgrpc-bench-postfix-", dir=PLACE) as path:
        place = Path(path)
        place.chmod(0o755)
        port = _free_port()
        config = place / "config"
        for directory in (config, place / "queue", place / "data"):
            directory.mkdir()
        shutil.chown(place / "data", "postfix")
        settings = {
            "place": place, "port": port, "relay_port": relay_port, "connections": connections
        }  # fmt: skip
        (config / "main.cf").write_text(_MAIN.format(**settings))
        (config / "master.cf").write_text(_MASTER.format(**settings))
        # Makes the queue's directories, with their owners.
        subprocess.run(["postfix", "-c", config, "check"], check=True)
        daemons = Path(_setting(config, "daemon_directory"))
        process = subprocess.Popen(
            ["sh", "-c", _LIFELINE, "sh", daemons / "master", "-c", config, "-s"],
            env={**os.environ, "MAIL_CONFIG": str(config)},
            stdin=subprocess.PIPE,
        )
        try:
            _await_greeting(port, place / "log")
            yield Postfix(port, process.pid, place)
        finally:
            _end(process)


def _setting(config: Path, name: str) -> str:
    asked = ["postconf", "-c", str(config), "-h", name]
    return subprocess.run(asked, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _await_greeting(port: int, log: Path) -> None:
    for _ in range(100):
        with (
            contextlib.suppress(OSError),
            socket.create_connection(("127.0.0.1", port), 1) as there,
        ):
            if there.recv(3) == b"220":
                return
        time.sleep(0.1)
    raise SystemExit(f"Postfix does not answer:\n{log.read_text() if log.exists() else ''}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End master, and see that those whom it ran are gone before their directory is."""
    family = tree(process.pid)
    assert process.stdin is not None
    process.stdin.close()
    process.wait(20)
    for _ in range(100):
        left = [pid for pid in family if Path(f"/proc/{pid}").exists()]
        if not left:
            return
        time.sleep(0.05)
    for pid in left:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)

"""What the client does to the process that it lives in: forks, threads, imports."""

from __future__ import annotations

import subprocess
import sys
import threading

from mailgrpc.client import MailClient
from mailgrpc.v1 import mail_service_pb2 as pb

FORKING = """
import os, sys
from mailgrpc.client import MailClient
from mailgrpc.v1 import mail_service_pb2 as pb

client = MailClient(sys.argv[1])
ask = lambda: client.get_prefs(pb.GetPrefsRequest(address="x@example.org"), timeout_s=10)
ask()
child = os.fork()
if child == 0:
    ask()
    os._exit(7)
_, status = os.waitpid(child, 0)
assert os.waitstatus_to_exitcode(status) == 7, status
ask()
print("both")
"""


def test_parent_and_child_go_on_after_a_fork(mailgrpc_target: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKING, mailgrpc_target],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout == "both\n", done.stderr


def test_threads_share_a_client(mailgrpc_client: MailClient) -> None:
    answers: list[pb.GetPrefsResponse] = []

    def ask() -> None:
        for _ in range(20):
            answers.append(mailgrpc_client.get_prefs(pb.GetPrefsRequest(address="x@example.org")))

    threads = [threading.Thread(target=ask) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(answers) == 8 * 20


def test_the_base_install_is_enough() -> None:
    """grpcio, protobuf and googleapis-common-protos; nothing else is even looked for."""
    code = (
        "import sys, mailgrpc.client; print(sorted({name.partition('.')[0] for name in sys.modules}"
        " & {'click', 'rich', 'sqlalchemy', 'asyncpg', 'arq', 'httpx', 'uvloop', 'idna'}),"
        " 'mailgrpc.config' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "[] False\n"

"""The gateway's own process: `python -m mailgrpc.testing.process SOCKET`.

Server and worker in one event loop, over channels that send nothing: each mail goes to the tests'
process through SOCKET, and counts as sent once it has arrived there. So whoever sees SENT finds
the mail in the outbox.
"""

from __future__ import annotations

import asyncio
import pickle
import signal
import sys
import threading
from multiprocessing.connection import Client, Connection

from mailgrpc.config import Settings, load_settings
from mailgrpc.core import ids
from mailgrpc.core.delivery import Result, Role
from mailgrpc.core.event import created_at_of
from mailgrpc.db.engine import Database
from mailgrpc.db.migrate import migrate
from mailgrpc.errors import MailgrpcError
from mailgrpc.providers.capture import Captured, CaptureProvider
from mailgrpc.providers.provider import SendCall
from mailgrpc.server.app import MailServer
from mailgrpc.telemetry import notify_ready, start_logging
from mailgrpc.testing.outbox import SentMail
from mailgrpc.worker.runtime import Worker

_STOP_S = 2.0


class TellingProvider(CaptureProvider):
    """The provider `capture`, which hands every mail to the tests before it says that it is sent."""

    def __init__(self, tests: Connection, lock: threading.Lock) -> None:
        super().__init__()
        self._tests = tests
        self._lock = lock

    async def send(self, call: SendCall) -> list[Result]:
        """Keep it, and tell."""
        results = await super().send(call)
        for captured in [captured for captured in self.outbox if captured.call is call]:
            self.outbox.remove(captured)
            await asyncio.to_thread(self._tell, _sent_mail(captured))
        return results

    def _tell(self, mail: SentMail) -> None:
        with self._lock:
            self._tests.send_bytes(pickle.dumps(mail))
            self._tests.recv_bytes()


def _sent_mail(captured: Captured) -> SentMail:
    call, message = captured.call, captured.call.message

    def reached(role: Role) -> tuple[str, ...]:
        return tuple(r.address for r in captured.recipients if r.role is role)

    return SentMail(
        message_id=ids.to_text(ids.MESSAGE, call.message_id),
        created_at=created_at_of(call.message_id),
        sender=message.sender.address if message.sender else "",
        to=reached(Role.TO),
        cc=reached(Role.CC),
        bcc=reached(Role.BCC),
        subject=message.subject,
        text=message.text,
        html=message.html,
        attachments=message.attachments,
        tags=message.tags,
        categories=message.categories,
        custom_args=dict(message.custom_args),
        correlation_id=message.correlation_id,
        raw=captured.raw,
    )


async def _serve(settings: Settings, tests: Connection) -> None:
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    lock = threading.Lock()
    channels = {name: TellingProvider(tests, lock) for name in settings.channels}
    database = Database(settings.database_url, pool_size=settings.database_pool)
    try:
        server = MailServer(settings, database, channels=channels)
        worker = Worker(settings, database, channels=channels)
        where = await server.start()
        await worker.start()
        notify_ready(settings.ready_fd, str(where))
        await stopped.wait()
        await worker.stop(_STOP_S)
        await server.stop(_STOP_S)
    finally:
        await database.close()


def main(outbox: str) -> int:
    """Serve until SIGTERM; the exit code."""
    try:
        settings = load_settings()
        start_logging(settings.log_format, settings.log_level, for_people=True)
        assert settings.database_url is not None
        migrate(settings.database_url)
        with Client(outbox, family="AF_UNIX") as tests:
            asyncio.run(_serve(settings, tests))
    except MailgrpcError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

"""For the tests of services that send mail: the real gateway, and what it sent.

A pytest plugin; installing `mailgrpc[embedded]` is all there is to set up. A test of a service:

    from mailgrpc.client import MailClient

    def test_an_order_sends_a_receipt(mailgrpc_target, mailgrpc_outbox):
        shop = Shop(mail=MailClient(mailgrpc_target))
        shop.order("ada@example.org", "a book")

        [mail] = mailgrpc_outbox.wait_for(1)
        assert mail.to == ("ada@example.org",)
        assert mail.subject == "Your receipt"
        assert mail.attachments[0].filename == "invoice.pdf"

    def test_an_empty_order_sends_nothing(mailgrpc_target, mailgrpc_outbox):
        Shop(mail=MailClient(mailgrpc_target)).order("ada@example.org")

        mailgrpc_outbox.settle()
        assert mailgrpc_outbox.mails == []

Fixtures:

    mailgrpc_server    (session) the gateway: `.target`, `.new_outbox()`
    mailgrpc_target    (session) its address, for whatever client the service has
    mailgrpc_channel   (session) a blocking gRPC channel to it
    mailgrpc_client    (session) a `MailClient` of it
    mailgrpc_outbox    (each test) the mails that were enqueued since this test began
    mailgrpc_options   (session) override it in a conftest.py: the arguments of `run_mailgrpc`

It is the real server and the real worker, in a process of their own, on a PostgreSQL and a Valkey
of their own in a temporary directory; only the last step, the network to the mail provider, keeps
the mail instead. So idempotency, preferences, retries and the status stream behave as in
production. Nothing in the environment can make it send: it has no other channel. A run under
pytest-xdist has one gateway a process. `MAILGRPC_TEST_DATABASE_URL` names a PostgreSQL server to
use instead of the embedded one; a database is made there and dropped at the end.

Addresses at `example.test` misbehave on purpose: `temperror+2@` refuses twice and then accepts,
`permerror@` refuses for good, `timeout@` and `drop@` leave it open. Other addresses accept.

Without pytest:

    with run_mailgrpc(categories={"newsletter": 2}) as gateway:
        outbox = gateway.new_outbox()
        ...
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mailgrpc.testing.gateway import TestGateway

if find_spec("pytest") is not None:  # without it `run_mailgrpc` serves other frameworks
    from mailgrpc.testing.fixtures import (
        mailgrpc_channel,
        mailgrpc_client,
        mailgrpc_options,
        mailgrpc_outbox,
        mailgrpc_server,
        mailgrpc_target,
    )

__all__ = [
    "mailgrpc_channel",
    "mailgrpc_client",
    "mailgrpc_options",
    "mailgrpc_outbox",
    "mailgrpc_server",
    "mailgrpc_target",
    "run_mailgrpc",
]


def run_mailgrpc(**options: Any) -> TestGateway:
    """A gateway to be used as a context manager; the arguments are those of `TestGateway`.

    Raises EmbeddedError when something is not installed or does not start.
    """
    # Loaded here: every run of pytest where mailgrpc is installed imports this module.
    try:
        from mailgrpc.testing.gateway import TestGateway  # noqa: PLC0415
    except ModuleNotFoundError as error:
        from mailgrpc.errors import EmbeddedError  # noqa: PLC0415

        raise EmbeddedError(
            f"mailgrpc.testing needs {error.name}: pip install 'mailgrpc[embedded]'"
        ) from error
    return TestGateway(**options)

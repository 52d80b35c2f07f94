"""`mailgrpc show`: a message as it was handed over, and all its attempts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import click

from mailgrpc.cli.output import Cell, Output, Styled
from mailgrpc.cli.session import Session, json_option, pass_session
from mailgrpc.cli.status import MESSAGE_PREFIX, show_status
from mailgrpc.cli.words import local_time, outcome_cell, result_text
from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1.delivery_pb2 import Attempt, Delivery
from mailgrpc.v1.message_pb2 import Mailbox, MailMessage, Recipient


@click.command()
@click.argument("message", metavar="ID")
@click.option("--full", is_flag=True, help="With --json: the attachments' data, too.")
@json_option
@pass_session
def show(session: Session, message: str, full: bool, as_json: bool) -> None:
    """Show a message with its content and attempts.

    ID is the message's (`msg_…`), or the request_id that it was handed over with.
    """
    view = pb.MESSAGE_VIEW_FULL if full else pb.MESSAGE_VIEW_BASIC
    request = pb.GetMessageRequest(view=view)
    if message.startswith(MESSAGE_PREFIX):
        request.message_id = message
    else:
        request.request_id = message
    with session.client() as client:
        answer = client.get_message(request)
    output = Output()
    if as_json:
        output.json(answer)
        return
    show_status(output, answer.status)
    output.text("")
    _show_attempts(output, answer.attempts, answer.status.deliveries)
    if answer.HasField("message"):
        output.text("")
        _show_mail(output, answer.message, answer.rfc_message_id)


def _show_attempts(
    output: Output, attempts: Iterable[Attempt], deliveries: Iterable[Delivery]
) -> None:
    recipients = {delivery.delivery_id: delivery.recipient for delivery in deliveries}

    def rows() -> Iterator[Sequence[Cell]]:
        for attempt in attempts:
            yield (
                recipients.get(attempt.delivery_id, attempt.delivery_id),
                str(attempt.number),
                local_time(attempt.started_at),
                f"{attempt.channel} ({attempt.provider})",
                outcome_cell(attempt),
                result_text(attempt.result),
            )

    output.table(("recipient", "attempt", "started", "channel", "outcome", "answer"), rows())


def _show_mail(output: Output, mail: MailMessage, rfc_message_id: str) -> None:
    fields = [
        ("From", _written([mail.sender])),
        ("To", _written(mail.to)),
        ("Cc", _written(mail.cc)),
        ("Bcc", _written(mail.bcc)),
        ("Reply-To", _written(mail.reply_to)),
        ("Subject", mail.subject),
        ("Message-ID", rfc_message_id),
        *((header.name, header.value) for header in mail.headers),
        *(("Attachment", attachment.filename) for attachment in mail.attachments),
    ]
    for name, text in fields:
        if text:
            output.line(Styled(f"{name}:", "dim"), text)
    for body in filter(None, (mail.text, mail.html)):
        output.text("")
        output.text(body)


def _written(boxes: Iterable[Mailbox | Recipient]) -> str:
    return ", ".join(f"{box.name} <{box.address}>" if box.name else box.address for box in boxes)

"""`mailgrpc status`: where a message stands."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import click

from mailgrpc.cli.output import Cell, Output, Styled
from mailgrpc.cli.session import Session, json_option, pass_session
from mailgrpc.cli.words import delivery_detail, local_time, state_cell
from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1.delivery_pb2 import Delivery, MessageStatus

MESSAGE_PREFIX = "msg_"


@click.command()
@click.argument("message", metavar="ID")
@json_option
@pass_session
def status(session: Session, message: str, as_json: bool) -> None:
    """Tell where a message stands.

    ID is the message's (`msg_…`), or the request_id that it was handed over with.
    """
    request = pb.GetStatusRequest()
    if message.startswith(MESSAGE_PREFIX):
        request.message_id = message
    else:
        request.request_id = message
    with session.client() as client:
        answer = client.get_status(request)
    output = Output()
    if as_json:
        output.json(answer)
        return
    show_status(output, answer.status)


def show_status(output: Output, message: MessageStatus) -> None:
    """A message and its deliveries. A pipe gets one line a delivery."""
    if output.is_terminal:
        output.line(message.message_id, state_cell(message.state), Styled(message.subject, "bold"))
        facts = {
            "accepted": local_time(message.created_at),
            "request_id": message.request_id,
            "correlation_id": message.correlation_id,
            "tags": " ".join(message.tags),
        }
        for name, text in facts.items():
            if text:
                output.line(Styled(name, "dim"), text, widths=[14])
    heading = ("recipient", "state", "since", "attempts", "detail")
    output.table(heading, _rows(message.deliveries))


def _rows(deliveries: Sequence[Delivery]) -> Iterator[Sequence[Cell]]:
    for delivery in deliveries:
        yield (
            delivery.recipient,
            state_cell(delivery.state),
            local_time(delivery.state_since),
            str(delivery.attempt_count),
            delivery_detail(delivery),
        )

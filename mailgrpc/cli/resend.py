"""`mailgrpc resend`: one more attempt."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence

import click

from mailgrpc.cli.output import Cell, Output, Styled
from mailgrpc.cli.session import Session, json_option, pass_session
from mailgrpc.cli.words import state_cell
from mailgrpc.client import error_from_item
from mailgrpc.v1 import mail_service_pb2 as pb


@click.command()
@click.argument("message", metavar="ID")
@click.option("--to", "recipients", multiple=True, metavar="ADDRESS", help="Only to these.")
@click.option(
    "--accept-duplicate-risk",
    is_flag=True,
    help="Also what was sent, or may have been: somebody may get the mail twice.",
)
@click.option("--request-id", default="", help="Repeating the command with it forces only once.")
@json_option
@pass_session
def resend(
    session: Session,
    message: str,
    recipients: Sequence[str],
    accept_duplicate_risk: bool,
    request_id: str,
    as_json: bool,
) -> None:
    """Force one more attempt.

    ID is the message's, `msg_…`. Exit code 1 when a delivery was not resent; each says why.
    """
    request = pb.ResendRequest(
        message_id=message,
        recipients=recipients,
        accept_duplicate_risk=accept_duplicate_risk,
        request_id=request_id,
    )
    with session.client() as client:
        answer = client.resend(request)
    output = Output()
    if as_json:
        output.json(answer)
    else:
        output.table(("recipient", "state", "result"), _rows(answer.results))
    sys.exit(1 if any(result.HasField("error") for result in answer.results) else 0)


def _rows(results: Sequence[pb.ResendResult]) -> Iterator[Sequence[Cell]]:
    for result in results:
        outcome: Cell = Styled("resent", "green")
        if result.HasField("error"):
            error = error_from_item(result.error)
            outcome = Styled(f"{error.reason}: {error.text}", "red")
        yield result.delivery.recipient, state_cell(result.delivery.state), outcome

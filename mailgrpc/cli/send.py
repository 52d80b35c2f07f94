"""`mailgrpc send`: hand over one mail, and with --wait tell what became of it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, cast

import click

from mailgrpc.cli.output import Cell, Output, Styled
from mailgrpc.cli.session import Session, json_option, pass_session
from mailgrpc.cli.values import ahead, duration, pair
from mailgrpc.cli.words import event_detail, length, move_cell, state_cell, suppression_name
from mailgrpc.client import Mail, MailClient, NotEndedError, compose
from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1.delivery_pb2 import DeliveryState

EXIT_SUPPRESSED = 3
EXIT_FAILED = 4
EXIT_OUTCOME_UNKNOWN = 5
EXIT_NOT_ENDED = 6

EXIT_CODES = {
    DeliveryState.DELIVERY_STATE_SENT: 0,
    DeliveryState.DELIVERY_STATE_DELIVERED: 0,
    DeliveryState.DELIVERY_STATE_SUPPRESSED: EXIT_SUPPRESSED,
    DeliveryState.DELIVERY_STATE_OUTCOME_UNKNOWN: EXIT_OUTCOME_UNKNOWN,
    DeliveryState.DELIVERY_STATE_QUEUED: EXIT_NOT_ENDED,
    DeliveryState.DELIVERY_STATE_SENDING: EXIT_NOT_ENDED,
    DeliveryState.DELIVERY_STATE_DEFERRED: EXIT_NOT_ENDED,
}
"""By the state of the whole message; every other state is EXIT_FAILED."""


def _body(text: str | None, path: str | None) -> str:
    """A body given as text, or as a file, or on stdin."""
    if path is None:
        return text or ""
    return sys.stdin.read() if path == "-" else Path(path).read_text("utf-8")


@click.command(
    epilog="Exit codes with --wait: 0 SENT to all, 3 suppressed for somebody, 4 failed (or bounced,"
    " cancelled, expired), 5 outcome unknown: it may or may not have been sent, 6 not ended within"
    " the time. Where recipients differ, the worst counts. stdout has the message's id; with --json"
    " the EnqueueResponse, and with --wait then the GetStatusResponse."
)
@click.option("--from", "sender", required=True, metavar="ADDRESS", help="Ada <ada@example.org>")
@click.option("--to", multiple=True, metavar="ADDRESS", help="May be given many times.")
@click.option("--cc", multiple=True, metavar="ADDRESS")
@click.option("--bcc", multiple=True, metavar="ADDRESS")
@click.option("--reply-to", multiple=True, metavar="ADDRESS")
@click.option("--subject", required=True)
@click.option("--text", help="The body as plain text.")
@click.option("--text-file", metavar="FILE", help="The same from a file; - is stdin.")
@click.option("--html", help="The body as HTML.")
@click.option("--html-file", metavar="FILE", help="The same from a file; - is stdin.")
@click.option(
    "--attach",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A file that goes with it.",
)
@click.option(
    "--header", multiple=True, type=pair, metavar="KEY=VALUE", help="An additional header."
)
@click.option("--category", "categories", multiple=True, help="What kind of mail it is, by name.")
@click.option(
    "--flag", "bits", multiple=True, type=click.IntRange(1, 30), help="The same by bit, 1 to 30."
)
@click.option("--tag", "tags", multiple=True, help="A label to filter by.")
@click.option(
    "--arg",
    "custom_args",
    multiple=True,
    type=pair,
    metavar="KEY=VALUE",
    help="Comes back in events.",
)
@click.option("--correlation-id", default="", help="What it belongs to, e.g. an order.")
@click.option(
    "--mode",
    type=click.Choice(["retrying", "send-once"]),
    help="Without proof that it was sent: try again (the default), or not.",
)
@click.option("--priority", type=click.Choice(["bulk", "normal", "high", "urgent"]))
@click.option("--channel", default="", help="Through which channel; `default` by default.")
@click.option(
    "--at", "send_at", type=ahead, metavar="TIME", help="Not before (ISO 8601, or 10m from now)."
)
@click.option("--expire", "expire_at", type=ahead, metavar="TIME", help="Not after.")
@click.option(
    "--dedupe",
    type=duration,
    metavar="DURATION",
    help="Not if the same went to them within this time.",
)
@click.option("--request-id", default="", help="Repeating the command with it never sends twice.")
@click.option("--validate-only", is_flag=True, help="Check it and store nothing.")
@click.option("--wait", is_flag=True, help="Wait for the end, and show what happens on stderr.")
@click.option(
    "--wait-timeout",
    type=duration,
    metavar="DURATION",
    default="60s",
    show_default=True,
    help="At most that long.",
)
@json_option
@pass_session
def send(
    session: Session, /, as_json: bool, wait: bool, wait_timeout: timedelta, **given: Any
) -> None:
    """Hand over one mail."""
    request = _request(**given)
    output, notes = Output(), Output(sys.stderr, for_people=True)
    with session.client() as client:
        response = client.enqueue(request)
        if as_json:
            output.json(response)
        elif request.validate_only:
            output.line("valid")
        else:
            _tell_accepted(output, response)
        for delivery in response.not_queued:
            reason = suppression_name(delivery.suppression_reason)
            notes.line(f"not queued: {delivery.recipient}", reason)
        if wait and not request.validate_only:
            sys.exit(_wait(client, response, wait_timeout, output if as_json else None, notes))


def _request(
    *,
    text: str | None,
    text_file: str | None,
    html: str | None,
    html_file: str | None,
    attach: Sequence[Path],
    header: Sequence[tuple[str, str]],
    bits: Sequence[int],
    custom_args: Sequence[tuple[str, str]],
    mode: str | None,
    priority: str | None,
    dedupe: timedelta | None,
    send_at: datetime | None,
    expire_at: datetime | None,
    **plain: Any,
) -> pb.EnqueueRequest:
    if (text is not None and text_file) or (html is not None and html_file):
        raise click.UsageError("--text and --text-file, --html and --html-file exclude each other")
    if text_file == html_file == "-":
        raise click.UsageError("only one of --text-file and --html-file can be stdin")
    optional = {
        "mode": mode and mode.upper().replace("-", "_"),
        "priority": priority and priority.upper(),
        "dedupe_window": dedupe,
        "send_at": send_at,
        "expire_at": expire_at,
    }
    mail = {
        **plain,  # options that are named as the arguments of a mail
        **{name: value for name, value in optional.items() if value is not None},
        "headers": header,
        "attachments": attach,
        "custom_args": dict(custom_args),
        "flags": sum(1 << bit for bit in set(bits)),
    }
    try:
        mail |= {"text": _body(text, text_file), "html": _body(html, html_file)}
        return compose(**cast("Mail", mail))
    except (OSError, UnicodeDecodeError) as error:
        raise click.ClickException(str(error)) from error


def _tell_accepted(output: Output, response: pb.EnqueueResponse) -> None:
    cells: list[Cell] = [response.message_id]
    if output.is_terminal:
        cells.append(state_cell(response.state))
        if response.replayed:
            cells.append(Styled("replayed: it was accepted before, nothing new was made", "dim"))
    output.line(*cells)


def _wait(
    client: MailClient,
    response: pb.EnqueueResponse,
    wait_timeout: timedelta,
    json_output: Output | None,
    notes: Output,
) -> int:
    """Show what happens to the message until it has ended; the exit code."""
    begun_at = time.monotonic()
    timeout_s = wait_timeout.total_seconds()
    message_id = response.message_id
    for event in client.follow(message_id, token=response.resume_token, timeout_s=timeout_s):
        since = Styled(f"+{time.monotonic() - begun_at:.3f}", "dim")
        notes.line(
            since, event.recipient, move_cell(event), event_detail(event), widths=[8, 28, 20]
        )
    answer = client.get_status(pb.GetStatusRequest(message_id=message_id))
    if json_output is not None:
        json_output.json(answer)
    if not answer.status.ended:
        error = NotEndedError(answer.status, timeout_s)
        click.echo(f"{error.text}; it goes on: `mailgrpc status {message_id}`", err=True)
        return EXIT_NOT_ENDED
    notes.line(state_cell(answer.status.state), f"after {length(time.monotonic() - begun_at)}")
    return EXIT_CODES.get(answer.status.state, EXIT_FAILED)

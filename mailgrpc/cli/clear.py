"""`mailgrpc clear`: remove many messages, one call after another."""

from __future__ import annotations

import sys
from datetime import datetime

import click

from mailgrpc.cli.filters import filter_options
from mailgrpc.cli.output import Output
from mailgrpc.cli.session import Session, json_option, pass_session
from mailgrpc.cli.values import ago
from mailgrpc.client import MailClient
from mailgrpc.client.compose import timestamp
from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1.delivery_pb2 import MessageFilter

_COUNTED = 100_000  # the most that one call counts
A_CALL = 10_000
"""Messages that one call removes: a step of the progress."""


@click.command()
@click.option(
    "--before",
    type=ago,
    metavar="TIME",
    required=True,
    help="Only messages accepted before (ISO 8601, or 30d ago).",
)
@filter_options
@click.option("--force", is_flag=True, help="Also what has not ended; it is not sent then.")
@click.option("--dry-run", is_flag=True, help="Count and remove nothing.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@json_option
@pass_session
def clear(
    session: Session,
    before: datetime,
    message_filter: MessageFilter,
    force: bool,
    dry_run: bool,
    yes: bool,
    as_json: bool,
) -> None:
    """Remove messages that have ended.

    Counts and asks before it removes anything; where nobody can be asked, --yes is needed. What is
    being sent always stays.
    """
    message_filter.created_before.CopyFrom(timestamp(before))
    request = pb.ClearRequest(filter=message_filter, force=force, max_messages=A_CALL)
    output = Output()
    with session.client() as client:
        if dry_run or not yes:
            counted = _count(client, request)
            if dry_run:
                _tell(output, counted, "would be removed", as_json=as_json)
                return
            if not _agreed(counted):
                raise click.ClickException("nothing was removed")
        _clear(client, request, output, as_json=as_json)


def _count(client: MailClient, request: pb.ClearRequest) -> pb.ClearResponse:
    counting = pb.ClearRequest()
    counting.CopyFrom(request)
    counting.validate_only = True
    counting.max_messages = _COUNTED
    return client.clear(counting)


def _can_ask() -> bool:
    return sys.stdin.isatty()


def _agreed(counted: pb.ClearResponse) -> bool:
    """Ask, where there is somebody to ask."""
    if not _can_ask():
        raise click.UsageError("this is not a terminal: repeat with --yes, or with --dry-run")
    more = "more than " if counted.more else ""
    return click.confirm(f"Remove {more}{counted.cleared_count} messages?", err=True)


def _clear(client: MailClient, request: pb.ClearRequest, output: Output, *, as_json: bool) -> None:
    total = pb.ClearResponse(more=True)
    while total.more:
        answer = client.clear(request)
        if as_json:
            output.json(answer)
        elif answer.more:
            click.echo(f"{total.cleared_count + answer.cleared_count} removed …", err=True)
        total.cleared_count += answer.cleared_count
        total.sending_count = answer.sending_count
        total.more = answer.more
    if not as_json:
        _tell(output, total, "removed", as_json=False)


def _tell(output: Output, answer: pb.ClearResponse, what: str, *, as_json: bool) -> None:
    if as_json:
        output.json(answer)
        return
    more = " and more" if answer.more else ""
    output.line(f"{answer.cleared_count}{more} {what}")
    if answer.sending_count:
        output.line(f"{answer.sending_count} stay: they are being sent")
    if output.is_terminal and answer.sample_message_ids:
        output.line(f"among them {', '.join(answer.sample_message_ids[:3])}")

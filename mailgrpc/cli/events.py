"""`mailgrpc events`: what happened after a token, without a stream."""

from __future__ import annotations

import sys
from datetime import timedelta

import click

from mailgrpc.cli.filters import filter_options
from mailgrpc.cli.output import Output
from mailgrpc.cli.session import Session, json_option, pass_session
from mailgrpc.cli.values import duration
from mailgrpc.cli.watch import show_event
from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1.delivery_pb2 import MessageFilter


@click.command()
@click.option("--token", default="", help="After this place; without it, from now.")
@filter_options
@click.option("--limit", type=click.IntRange(1), default=1000, show_default=True)
@click.option(
    "--wait",
    type=duration,
    metavar="DURATION",
    help="How long to wait for the first event, up to 60s.",
)
@json_option
@pass_session
def events(
    session: Session,
    token: str,
    message_filter: MessageFilter,
    limit: int,
    wait: timedelta | None,
    as_json: bool,
) -> None:
    """List what happened after a resume token.

    Every answer that shows a state carries such a token: `mailgrpc send --json` and
    `mailgrpc status --json` print theirs. The token to go on with is printed to stderr. With --json
    each page is one ListEventsResponse, which has its own.
    """
    output = Output()
    request = pb.ListEventsRequest(filter=message_filter, resume_token=token)
    if wait is not None:
        request.wait.FromTimedelta(wait)
    left = limit
    with session.client() as client:
        while True:
            request.page_size = min(left, 1000)
            answer = client.list_events(request)
            if as_json:
                output.json(answer)
            else:
                for event in answer.events:
                    show_event(output, event)
            left -= len(answer.events)
            if not answer.more or left <= 0:
                break
            request.resume_token = answer.resume_token
            request.ClearField("wait")
    if not as_json:
        click.echo(f"go on with: --token {answer.resume_token}", file=sys.stderr)

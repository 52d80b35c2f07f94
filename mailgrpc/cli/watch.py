"""`mailgrpc watch`: what happens, as it happens."""

from __future__ import annotations

from datetime import timedelta

import click

from mailgrpc.cli.filters import filter_options
from mailgrpc.cli.output import Output, Styled
from mailgrpc.cli.session import Session, json_option, pass_session
from mailgrpc.cli.values import duration
from mailgrpc.cli.words import event_detail, local_time, move_cell, state_cell
from mailgrpc.client import Update
from mailgrpc.v1 import mail_service_pb2 as pb
from mailgrpc.v1.delivery_pb2 import MessageFilter
from mailgrpc.v1.event_pb2 import Event

_SNAPSHOTS = {
    "none": pb.SNAPSHOT_UNSPECIFIED,
    "unended": pb.SNAPSHOT_UNENDED,
    "all": pb.SNAPSHOT_ALL,
}


@click.command()
@filter_options
@click.option("--token", default="", help="After this place; without it, from now.")
@click.option(
    "--snapshot",
    type=click.Choice(list(_SNAPSHOTS)),
    default="none",
    help="Begin with the messages as they are; `all` needs a filter, such as --since 1h.",
)
@click.option("--heartbeat", type=duration, metavar="DURATION", default="15s", show_default=True)
@click.option(
    "--for", "stop_after", type=duration, metavar="DURATION", help="Stop after this time."
)
@json_option
@pass_session
def watch(
    session: Session,
    message_filter: MessageFilter,
    token: str,
    snapshot: str,
    heartbeat: timedelta,
    stop_after: timedelta | None,
    as_json: bool,
) -> None:
    """Show what happens, as it happens.

    It goes on over restarts of the server, without a gap or a repeat. At the end the token to go
    on with is printed to stderr. With --json each line is a WatchStatusResponse, heartbeats left
    out; its `resumeToken` stands for the place after it.
    """
    output = Output()
    last = token
    with session.client() as client:
        stream = client.watch(
            filter=message_filter,
            token=token,
            snapshot=_SNAPSHOTS[snapshot],
            heartbeat_s=heartbeat.total_seconds(),
            stop_after_s=None if stop_after is None else stop_after.total_seconds(),
        )
        try:
            for update in stream.updates():
                if not (update.events or update.snapshot):  # nothing that could stay unshown
                    last = update.token or last
                if not as_json:
                    _show(output, update)
                elif update.events or update.snapshot or update.caught_up:
                    output.json(update.response)
                last = update.token or last
        finally:
            stream.close()
            if last:
                click.echo(f"go on with: --token {last}", err=True)


def show_event(output: Output, event: Event) -> None:
    """One line."""
    output.line(
        Styled(local_time(event.occurred_at, millis=True), "dim"),
        event.message_id,
        event.recipient,
        move_cell(event),
        event_detail(event),
        widths=[12, 30, 28, 20],
    )


def _show(output: Output, update: Update) -> None:
    if update.snapshot_begins:
        click.echo("snapshot:", err=True)
    for message in update.snapshot:
        output.line(
            Styled(local_time(message.updated_at, millis=True), "dim"),
            message.message_id,
            ", ".join(delivery.recipient for delivery in message.deliveries),
            state_cell(message.state),
            message.subject,
            widths=[12, 30, 28, 20],
        )
    for event in update.events:
        show_event(output, event)
    if update.caught_up:
        click.echo("caught up; waiting for what happens", err=True)

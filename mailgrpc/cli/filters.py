"""The options that make a MessageFilter, the same for every command that takes one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Any

import click

from mailgrpc.cli.values import ago
from mailgrpc.client.compose import timestamp
from mailgrpc.v1.delivery_pb2 import DeliveryState, MessageFilter

STATES = tuple(name.removeprefix("DELIVERY_STATE_") for name in DeliveryState.keys()[1:])

_OPTIONS = (
    click.option("--message", "messages", multiple=True, metavar="ID", help="Only these messages."),
    click.option("--correlation-id", "correlation_ids", multiple=True, help="Only with these."),
    click.option("--recipient", "recipients", multiple=True, help="Only to these addresses."),
    click.option("--tag", "tags", multiple=True, help="Only with one of these tags."),
    click.option(
        "--state",
        "states",
        multiple=True,
        type=click.Choice(STATES, case_sensitive=False),
        help="Only in one of these states; of events, the new state.",
    ),
    click.option(
        "--since", type=ago, metavar="TIME", help="Only messages accepted since (ISO, or 2h)."
    ),
)


def filter_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options; the command gets the argument `message_filter` instead."""

    @functools.wraps(command)
    def run(
        *args: Any,
        messages: Sequence[str],
        correlation_ids: Sequence[str],
        recipients: Sequence[str],
        tags: Sequence[str],
        states: Sequence[str],
        since: datetime | None,
        **rest: Any,
    ) -> Any:
        message_filter = MessageFilter(
            message_ids=messages,
            correlation_ids=correlation_ids,
            recipients=recipients,
            tags=tags,
            states=[DeliveryState.Value(f"DELIVERY_STATE_{state}") for state in states],
            created_after=None if since is None else timestamp(since),
        )
        return command(*args, message_filter=message_filter, **rest)

    for option in reversed(_OPTIONS):
        run = option(run)
    return run

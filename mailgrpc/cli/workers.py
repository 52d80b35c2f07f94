"""`mailgrpc workers`: who delivers, what they hold, and why one of them does not start mail."""

from __future__ import annotations

import json

import click

from mailgrpc.cli.database import with_database
from mailgrpc.cli.output import Output
from mailgrpc.cli.words import length
from mailgrpc.db.workers import Load, read_loads
from mailgrpc.worker.sessions import BEATS_A_LEASE

WORKS = "works"
_MISSED_BEATS = 2
_HEADING = ("worker", "state", "channels", "since", "last beat", "claimed", "sending")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One object a line.")
def workers(as_json: bool) -> None:
    """List the worker sessions. Asks the database, not the server.

    A worker is held when it starts nothing because its journal cannot be written, and late when it
    has missed beats: it may be gone. One whose last beat is older than its lease is ended by the
    others.
    """
    loads = with_database(read_loads)
    if as_json:
        for load in loads:
            click.echo(json.dumps(_object(load)))
        return
    Output().table(_HEADING, [_row(load) for load in loads])


def state_of(load: Load) -> str:
    """What to say of a session in a few words."""
    session = load.session
    if session.ended_at is not None:
        return "ended, not settled yet"
    if load.beat_age_s > session.lease_s:
        return "silent"
    if load.beat_age_s > _MISSED_BEATS * session.lease_s / BEATS_A_LEASE:
        return f"late: no beat for {length(load.beat_age_s)}"
    if session.held:
        return f"held: {session.held}"
    if session.paused:
        return f"paused: {', '.join(session.paused)}"
    return WORKS


def _row(load: Load) -> list[str]:
    session = load.session
    return [
        session.name,
        state_of(load),
        ", ".join(session.channels),
        session.started_at.strftime("%Y-%m-%d %H:%M:%SZ"),
        f"{load.beat_age_s:.1f} s",
        str(load.claimed),
        str(load.sending),
    ]


def _object(load: Load) -> dict[str, object]:
    session = load.session
    return {
        "sessionId": str(session.session_id),
        "name": session.name,
        "state": state_of(load),
        "channels": session.channels,
        "pausedChannels": session.paused,
        "held": session.held,
        "startedAt": session.started_at.isoformat(),
        "beatAgeS": round(load.beat_age_s, 3),
        "leaseS": session.lease_s,
        "claimed": load.claimed,
        "sending": load.sending,
    }

"""`mailgrpc prefs`: which kinds of mail an address refuses."""

from __future__ import annotations

from collections.abc import Sequence

import click

from mailgrpc.cli.output import Output
from mailgrpc.cli.session import Session, json_option, pass_session
from mailgrpc.cli.words import local_time
from mailgrpc.v1 import mail_service_pb2 as pb

_MAX_BIT = 30
_ACCEPTS_ALL = 1


@click.group()
def prefs() -> None:
    """Show or change which mail an address refuses.

    A kind of mail is the name of a category, or the number of its bit, 1 to 30.
    """


@prefs.command("get")
@click.argument("address")
@json_option
@pass_session
def get_prefs(session: Session, address: str, as_json: bool) -> None:
    """Show what an address refuses."""
    with session.client() as client:
        answer = client.get_prefs(pb.GetPrefsRequest(address=address))
    _tell(answer, as_json=as_json)


@prefs.command("set")
@click.argument("address")
@click.argument("bits", nargs=-1, type=click.IntRange(1, _MAX_BIT))
@json_option
@pass_session
def set_prefs(session: Session, address: str, bits: Sequence[int], as_json: bool) -> None:
    """Replace what an address refuses by the kinds with these bits; none: it accepts all."""
    mask = sum(1 << bit for bit in set(bits)) or _ACCEPTS_ALL
    _update(session, pb.UpdatePrefsRequest(address=address, blocked_flags=mask), as_json=as_json)


@prefs.command("block")
@click.argument("address")
@click.argument("kinds", nargs=-1, required=True)
@json_option
@pass_session
def block_prefs(session: Session, address: str, kinds: Sequence[str], as_json: bool) -> None:
    """Refuse these kinds, too."""
    flags, names = _parse_kinds(kinds)
    change = pb.PrefsChange(block_flags=flags, block_categories=names)
    _update(session, pb.UpdatePrefsRequest(address=address, change=change), as_json=as_json)


@prefs.command("unblock")
@click.argument("address")
@click.argument("kinds", nargs=-1, required=True)
@json_option
@pass_session
def unblock_prefs(session: Session, address: str, kinds: Sequence[str], as_json: bool) -> None:
    """Accept these kinds again."""
    flags, names = _parse_kinds(kinds)
    change = pb.PrefsChange(unblock_flags=flags, unblock_categories=names)
    _update(session, pb.UpdatePrefsRequest(address=address, change=change), as_json=as_json)


def _parse_kinds(kinds: Sequence[str]) -> tuple[int, list[str]]:
    """(mask of those given as bits, names)."""
    bits = {int(kind) for kind in kinds if kind.isdecimal()}
    for bit in bits:
        if not 1 <= bit <= _MAX_BIT:
            raise click.UsageError(f"bit {bit}: from 1 to {_MAX_BIT}")
    return sum(1 << bit for bit in bits), [kind for kind in kinds if not kind.isdecimal()]


def _update(session: Session, request: pb.UpdatePrefsRequest, *, as_json: bool) -> None:
    with session.client() as client:
        answer = client.update_prefs(request)
    _tell(answer, as_json=as_json)


def _tell(answer: pb.GetPrefsResponse | pb.UpdatePrefsResponse, *, as_json: bool) -> None:
    output = Output()
    if as_json:
        output.json(answer)
        return
    now = answer.prefs
    bits = [str(bit) for bit in range(1, _MAX_BIT + 1) if now.blocked_flags >> bit & 1]
    refused = f"refuses bits {' '.join(bits)}" if bits else "accepts all"
    cells = [now.address, refused, " ".join(now.blocked_categories)]
    since = local_time(now.updated_at)
    output.line(*cells, f"since {since}" if since else "never set")

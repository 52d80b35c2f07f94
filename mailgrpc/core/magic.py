"""Addresses that make a test receiver misbehave on purpose.

    temperror+N@example.test    refuses the first N tries of a mail for now (451), then accepts
    permerror@example.test      refuses for good (550)
    timeout@example.test        takes the mail and never answers
    drop@example.test           takes the mail and closes the connection instead of answering

The provider `capture` and the local inbox know them; to every other server they are addresses
that lead nowhere (RFC 2606: `test` is nobody's domain).
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

MAGIC_DOMAIN = "example.test"
MAX_TIMES = 1000
"""More refusals than any retry policy makes attempts: the mail is never accepted."""

_LOCAL_PART = re.compile(r"(?P<kind>temperror|permerror|timeout|drop)(?:\+(?P<times>[0-9]{1,4}))?")


class MagicKind(enum.Enum):
    """The misbehaviours; the value is the address's local part."""

    TEMPERROR = "temperror"
    PERMERROR = "permerror"
    TIMEOUT = "timeout"
    DROP = "drop"


@dataclass(frozen=True, slots=True)
class Magic:
    """What an address asks for. `times` counts the tries that fail; None: every try."""

    kind: MagicKind
    times: int | None = None


def magic_of(address: str) -> Magic | None:
    """What `address` (a bare addr-spec) asks for, or None for an address like any other.

    `temperror@` without a number refuses once. A number makes sense for `temperror` alone;
    `permerror+2@` and the like are addresses like any other, as is a number above MAX_TIMES.
    """
    local_part, _, domain = address.rpartition("@")
    if domain.lower() != MAGIC_DOMAIN:
        return None
    match = _LOCAL_PART.fullmatch(local_part.lower())
    if match is None:
        return None
    kind = MagicKind(match["kind"])
    if kind is MagicKind.TEMPERROR:
        times = int(match["times"] or 1)
        return Magic(kind, times) if times <= MAX_TIMES else None
    return Magic(kind) if match["times"] is None else None

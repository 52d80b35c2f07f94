"""Additional headers: which names a caller may give."""

from __future__ import annotations

import re

from mailgrpc.core.message import Header
from mailgrpc.core.text import check_text, fits
from mailgrpc.errors import Reason, Violation

MAX_HEADERS = 50
MAX_NAME = 76  # leaves two of the 78 columns (RFC 5322 section 2.1.1) for the colon and a blank
MAX_VALUE = 998

_WRITTEN = "from sender to cc bcc reply-to subject date message-id mime-version return-path"
_WRITTEN_ON_THE_WAY = "received delivered-to dkim-signature authentication-results"
_RESERVED = frozenset(f"{_WRITTEN} {_WRITTEN_ON_THE_WAY}".split())
_RESERVED_PREFIXES = ("content-", "resent-", "arc-", "x-mailgrpc-")
_FIELD_NAME = re.compile(r"[!-9;-~]+")  # RFC 5322 section 2.2: printable ASCII but the colon


def is_reserved(name: str) -> bool:
    """Whether a header of this name is not the caller's to write. Case does not matter."""
    lowered = name.lower()
    return lowered in _RESERVED or lowered.startswith(_RESERVED_PREFIXES)


def check_header(field: str, header: Header) -> list[Violation]:
    """What is wrong with one header; `field` is its path, e.g. `message.headers[3]`."""
    found = check_text(f"{field}.name", header.name, MAX_NAME, required=True)
    if not found and not _FIELD_NAME.fullmatch(header.name):
        text = "a name is printable ASCII without blanks and colons"
        found.append(Violation(f"{field}.name", Reason.OUT_OF_RANGE, text))
    elif is_reserved(header.name):
        text = "the gateway or a mail server writes this header itself"
        found.append(Violation(f"{field}.name", Reason.RESERVED_HEADER, text))
    if not fits(header.value, MAX_VALUE):
        found += check_text(f"{field}.value", header.value, MAX_VALUE)
    return found

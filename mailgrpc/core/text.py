"""What a string of a request may hold, and how long it may be."""

from __future__ import annotations

import re

from mailgrpc.errors import Reason, Violation

CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]")
"""C0, DEL, C1 and the two separators of Unicode that programs take for a line break."""

SPOOFING = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")
"""The same, and what reverses the direction of writing: `annexe.exe` must not show as `exe.exenna`.
For names, addresses and filenames, by which a reader decides whom or what to trust."""


def fits(text: str, max_len: int) -> bool:
    """Whether `text` is fine without a closer look. False says nothing: ask `check_text`.

    No control character counts as printable, so that two calls in C answer for nearly all texts.
    """
    return len(text) <= max_len and text.isprintable()


def check_text(
    field: str,
    text: str,
    max_len: int,
    *,
    required: bool = False,
    forbidden: re.Pattern[str] = CONTROLS,
) -> list[Violation]:
    """What is wrong with a text of one line: REQUIRED, TOO_LONG, CONTROL_CHARACTER.

    `max_len` counts code points, as the contract does. Only the part within it is searched.
    """
    if required and not text:
        return [Violation(field, Reason.REQUIRED, "must not be empty")]
    if fits(text, max_len):
        return []
    found = []
    if len(text) > max_len:
        found.append(Violation(field, Reason.TOO_LONG, f"at most {max_len} characters"))
    if control := forbidden.search(text, 0, max_len):
        found.append(Violation(field, Reason.CONTROL_CHARACTER, control_description(control)))
    return found


def check_body(field: str, text: str, max_bytes: int) -> list[Violation]:
    """What is wrong with a text of many lines: TOO_LONG by its UTF-8, CONTROL_CHARACTER for NUL."""
    found = []
    # A character has at most four octets: short texts are not encoded to be measured.
    if len(text) * 4 > max_bytes and utf8_len(text) > max_bytes:
        found.append(Violation(field, Reason.TOO_LONG, f"at most {max_bytes:,} bytes"))
    if (at := text.find("\0")) >= 0:
        found.append(Violation(field, Reason.CONTROL_CHARACTER, f"U+0000 at position {at}"))
    return found


def utf8_len(text: str) -> int:
    """The length in octets of UTF-8."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def control_description(found: re.Match[str]) -> str:
    """Which character was found where, without showing it."""
    return f"control character U+{ord(found[0]):04X} at position {found.start()}"

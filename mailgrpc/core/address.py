"""Addresses: which are taken, how they are written, and how they are compared.

A bare addr-spec and nothing else (RFC 5321 section 4.1.2, without quoted strings, address literals
and source routes; no display name, no comments). A quoted local part is legal and useless: hardly
any mailbox has one, and each is a chance for two programs to read one address differently.

Two forms come out of it. `address` is what the provider is told: the domain in ASCII (IDNA 2008
after the mapping of UTS 46) and lower case, the local part as the caller wrote it, because only the
receiving server knows whether case matters there. `key` is what mailgrpc compares and stores: the
local part lowercased too, because in practice case does not matter and a preference must not be
missed over it.
"""

from __future__ import annotations

import re
from typing import NamedTuple, NoReturn
from unicodedata import normalize

import idna

from mailgrpc.core.text import SPOOFING, control_description
from mailgrpc.errors import InvalidRequest, Reason, Violation

MAX_BYTES = 320
"""The limit of the contract, in octets of UTF-8 as the caller wrote it."""

MAX_ADDRESS = 254
"""RFC 5321 section 4.5.3.1.3: a path has at most 256 octets, two of which are angle brackets."""

MAX_LOCAL_PART = 64
"""RFC 5321 section 4.5.3.1.1, in octets of UTF-8."""


class Address(NamedTuple):
    """A checked address: as it is written, and as it is compared."""

    address: str
    key: str


class AddressError(ValueError):
    """An address that is not taken. `description` is meant for the caller."""

    def __init__(self, reason: Reason, description: str) -> None:
        super().__init__(description)
        self.reason = reason
        self.description = description


_ATEXT = r"A-Za-z0-9!#$%&'*+/=?^_`{|}~-"  # RFC 5322 section 3.2.3
_UTF8_TEXT = "\x80-\U0010ffff" + _ATEXT  # RFC 6531 section 3.3
# RFC 5321 section 4.1.2 and RFC 1035 section 2.3.1: letters, digits and inner hyphens, 63 at most.
_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
# A last label of digits alone would be an IPv4 address, or be taken for one (RFC 3696 section 2).
_DOMAIN_RULE = rf"(?:{_LABEL}\.)+(?![0-9]+\Z){_LABEL}"

_PLAIN = re.compile(rf"([{_ATEXT}]+(?:\.[{_ATEXT}]+)*)@{_DOMAIN_RULE}")
_LOCAL_PART = re.compile(rf"[{_UTF8_TEXT}]+(?:\.[{_UTF8_TEXT}]+)*")
_DOMAIN = re.compile(_DOMAIN_RULE)


def parse_address(text: str) -> Address:
    """The address in `text`. Raises AddressError with the reason of the contract.

    REQUIRED for an empty text, TOO_LONG past MAX_BYTES, CONTROL_CHARACTER, TEST_ADDRESS, and
    INVALID_ADDRESS for everything else. The key of a key is itself.
    """
    # Its length comes first: 10 MiB of "a.a.a." would keep the expression busy for a second.
    match = _PLAIN.fullmatch(text) if len(text) <= MAX_ADDRESS else None
    if match is not None and match.end(1) <= MAX_LOCAL_PART:
        key = text.lower()
        # What may be below `test`, or hold an A-label ("xn--"), takes the long way.
        if not key.endswith("test") and "--" not in key:
            if key == text:
                return Address(text, text)
            at = match.end(1)
            return Address(text[:at] + key[at:], key)
    return _parsed_with_care(text)


def checked_address(field: str, text: str) -> str:
    """The key of the address in `field`. Raises InvalidRequest that names the field."""
    try:
        return parse_address(text).key
    except AddressError as error:
        raise InvalidRequest(Violation(field, error.reason, error.description)) from None


def _parsed_with_care(text: str) -> Address:
    if not text:
        raise AddressError(Reason.REQUIRED, "an address is needed")
    if len(text.encode("utf-8", "surrogatepass")) > MAX_BYTES:
        raise AddressError(Reason.TOO_LONG, f"at most {MAX_BYTES} bytes")
    if control := SPOOFING.search(text):
        raise AddressError(Reason.CONTROL_CHARACTER, control_description(control))
    written_local, at, written_domain = text.rpartition("@")
    if not at:
        _refuse("an address has the form local-part@domain")
    local = normalize("NFC", written_local)
    if not _LOCAL_PART.fullmatch(local) or not local.isprintable():
        _refuse("only a bare address is taken: no name, no <>, no quotes, no blanks before the @")
    # NFC once more: lower() may leave what normalisation would join, and a key's key is itself.
    local_key = local if local.islower() and local.isascii() else normalize("NFC", local.lower())
    # Lower case can be longer in UTF-8; the key has to be an address as well.
    if max(len(local.encode()), len(local_key.encode())) > MAX_LOCAL_PART:
        _refuse(f"before the @ stand at most {MAX_LOCAL_PART} octets")
    domain = _ascii_domain(written_domain)
    if max(len(local.encode()), len(local_key.encode())) + 1 + len(domain) > MAX_ADDRESS:
        _refuse(f"an address has at most {MAX_ADDRESS} octets")
    return Address(f"{local}@{domain}", f"{local_key}@{domain}")


def _ascii_domain(written: str) -> str:
    """The domain in ASCII and lower case."""
    domain = written.lower()
    # Hyphens in the third and fourth place are refused by IDNA, yet stand in names of real hosts.
    if not domain.isascii() or "xn--" in domain:
        try:
            domain = idna.encode(written, uts46=True).decode("ascii")
        except UnicodeError:  # idna.IDNAError is one
            _refuse("the domain is not a valid internationalised name (IDNA 2008)")
    if _is_test(domain):
        raise AddressError(Reason.TEST_ADDRESS, "addresses below `test` are never sent to")
    if not _DOMAIN.fullmatch(domain):
        _refuse("the domain needs two labels or more, of letters, digits and inner hyphens")
    return domain


def _is_test(domain: str) -> bool:
    """Whether nobody can be meant: `test` (RFC 2606) but for the domain of magic recipients."""
    below = f".{domain}"
    return below.endswith(".test") and not below.endswith(".example.test")


def _refuse(description: str) -> NoReturn:
    raise AddressError(Reason.INVALID_ADDRESS, description)

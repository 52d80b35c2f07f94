"""Addresses that ask the test receiver to misbehave."""

import pytest

from mailgrpc.core.magic import Magic, MagicKind, magic_of


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("temperror+3@example.test", Magic(MagicKind.TEMPERROR, 3)),
        ("temperror@example.test", Magic(MagicKind.TEMPERROR, 1)),
        ("TempError+2@EXAMPLE.test", Magic(MagicKind.TEMPERROR, 2)),
        ("temperror+0@example.test", Magic(MagicKind.TEMPERROR, 0)),
        ("permerror@example.test", Magic(MagicKind.PERMERROR)),
        ("timeout@example.test", Magic(MagicKind.TIMEOUT)),
        ("drop@example.test", Magic(MagicKind.DROP)),
    ],
)
def test_magic_addresses(address: str, expected: Magic) -> None:
    assert magic_of(address) == expected


@pytest.mark.parametrize(
    "address",
    [
        "ada@example.test",
        "temperror+3@example.org",
        "temperror+3@sub.example.test",
        "temperror+x@example.test",
        "temperror+@example.test",
        "temperror+9999@example.test",
        "temperror+٣@example.test",
        "permerror+1@example.test",
        "xtimeout@example.test",
        "timeout",
        "",
        "@example.test",
    ],
)
def test_addresses_like_any_other(address: str) -> None:
    assert magic_of(address) is None

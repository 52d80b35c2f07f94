"""Which addresses are taken, and what becomes of them."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mailgrpc.core.address import Address, AddressError, checked_address, parse_address
from mailgrpc.core.magic import magic_of
from mailgrpc.errors import InvalidRequest, Reason


@pytest.mark.parametrize(
    ("written", "address", "key"),
    [
        ("ann@example.com", "ann@example.com", "ann@example.com"),
        ("Ann.Lee@Example.COM", "Ann.Lee@example.com", "ann.lee@example.com"),
        ("a+b_c~d!#$%&'*/=?^`{|}-@x.example.org", None, None),
        ("a@b.co", None, None),
        ("a--b@r3---sn.example.com", None, None),
        ("x@" + "a" * 63 + ".example", None, None),
        ("l" * 64 + "@example.com", None, None),
        ("x@1.example", None, None),
        ("x@example.1a", None, None),
        ("x@bücher.example", "x@xn--bcher-kva.example", "x@xn--bcher-kva.example"),
        ("x@BÜCHER.example", "x@xn--bcher-kva.example", "x@xn--bcher-kva.example"),
        ("x@bu\u0308cher.example", "x@xn--bcher-kva.example", "x@xn--bcher-kva.example"),
        ("x@XN--bcher-kva.example", "x@xn--bcher-kva.example", "x@xn--bcher-kva.example"),
        ("x@faß.example", "x@xn--fa-hia.example", "x@xn--fa-hia.example"),
        ("x@ｅｘａｍｐｌｅ。com", "x@example.com", "x@example.com"),
        ("Jörg@example.com", "Jörg@example.com", "jörg@example.com"),
        ("Jo\u0308rg@example.com", "Jörg@example.com", "jörg@example.com"),
        ("用户@例子.广告", "用户@xn--fsqu00a.xn--4rr70v", "用户@xn--fsqu00a.xn--4rr70v"),
    ],
)
def test_an_address_is_normalised(written: str, address: str | None, key: str | None) -> None:
    assert parse_address(written) == Address(address or written, key or written)


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "@",
        "a@",
        "@example.com",
        "example.com",
        "a@b@example.com",
        ".a@example.com",
        "a.@example.com",
        "a..b@example.com",
        "a b@example.com",
        " a@example.com",
        "a@example.com ",
        "a\u00a0b@example.com",
        "a\u200bb@example.com",
        "a\u037eb@example.com",  # becomes `;` in NFC
        '"a"@example.com',
        "Ann <a@example.com>",
        "<a@example.com>",
        "a(comment)@example.com",
        "@relay.example:a@example.com",
        "a@[192.0.2.1]",
        "a@192.0.2.1",
        "a@localhost",
        "a@.example.com",
        "a@example..com",
        "a@example.com.",
        "a@example.com。",
        "a@-example.com",
        "a@example-.com",
        "a@exa_mple.com",
        "a@exa mple.com",
        "a@example.123",
        "a@" + "b" * 64 + ".com",
        "a@xn--foo\u00fc.com",
        "a@xn--a.com",
        "a@☃.example",
        "a@ü..example",
        "l" * 65 + "@example.com",
        "ö" * 33 + "@example.com",
        "İ" * 25 + "@example.com",  # 50 octets, and 75 in lower case
        "a@" + ".".join(["b" * 62] * 4) + ".com",
    ],
)
def test_what_is_no_bare_address_is_refused(text: str) -> None:
    with pytest.raises(AddressError) as refused:
        parse_address(text)
    assert refused.value.reason is Reason.INVALID_ADDRESS


@pytest.mark.parametrize(
    "text",
    ["x@test", "x@TEST", "x@a.test", "x@a.b.Test", "x@notexample.test", "x@ｔｅｓｔ", "x@ü.test"],
)
def test_an_address_below_test_is_refused_so_that_unit_tests_never_send(text: str) -> None:
    with pytest.raises(AddressError) as refused:
        parse_address(text)
    assert refused.value.reason is Reason.TEST_ADDRESS


@pytest.mark.parametrize(
    "text",
    ["drop@example.test", "x@Example.Test", "x@sub.example.test", "x@test.example", "x@latest.io"],
)
def test_the_domain_of_magic_recipients_is_taken(text: str) -> None:
    assert parse_address(text).key == text.lower()


def test_a_magic_recipient_keeps_its_magic() -> None:
    address = parse_address("TempError+2@EXAMPLE.test")
    assert magic_of(address.address) == magic_of(address.key) is not None


@pytest.mark.parametrize(
    "character", ["\0", "\n", "\r", "\x7f", "\x85", "\u2028", "\u202e", "\u2066"]
)
@pytest.mark.parametrize("template", ["a{}b@example.com", "a@exa{}mple.com", "a@example.com{}"])
def test_control_characters_are_refused_as_such(character: str, template: str) -> None:
    with pytest.raises(AddressError) as refused:
        parse_address(template.format(character))
    assert refused.value.reason is Reason.CONTROL_CHARACTER
    assert character not in refused.value.description


def test_the_limit_of_the_contract_comes_before_that_of_smtp() -> None:
    with pytest.raises(AddressError) as refused:
        parse_address("a@" + "ü" * 160 + ".com")
    assert refused.value.reason is Reason.TOO_LONG
    longest = "a@" + ".".join(["b" * 61] * 4) + ".com"
    assert len(longest) == 253
    assert parse_address(f"a{longest}").key == f"a{longest}"
    with pytest.raises(AddressError) as refused:
        parse_address(f"aa{longest}")
    assert refused.value.reason is Reason.INVALID_ADDRESS


def test_a_missing_address_is_required() -> None:
    with pytest.raises(AddressError) as refused:
        parse_address("")
    assert refused.value.reason is Reason.REQUIRED


def test_two_mailboxes_are_not_merged_by_folding() -> None:
    """Lower case, not case folding: `ß` and `ss` are different letters and different people."""
    assert parse_address("weiß@example.com").key != parse_address("weiss@example.com").key


def test_a_checked_address_names_its_field() -> None:
    assert checked_address("address", "Ann@Example.com") == "ann@example.com"
    with pytest.raises(InvalidRequest) as refused:
        checked_address("new_address", "ann@test")
    assert [(v.field, v.reason) for v in refused.value.violations] == [
        ("new_address", Reason.TEST_ADDRESS)
    ]


_PIECES = st.lists(
    st.sampled_from(
        [*'aZ0.-_@+ü ß"<>\n', "xn--", "example", "test", "。", "İ", "Σ", "\u0308", "🦊"]
    )
    | st.characters(),
    max_size=40,
).map("".join)


@given(_PIECES | st.builds("{}@{}.example".format, _PIECES, _PIECES))
@example("ΑΣ@example.com")
@example("K@example.com")
@example("\ud800@example.com")
def test_any_text_is_an_address_or_an_address_error(text: str) -> None:
    try:
        address, key = parse_address(text)
    except AddressError:
        return
    assert parse_address(address) == (address, key)
    assert parse_address(key) == (key, key)
    assert len(address.encode()) <= 254
    assert address.isprintable()
    assert unicodedata.is_normalized("NFC", key)
    assert address.partition("@")[2].isascii()

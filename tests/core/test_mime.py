"""The rendered mail, held against the parser of the standard library."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from email import message_from_bytes, policy
from email.header import decode_header, make_header
from email.message import EmailMessage
from email.utils import getaddresses
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mailgrpc.core.delivery import Role
from mailgrpc.core.message import Attachment, Header, Mailbox, MailMessage, Recipient
from mailgrpc.core.mime import needs_smtputf8, render

ID = "<0192f0c1a2b3@mail.example.org>"
DATE = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
MAIL = MailMessage(
    sender=Mailbox("shop@example.org", "The Shop"),
    recipients=(Recipient("ann@example.org", "Ann"),),
    subject="Your receipt",
    text="Thank you.\n",
)


def rendered(mail: MailMessage = MAIL, **fields: Any) -> bytes:
    return render(replace(mail, **fields), rfc_message_id=ID, date=DATE)


def parsed(raw: bytes) -> EmailMessage:
    return message_from_bytes(raw, policy=policy.default)


def lines_of(text: str) -> list[str]:
    """Lines however they end, without the one line end that a part may gain."""
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    return lines[:-1] if lines[-1] == "" else lines


# What may stand where, as the door lets it through

_VISIBLE = st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp", "Cn", "Co"])
_HEADER_TEXT = st.one_of(
    st.text(_VISIBLE, max_size=300),
    st.text(st.sampled_from('abc  =?utf-8?q?é,;"\\<>()@.'), max_size=300),
    st.text(st.sampled_from("ab "), max_size=300),
)
_BODY = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=3000),
    st.text(st.sampled_from("ab .\n\r=é"), max_size=300),
    st.builds(lambda c, n: c * n, st.sampled_from("aé "), st.integers(990, 3000)),
)
_ATOM = st.text(st.sampled_from("abcdefghijklmnopqrstuvwxyz0123456789"), min_size=1, max_size=30)
_ADDRESS = st.builds("{}@{}.example.org".format, _ATOM, _ATOM)
_FILES = st.builds(
    Attachment,
    filename=st.text(_VISIBLE, max_size=200),
    data=st.binary(max_size=300),
    content_type=st.sampled_from(["", "image/png", "text/csv", "message/rfc822", "x/y; z=1"]),
    content_id=st.sampled_from(["", "logo", "a.b@c"]),
)
_MAILS = st.builds(
    MailMessage,
    sender=st.builds(Mailbox, _ADDRESS, _HEADER_TEXT),
    recipients=st.lists(
        st.builds(Recipient, _ADDRESS, _HEADER_TEXT, st.sampled_from(Role)), max_size=5
    ).map(tuple),
    subject=_HEADER_TEXT,
    text=_BODY,
    html=_BODY,
    reply_to=st.lists(st.builds(Mailbox, _ADDRESS, _HEADER_TEXT), max_size=2).map(tuple),
    headers=st.lists(st.builds(Header, _ATOM.map("X-{}".format), _HEADER_TEXT), max_size=3).map(
        tuple
    ),
    attachments=st.lists(_FILES, max_size=3).map(tuple),
)


@settings(max_examples=50, deadline=None)
@given(_MAILS)
def test_the_form_holds_for_every_mail(mail: MailMessage) -> None:
    raw = rendered(mail)
    assert raw == rendered(mail), "every attempt sends the same bytes"
    assert raw.isascii()
    assert raw.endswith(b"\r\n")
    lines = raw.split(b"\r\n")
    assert max(map(len, lines)) <= 998
    assert not any(b"\r" in line or b"\n" in line for line in lines)
    head = raw.split(b"\r\n\r\n")[0].split(b"\r\n")
    assert all(line.strip() for line in head), "no header line is blank"
    assert not any(line.lower().startswith(b"bcc") for line in head)


@settings(max_examples=50, deadline=None)
@given(_MAILS)
def test_the_parser_gives_back_the_header(mail: MailMessage) -> None:
    raw = rendered(mail)
    header = parsed(raw)
    assert not header.defects
    assert mail.sender is not None
    assert mailboxes(raw, "From") == boxes_of([mail.sender])
    assert mailboxes(raw, "Cc") == boxes_of(r for r in mail.recipients if r.role is Role.CC)
    assert mailboxes(raw, "Reply-To") == boxes_of(mail.reply_to)
    to = [r for r in mail.recipients if r.role is Role.TO]
    if to:
        assert mailboxes(raw, "To") == boxes_of(to)
    assert header["Subject"] == mail.subject
    assert header["Message-ID"] == ID
    assert header["Date"].datetime == DATE
    for name in {h.name.lower() for h in mail.headers}:
        assert header.get_all(name) == [h.value for h in mail.headers if h.name.lower() == name]


def boxes_of(mailboxes: Iterable[Mailbox | Recipient]) -> list[tuple[str, str]]:
    return [(m.name.strip(" "), m.address) for m in mailboxes]


def mailboxes(raw: bytes, name: str) -> list[tuple[str, str]]:
    """Names and addresses by the older parser: the newer one of 3.11 shows blanks between
    encoded words in names (RFC 2047, 6.2 says to ignore them), and one blank for many."""
    fields = message_from_bytes(raw, policy=policy.compat32).get_all(name, [])
    return [(str(make_header(decode_header(n))), a) for n, a in getaddresses(fields)]


@settings(max_examples=50, deadline=None)
@given(_MAILS)
def test_the_parser_gives_back_bodies_and_files(mail: MailMessage) -> None:
    root = parsed(rendered(mail))
    leaves = [part for part in root.walk() if not part.is_multipart()]
    assert not any(part.defects for part in root.walk())
    files = [p for p in leaves if p.get_content_disposition() is not None]
    texts = {p.get_content_type(): p for p in leaves if p.get_content_disposition() is None}
    if mail.text or not mail.html:
        assert lines_of(content_of(texts["text/plain"])) == lines_of(mail.text)
    if mail.html:
        assert lines_of(content_of(texts["text/html"])) == lines_of(mail.html)
    assert len(texts) == bool(mail.text or not mail.html) + bool(mail.html)
    inline_first = sorted(mail.attachments, key=lambda a: not (a.content_id and mail.html))
    assert [p.get_payload(decode=True) for p in files] == [a.data for a in inline_first]
    assert [p.get_filename() or "" for p in files] == [a.filename.strip() for a in inline_first]
    assert [p["Content-ID"] for p in files] == [
        f"<{a.content_id}>" if a.content_id else None for a in inline_first
    ]


def content_of(part: EmailMessage) -> str:
    data = cast(bytes, part.get_payload(decode=True))
    return data.decode(part.get_content_charset() or "ascii")


# Nesting


def shape(part: EmailMessage) -> Any:
    if not part.is_multipart():
        return part.get_content_type()
    parts = cast("list[EmailMessage]", part.get_payload())
    return [part.get_content_subtype(), *map(shape, parts)]


FILE = Attachment("a.pdf", b"x", "application/pdf")
LOGO = Attachment("l.png", b"x", "image/png", "logo")


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, "text/plain"),
        ({"text": ""}, "text/plain"),
        ({"text": "", "html": "<p>"}, "text/html"),
        ({"html": "<p>"}, ["alternative", "text/plain", "text/html"]),
        ({"attachments": (FILE,)}, ["mixed", "text/plain", "application/pdf"]),
        ({"attachments": (LOGO,)}, ["mixed", "text/plain", "image/png"]),
        (
            {"text": "", "html": "<p>", "attachments": (LOGO,)},
            ["related", "text/html", "image/png"],
        ),
        (
            {"html": "<p>", "attachments": (FILE, LOGO)},
            [
                "mixed",
                ["related", ["alternative", "text/plain", "text/html"], "image/png"],
                "application/pdf",
            ],
        ),
    ],
)
def test_parts_are_nested_no_deeper_than_needed(fields: dict[str, Any], expected: Any) -> None:
    assert shape(parsed(rendered(**fields))) == expected


def test_a_text_that_holds_the_boundary_does_not_end_its_part() -> None:
    boundary = parsed(rendered(html="<p>")).get_boundary()
    text = f"--{boundary}\nContent-Type: text/html\n\nevil\n--{boundary}--\n"
    mail = parsed(rendered(text=text, html="<p>"))
    assert shape(mail) == ["alternative", "text/plain", "text/html"]
    assert mail.get_boundary() != boundary


def test_a_mail_in_a_mail_is_a_file_whose_octets_stay() -> None:
    inner = Attachment("m.eml", b"Subject: x\n\n\xff\n", "message/rfc822")
    part = list(parsed(rendered(attachments=(inner,))).walk())[-1]
    assert part.get_content_type() == "application/octet-stream"
    assert part.get_payload(decode=True) == inner.data


# The header


def test_the_fields_stand_in_the_usual_order() -> None:
    mail = replace(
        MAIL,
        recipients=(Recipient("a@example.org"), Recipient("b@example.org", role=Role.CC)),
        reply_to=(Mailbox("r@example.org"),),
        headers=(Header("X-Order", "4711"),),
    )
    assert parsed(rendered(mail)).keys() == [
        "Date",
        "From",
        "Reply-To",
        "To",
        "Cc",
        "Subject",
        "Message-ID",
        "X-Order",
        "MIME-Version",
        "Content-Type",
        "Content-Transfer-Encoding",
    ]


def test_a_mail_to_bcc_alone_names_nobody() -> None:
    raw = rendered(recipients=(Recipient("eve@example.org", "Eve", Role.BCC),))
    assert b"\r\nTo: undisclosed-recipients:;\r\n" in raw
    assert b"eve" not in raw.lower()


def test_long_fields_are_folded_at_78() -> None:
    people = tuple(Recipient(f"user{n}@example.org", f"User, {n}") for n in range(50))
    raw = rendered(recipients=people, subject="word " * 60 + "end")
    head = raw.split(b"\r\n\r\n")[0].split(b"\r\n")
    assert max(map(len, head)) <= 78


def test_addresses_with_a_non_ascii_local_part_stand_as_utf8() -> None:
    mail = replace(MAIL, recipients=(Recipient("jürgen@example.org", "Jürgen"),))
    assert needs_smtputf8(mail)
    raw = rendered(mail)
    assert "<jürgen@example.org>".encode() in raw
    assert b"=?utf-8?b?" in raw


def test_a_non_ascii_bcc_needs_nothing_of_the_header() -> None:
    people = (Recipient("ann@example.org"), Recipient("jürgen@example.org", role=Role.BCC))
    assert not needs_smtputf8(replace(MAIL, recipients=people))
    assert rendered(recipients=people).isascii()


@pytest.mark.parametrize("evil", ["\r\nBcc: eve@example.org", "\nX: y", "\r", "\0"])
@pytest.mark.parametrize(
    "fields",
    [
        lambda evil: {"subject": "a" + evil},
        lambda evil: {"sender": Mailbox("shop@example.org", "a" + evil)},
        lambda evil: {"sender": Mailbox("shop@example.org" + evil, "a")},
        lambda evil: {"recipients": (Recipient("ann@example.org", "ü" + evil),)},
        lambda evil: {"reply_to": (Mailbox("ann@example.org" + evil),)},
        lambda evil: {"headers": (Header("X-A", "ü" + evil),)},
        lambda evil: {"headers": (Header("X-A" + evil, "b"),)},
        lambda evil: {"attachments": (Attachment("ü" + evil, b""),)},
        lambda evil: {"attachments": (Attachment("a", b"", "text/plain" + evil),)},
        lambda evil: {"attachments": (Attachment("a", b"", "text/plain", "id" + evil),)},
    ],
)
def test_nothing_breaks_out_of_its_field(evil: str, fields: Any) -> None:
    with pytest.raises(ValueError):
        rendered(**fields(evil))


@pytest.mark.parametrize(
    "name", ["Subject", "BCC", "Content-Type", "content-x", "X Y", "X:", "", "Ü"]
)
def test_headers_that_a_caller_cannot_write(name: str) -> None:
    with pytest.raises(ValueError):
        rendered(headers=(Header(name, "x"),))


@pytest.mark.parametrize(
    "message_id", ["", "no-brackets@example.org", "<a b@c>", "<a\r\n@c>", "<ü@c>"]
)
def test_the_message_id_is_checked(message_id: str) -> None:
    with pytest.raises(ValueError):
        render(MAIL, rfc_message_id=message_id, date=DATE)


def test_what_else_no_mail_can_be_made_of() -> None:
    for fields in (
        {"sender": None},
        {"sender": Mailbox("")},
        {"sender": Mailbox("a" * 1000 + "@example.org")},
        {"subject": "\ud800"},
        {"text": "\ud800"},
    ):
        with pytest.raises(ValueError):
            rendered(**fields)
    with pytest.raises(ValueError):
        render(MAIL, rfc_message_id=ID, date=DATE.replace(tzinfo=None))


# Bodies


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("plain\n", "7bit"),
        ("a" * 998, "7bit"),
        ("a" * 999, "quoted-printable"),
        ("Grüße aus dem schönen Köln an alle, die diese Zeilen hier lesen\n", "quoted-printable"),
        ("Привет, мир\n", "base64"),
        ("bell \a\n", "quoted-printable"),
    ],
)
def test_the_shortest_encoding_that_is_safe(text: str, encoding: str) -> None:
    mail = parsed(rendered(text=text))
    assert mail["Content-Transfer-Encoding"] == encoding
    assert lines_of(content_of(mail)) == lines_of(text)


def test_equal_moments_in_two_zones_keep_their_zones() -> None:
    """The text of a date is kept for the mails of the same second."""
    here = datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=UTC)
    there = here.astimezone(timezone(timedelta(hours=2)))
    made = [
        render(MAIL, rfc_message_id="<a@b>", date=date).split(b"\r\n")[0]
        for date in (here, there, here + timedelta(microseconds=1))
    ]
    assert made == [
        b"Date: Fri, 02 Jan 2026 03:04:05 +0000",
        b"Date: Fri, 02 Jan 2026 05:04:05 +0200",
        b"Date: Fri, 02 Jan 2026 03:04:05 +0000",
    ]

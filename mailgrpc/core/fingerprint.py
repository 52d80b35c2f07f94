r"""Which requests are the same: SHA-256 over a canonical form of the checked submission.

A request_id that comes a second time must come with the same request. What "the same" means is
written down here, precisely enough to be written again in another language, and never depends on
protobuf's bytes, which differ between languages and versions. Each stored fingerprint names its
rule; a rule is never changed, only followed by the next one.

Rule 1. The canonical form is one JSON text (RFC 8259) in UTF-8:

  - no white space between tokens; the members of every object in ascending order of their names,
    compared by code points; lists in the caller's order;
  - in strings `"` and `\` are escaped by a backslash; U+0008, U+0009, U+000A, U+000C and U+000D are
    `\b`, `\t`, `\n`, `\f` and `\r`; other characters below U+0020 are `\u00xx` in lower case;
    everything else stands for itself;
  - numbers are integers. A time is the count of microseconds since 1970-01-01T00:00:00Z, a duration
    its microseconds, both without what is less. A double is a string: the 16 digits, in lower case,
    of its IEEE 754 binary64 form, big-endian;
  - what was left out is not there: no member for an empty string, an empty list or map, a number
    that is 0, a message that is unset. But an empty message that is set is `{}` (only `retry` can
    be: options that say nothing count as left out), and every pair of `custom_args` is there, even
    with an empty value. A default that is spelled out is there, and thus differs from the same
    default left out. Enums are their numbers.

The object has the members `message` and `options`, whose members have the names of the contract,
with these differences: `request_id` and `validate_only` are not part of it; addresses are normalised
(see `core/address.py`; the local part in the caller's case); an attachment has `data_sha256` in place
of `data`, the SHA-256 of its bytes as 64 lower-case hexadecimal digits, there even for an empty
file, and its `content_type` always, as given or else as guessed.

For example, a mail from Ops <ops@example.org> to ann@EXAMPLE.com, with SEND_ONCE, is

    {"message":{"sender":{"address":"ops@example.org","name":"Ops"},"subject":"Grüße","text":"Hi\n",
    "to":[{"address":"ann@example.com"}]},"options":{"mode":2}}

on one line, without the break after the first; its fingerprint is, in hexadecimal,

    a2498e8c63a4504a002527d02d5f0020db77cea2c2cb3f677f71549b84017ef7
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import orjson

from mailgrpc.core.delivery import Role
from mailgrpc.core.message import (
    Attachment,
    DeliveryOptions,
    Mailbox,
    MailMessage,
    Recipient,
    RetryWishes,
    Submission,
)

RULE = 1
"""The rule by which new fingerprints are made."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)
_LIST_OF = {Role.TO: "to", Role.CC: "cc", Role.BCC: "bcc"}
_NO_OPTIONS = DeliveryOptions()

Json = dict[str, Any]


def fingerprint(submission: Submission, rule: int = RULE) -> bytes:
    """32 bytes that are equal where the requests are the same, by the rule of that number.

    `submission` is checked. Raises ValueError for a rule that this version does not know.
    """
    canonical = _RULES.get(rule)
    if canonical is None:
        raise ValueError(f"fingerprint rule {rule} is not known to this version")
    return hashlib.sha256(canonical(submission)).digest()


def content_key(message: MailMessage) -> bytes:
    """32 bytes that are equal where two messages say the same, to whomever.

    Sender, reply_to, subject, text, html, headers and attachments, in the form of rule 1.
    """
    return hashlib.sha256(_encode(_content(message))).digest()


def _canonical_1(submission: Submission) -> bytes:
    whole: Json = {"message": _message(submission.message)}
    if submission.options is not _NO_OPTIONS and (options := _options(submission.options)):
        whole["options"] = options
    return _encode(whole)


def _encode(form: Json) -> bytes:
    # Its text is that of the rule; tests/core holds it to the standard library's, character by
    # character.
    return orjson.dumps(form, option=orjson.OPT_SORT_KEYS)


_RULES: dict[int, Callable[[Submission], bytes]] = {1: _canonical_1}


def _message(message: MailMessage) -> Json:
    form = _content(message)
    for recipient in message.recipients:
        form.setdefault(_LIST_OF[recipient.role], []).append(_mailbox(recipient))
    if message.tags:
        form["tags"] = message.tags
    if message.categories:
        form["categories"] = message.categories
    if message.flags:
        form["flags"] = message.flags
    if message.custom_args:
        form["custom_args"] = dict(message.custom_args)
    if message.correlation_id:
        form["correlation_id"] = message.correlation_id
    return form


def _content(message: MailMessage) -> Json:
    form: Json = {"subject": message.subject}
    if message.sender is not None:
        form["sender"] = _mailbox(message.sender)
    if message.reply_to:
        form["reply_to"] = [_mailbox(mailbox) for mailbox in message.reply_to]
    if message.text:
        form["text"] = message.text
    if message.html:
        form["html"] = message.html
    if message.headers:
        form["headers"] = [_said(name=h.name, value=h.value) for h in message.headers]
    if message.attachments:
        form["attachments"] = [_attachment(a) for a in message.attachments]
    return form


def _mailbox(mailbox: Mailbox | Recipient) -> Json:
    if mailbox.name:
        return {"address": mailbox.address, "name": mailbox.name}
    return {"address": mailbox.address}


def _attachment(attachment: Attachment) -> Json:
    return _said(
        filename=attachment.filename,
        content_type=attachment.content_type,
        content_id=attachment.content_id,
        data_sha256=hashlib.sha256(attachment.data).hexdigest(),
    )


def _options(options: DeliveryOptions) -> Json:
    form = _said(mode=int(options.mode), priority=int(options.priority), channel=options.channel)
    if options.retry is not None:
        form["retry"] = _retry(options.retry)
    if options.send_at is not None:
        form["send_at"] = (options.send_at - _EPOCH) // _MICROSECOND
    if options.expire_at is not None:
        form["expire_at"] = (options.expire_at - _EPOCH) // _MICROSECOND
    if options.dedupe_window is not None:
        form["dedupe_window"] = options.dedupe_window // _MICROSECOND
    return form


def _retry(retry: RetryWishes) -> Json:
    form = _said(max_attempts=retry.max_attempts)
    if retry.initial_backoff is not None:
        form["initial_backoff"] = retry.initial_backoff // _MICROSECOND
    if retry.max_backoff is not None:
        form["max_backoff"] = retry.max_backoff // _MICROSECOND
    if retry.multiplier:
        form["multiplier"] = struct.pack(">d", retry.multiplier).hex()
    return form


def _said(**members: str | int) -> Json:
    """The members that are not empty and not 0."""
    return {name: value for name, value in members.items() if value}

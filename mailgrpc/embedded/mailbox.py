"""The mails of the local inbox, as files that anybody may open.

    20261120-205915-123456.eml    the mail, byte for byte as it came
    20261120-205915-123456.json   its envelope, see `StoredMail`

The envelope is written last and by a rename: a mail whose envelope is there is complete. Names
sort by time of arrival. The oldest mails go when there are more than the bound.

Nothing is synced: this is where mail is looked at, not where it is kept.
"""

from __future__ import annotations

import dataclasses
import email.header
import email.parser
import email.policy
import heapq
import json
import os
import re
import threading
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

MAX_MAILS = 10_000

_ID = re.compile(r"\d{8}-\d{6}-\d{6}")
_ID_FORMAT = "%Y%m%d-%H%M%S-%f"


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """What came with a mail, beside its bytes."""

    mail_from: str
    rcpt_tos: tuple[str, ...]
    helo: str = ""
    smtputf8: bool = False
    answered: bool = True
    """False where a magic address kept the sender from hearing that the mail was taken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredMail:
    """One line of the inbox. `subject` and `message_id` are the headers', "" where they lack."""

    id: str
    received_at: datetime
    size: int
    """Bytes."""
    subject: str
    message_id: str
    envelope: Envelope


class Mailbox:
    """The writing side: one process at a time. Its methods may be called from any thread."""

    def __init__(self, directory: Path, max_mails: int = MAX_MAILS) -> None:
        self.directory = directory
        self._max_mails = max_mails
        self._lock = threading.Lock()
        directory.mkdir(parents=True, exist_ok=True)
        directory.chmod(0o700)
        self._remove_unfinished()
        self._ids = deque(sorted(_ids(directory)))
        self._last = _when(self._ids[-1]) if self._ids else datetime.min.replace(tzinfo=UTC)

    def add(self, content: bytes, envelope: Envelope) -> str:
        """Store a mail and return its id. OSError where the disk does not take it."""
        with self._lock:
            # Names must rise even where the clock does not.
            now = max(datetime.now(UTC), self._last + timedelta(microseconds=1))
            self._last = now
            mail_id = now.strftime(_ID_FORMAT)
            headers = headers_of(content)
            mail = StoredMail(
                id=mail_id,
                received_at=now,
                size=len(content),
                subject=_decoded(headers.get("subject", "")),
                message_id=headers.get("message-id", ""),
                envelope=envelope,
            )
            (self.directory / f"{mail_id}.eml").write_bytes(content)
            draft = self.directory / f".{mail_id}.json"
            draft.write_text(json.dumps(_to_json(mail), ensure_ascii=False, indent=1), "utf-8")
            draft.rename(self.directory / f"{mail_id}.json")
            self._ids.append(mail_id)
            while len(self._ids) > self._max_mails:
                self._remove(self._ids.popleft())
        return mail_id

    def _remove(self, mail_id: str) -> None:
        for suffix in (".json", ".eml"):  # in this order: never an envelope without a mail
            (self.directory / f"{mail_id}{suffix}").unlink(missing_ok=True)

    def _remove_unfinished(self) -> None:
        for path in self.directory.iterdir():
            unfinished = path.suffix == ".json" and path.name.startswith(".")
            alone = path.suffix == ".eml" and not path.with_suffix(".json").exists()
            if _ID.fullmatch(path.stem.lstrip(".")) and (unfinished or alone):
                path.unlink(missing_ok=True)


def list_inbox(directory: Path, limit: int = MAX_MAILS) -> list[StoredMail]:
    """The newest `limit` mails, newest first; empty where there is no inbox yet."""
    if not directory.is_dir():
        return []
    newest = heapq.nlargest(limit, _ids(directory))
    mails = (_read_envelope(directory, mail_id) for mail_id in newest)
    return [mail for mail in mails if mail is not None]


def read_mail(directory: Path, mail_id: str) -> tuple[StoredMail, bytes]:
    """One mail and its bytes. LookupError where there is none of that id (any more)."""
    mail = _read_envelope(directory, mail_id) if _ID.fullmatch(mail_id) else None
    if mail is not None:
        try:
            return mail, (directory / f"{mail_id}.eml").read_bytes()
        except FileNotFoundError:
            pass  # removed in between
    raise LookupError(f"no mail {mail_id!r} in {directory}")


def headers_of(content: bytes) -> dict[str, str]:
    """The first of each header, names in lower case, values unfolded but not decoded."""
    head = content.partition(b"\r\n\r\n")[0][: 256 * 1024]
    parsed = email.parser.BytesHeaderParser(policy=email.policy.compat32).parsebytes(head)
    headers: dict[str, str] = {}
    for name, value in parsed.raw_items():
        text = str(value).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        headers.setdefault(name.lower(), re.sub(r"\r?\n", "", text).strip())
    return headers


def _decoded(text: str) -> str:
    """A header as people read it; as it came where its encoded words (RFC 2047) are broken."""
    try:
        return str(email.header.make_header(email.header.decode_header(text)))
    except (ValueError, LookupError):
        return text


def _ids(directory: Path) -> Iterator[str]:
    with os.scandir(directory) as entries:
        for entry in entries:
            mail_id = entry.name.removesuffix(".json")
            if mail_id != entry.name and _ID.fullmatch(mail_id):
                yield mail_id


def _when(mail_id: str) -> datetime:
    return datetime.strptime(mail_id, _ID_FORMAT).replace(tzinfo=UTC)


def _to_json(mail: StoredMail) -> dict[str, object]:
    return dataclasses.asdict(mail) | {"received_at": mail.received_at.isoformat()}


def _read_envelope(directory: Path, mail_id: str) -> StoredMail | None:
    try:
        stored = json.loads((directory / f"{mail_id}.json").read_text("utf-8"))
    except FileNotFoundError:
        return None
    stored["received_at"] = datetime.fromisoformat(stored["received_at"])
    envelope = stored.pop("envelope")
    envelope["rcpt_tos"] = tuple(envelope["rcpt_tos"])
    return StoredMail(**stored, envelope=Envelope(**envelope))

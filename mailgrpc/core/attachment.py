"""Files that go with a mail: their names, ids and media types.

The type of a file is guessed by a table of our own. It is part of what makes two requests the same
(`core/fingerprint.py`), so it may not depend on the machine or on the Python that runs there, as
the table of the standard library does; that one also calls `report.csv.gz` a text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from mailgrpc.core.message import Attachment
from mailgrpc.core.text import SPOOFING, check_text
from mailgrpc.errors import Reason, Violation

MAX_ATTACHMENTS = 50
MAX_FILENAME = 255
MAX_CONTENT_TYPE = 255  # RFC 6838 section 4.2: 127 characters on each side of the slash
MAX_CONTENT_ID = 255

UNKNOWN_TYPE = "application/octet-stream"

_OFFICE = "application/vnd.openxmlformats-officedocument."
_OPEN_DOCUMENT = "application/vnd.oasis.opendocument."
_TYPE_OF = {
    "7z": "application/x-7z-compressed",
    "aac": "audio/aac",
    "avif": "image/avif",
    "bmp": "image/bmp",
    "bz2": "application/x-bzip2",
    "css": "text/css",
    "csv": "text/csv",
    "doc": "application/msword",
    "docx": f"{_OFFICE}wordprocessingml.document",
    "eml": "message/rfc822",
    "epub": "application/epub+zip",
    "gif": "image/gif",
    "gz": "application/gzip",
    "heic": "image/heic",
    "htm": "text/html",
    "html": "text/html",
    "ico": "image/vnd.microsoft.icon",
    "ics": "text/calendar",
    "jpeg": "image/jpeg",
    "jpg": "image/jpeg",
    "js": "text/javascript",
    "json": "application/json",
    "log": "text/plain",
    "m4a": "audio/mp4",
    "md": "text/markdown",
    "mov": "video/quicktime",
    "mp3": "audio/mpeg",
    "mp4": "video/mp4",
    "mpeg": "video/mpeg",
    "odp": f"{_OPEN_DOCUMENT}presentation",
    "ods": f"{_OPEN_DOCUMENT}spreadsheet",
    "odt": f"{_OPEN_DOCUMENT}text",
    "ogg": "audio/ogg",
    "p7s": "application/pkcs7-signature",
    "pdf": "application/pdf",
    "pkpass": "application/vnd.apple.pkpass",
    "png": "image/png",
    "ppt": "application/vnd.ms-powerpoint",
    "pptx": f"{_OFFICE}presentationml.presentation",
    "rtf": "application/rtf",
    "svg": "image/svg+xml",
    "tar": "application/x-tar",
    "tgz": "application/gzip",
    "tif": "image/tiff",
    "tiff": "image/tiff",
    "txt": "text/plain",
    "vcf": "text/vcard",
    "wav": "audio/wav",
    "webm": "video/webm",
    "webp": "image/webp",
    "xls": "application/vnd.ms-excel",
    "xlsx": f"{_OFFICE}spreadsheetml.sheet",
    "xml": "application/xml",
    "yaml": "application/yaml",
    "yml": "application/yaml",
    "zip": "application/zip",
}

# RFC 6838 section 4.2, restricted names: no type outside them was ever registered.
_NAME = r"[A-Za-z0-9][A-Za-z0-9!#$&^_.+-]{0,126}"
_CONTENT_TYPE = re.compile(rf"{_NAME}/{_NAME}")
_CONTENT_ID = re.compile(r"[!-;=?-~]+")  # printable ASCII without blanks, `<` and `>`


def content_type_of(filename: str) -> str:
    """The media type that the end of a filename stands for; UNKNOWN_TYPE where it says nothing."""
    _, dot, extension = filename.rpartition(".")
    return _TYPE_OF.get(extension.lower(), UNKNOWN_TYPE) if dot else UNKNOWN_TYPE


def check_attachments(attachments: Iterable[Attachment]) -> list[Violation]:
    """What is wrong with the files of one message, each named by its place."""
    found = []
    place_of: dict[str, str] = {}
    for number, attachment in enumerate(attachments):
        field = f"message.attachments[{number}]"
        found += _check_filename(f"{field}.filename", attachment.filename)
        if attachment.content_type:
            found += _check_content_type(f"{field}.content_type", attachment.content_type)
        content_id = attachment.content_id
        if not content_id:
            continue
        found += _check_content_id(f"{field}.content_id", content_id)
        if place_of.setdefault(content_id, field) != field:
            text = f"{place_of[content_id]} has the same content_id"
            found.append(Violation(f"{field}.content_id", Reason.OUT_OF_RANGE, text))
    return found


def _check_filename(field: str, filename: str) -> list[Violation]:
    found = check_text(field, filename, MAX_FILENAME, required=True, forbidden=SPOOFING)
    if "/" in filename or "\\" in filename:
        found.append(Violation(field, Reason.OUT_OF_RANGE, "a filename has no directory"))
    return found


def _check_content_type(field: str, content_type: str) -> list[Violation]:
    found = check_text(field, content_type, MAX_CONTENT_TYPE)
    if not found and not _CONTENT_TYPE.fullmatch(content_type):
        text = "expected type/subtype, without parameters"
        found.append(Violation(field, Reason.OUT_OF_RANGE, text))
    # Both are more than a file: a parser would look for parts, or for the rest of a message.
    if content_type.lower().startswith(("multipart/", "message/partial")):
        text = "multipart types and message/partial are not files"
        found.append(Violation(field, Reason.OUT_OF_RANGE, text))
    return found


def _check_content_id(field: str, content_id: str) -> list[Violation]:
    found = check_text(field, content_id, MAX_CONTENT_ID)
    if not found and not _CONTENT_ID.fullmatch(content_id):
        text = "a content_id is printable ASCII without blanks, < and >"
        found.append(Violation(field, Reason.OUT_OF_RANGE, text))
    return found

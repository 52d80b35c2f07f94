"""From a URL to a provider, or to one line that says what is wrong and hides the password."""

from __future__ import annotations

from pathlib import Path

import pytest

from mailgrpc.errors import SettingsError
from mailgrpc.providers.capture import CaptureProvider
from mailgrpc.providers.provider import Provider
from mailgrpc.providers.registry import open_channel
from mailgrpc.providers.sendgrid import SendGridProvider
from mailgrpc.providers.smtp import SmtpProvider


def opened(url: str) -> Provider:
    return open_channel("shop", url, concurrency=4, attempt_timeout_s=30.0)


@pytest.mark.parametrize(
    ("url", "port", "tls"),
    [
        ("smtp://mail.example.org", 25, "offered"),
        ("smtp://u:p@mail.example.org", 587, "starttls"),
        ("smtp://u:p@mail.example.org?tls=none", 587, "none"),
        ("smtp://mail.example.org?tls=starttls", 25, "starttls"),
        ("smtp://u:p@127.0.0.1:1025", 1025, "none"),
        ("smtp://localhost:1025?tls=starttls", 1025, "starttls"),
        ("smtps://u:p@mail.example.org", 465, "implicit"),
        ("smtps://[::1]:4650", 4650, "implicit"),
    ],
)
def test_how_an_smtp_url_is_secured(url: str, port: int, tls: str) -> None:
    provider = opened(url)
    assert isinstance(provider, SmtpProvider)
    assert (provider.server.port, provider.server.tls) == (port, tls)


def test_user_and_password_are_percent_decoded() -> None:
    provider = opened("smtp://a%40b.org:p%2Fw%3F%23@mail.example.org?timeout=7&helo=me.example.org")
    assert isinstance(provider, SmtpProvider)
    server = provider.server
    assert (server.user, server.password) == ("a@b.org", "p/w?#")
    assert (server.timeout_s, server.helo) == (7.0, "me.example.org")
    assert "p/w" not in repr(server)


def test_the_other_schemes() -> None:
    assert isinstance(opened("capture:"), CaptureProvider)
    assert isinstance(opened("sendgrid://:SG.key@"), SendGridProvider)
    assert isinstance(opened("sendgrid://:SG.key@127.0.0.1:8025?scheme=http"), SendGridProvider)


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("pigeon://x", "unknown scheme pigeon: known are smtp, smtps, sendgrid, capture"),
        ("mail.example.org", "not a URL"),
        ("smtp://", "needs a host"),
        ("smtp://u:hunter2/@mail.example.org", "not a URL"),
        ("smtp://u:hunter2#@mail.example.org", "not a URL"),
        ("smtp://u:hunter2@mail.example.org:port", "not a URL"),
        ("smtp://:hunter2@mail.example.org", "a password without a user"),
        ("smtp://u:hunter2@h?tsl=none", "unknown parameter tsl (did you mean tls?)"),
        ("smtp://u:hunter2@h?tls=maybe", "tls=maybe: expected one of starttls, none"),
        ("smtp://u:hunter2@h?tls=none&tls=starttls", "stands twice"),
        ("smtps://u:hunter2@h?tls=none", "unknown parameter tls"),
        ("smtp://u:hunter2@h?timeout=-1", "expected seconds, more than 0"),
        ("smtp://u:hunter2@h?ca_file=/no/such", "no such file"),
        ("sendgrid://hunter2@", "needs the API key as its password"),
        ("sendgrid://:hun%0Ater2@", "characters that no key has"),
        ("sendgrid://:hunter2@mail.example.org?scheme=http", "in the clear"),
        ("capture:?keep=-1", "at least 0"),
        ("capture://:hunter2@host", "has no host"),
    ],
)
def test_a_wrong_url_names_the_channel_and_shows_no_password(url: str, text: str) -> None:
    with pytest.raises(SettingsError) as raised:
        opened(url)
    line = str(raised.value)
    assert line.startswith("channel shop: ")
    assert text in line
    assert "hunter2" not in line
    assert "\n" not in line


def test_a_ca_file_is_read_where_it_exists(tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    file.touch()
    provider = opened(f"smtps://mail.example.org?ca_file={file}")
    assert isinstance(provider, SmtpProvider)
    assert provider.server.ca_file == file

"""From a channel's URL to its provider. A new provider is one line here and one file beside it."""

from __future__ import annotations

from collections.abc import Mapping

from mailgrpc.errors import SettingsError
from mailgrpc.providers.capture import CaptureProvider
from mailgrpc.providers.channel_url import parse_channel_url
from mailgrpc.providers.provider import Provider
from mailgrpc.providers.sendgrid import SendGridProvider
from mailgrpc.providers.smtp import SmtpProvider


def open_channel(name: str, url: str, *, concurrency: int, attempt_timeout_s: float) -> Provider:
    """The provider that `url` names; connects to nothing yet.

    `concurrency` bounds its connections, `attempt_timeout_s` one whole call of `send`. The same
    provider serves one event loop. Raises SettingsError with a line that names the channel and
    what is wrong, without the URL or its password.
    """
    parts = parse_channel_url(name, url)
    match parts.scheme:
        case "smtp" | "smtps":
            return SmtpProvider.from_url(parts, concurrency, attempt_timeout_s)
        case "sendgrid":
            return SendGridProvider.from_url(parts, concurrency, attempt_timeout_s)
        case "capture":
            return CaptureProvider.from_url(parts)
    raise SettingsError(
        f"channel {name}: unknown scheme {parts.scheme}: known are smtp, smtps, sendgrid, capture"
    )


def open_channels(
    urls: Mapping[str, str], *, concurrency: int, attempt_timeout_s: float
) -> dict[str, Provider]:
    """The providers of all configured channels, by name. Raises SettingsError."""
    return {
        name: open_channel(name, url, concurrency=concurrency, attempt_timeout_s=attempt_timeout_s)
        for name, url in urls.items()
    }

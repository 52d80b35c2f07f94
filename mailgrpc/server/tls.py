"""The certificate and key of the gRPC server, looked at before they are used.

gRPC takes any bytes and then refuses every handshake, without saying why; so what is no pair of a
certificate and its key is told at the start.
"""

from __future__ import annotations

import ssl
from pathlib import Path

from mailgrpc.errors import SettingsError

CERT_SETTING = "MAILGRPC_TLS_CERT_FILE"
KEY_SETTING = "MAILGRPC_TLS_KEY_FILE"


def read_pair(cert: Path, key: Path) -> tuple[bytes, bytes]:
    """(key, certificate chain), as gRPC wants them. Raises SettingsError."""
    pair = _read(KEY_SETTING, key), _read(CERT_SETTING, cert)
    try:
        # The password keeps OpenSSL from asking the terminal for one; gRPC has none to give.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(cert, key, password="")
    except (ssl.SSLError, ValueError) as error:
        why = getattr(error, "reason", None) or "not PEM"
        raise SettingsError(
            f"{CERT_SETTING} = {cert} and {KEY_SETTING} = {key}: no PEM certificate with its"
            f" unencrypted key ({why.replace('_', ' ').lower()})"
        ) from error
    return pair


def _read(setting: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{setting} = {path}: {error.strerror}") from error

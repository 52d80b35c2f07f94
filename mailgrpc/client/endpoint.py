"""Where the server is and how to reach it: target, key, TLS, channel options."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio

from mailgrpc import __version__

DEFAULT_TARGET = "127.0.0.1:50051"
_MAX_MESSAGE_BYTES = 16 * 1024 * 1024  # a request has at most 10 MiB; so has GetMessage's answer


OPTIONS: tuple[tuple[str, str | int], ...] = (
    ("grpc.primary_user_agent", f"mailgrpc-python/{__version__}"),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    # A peer that vanished without a word is noticed in the middle of a call.
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    # Between its own attempts to connect, gRPC answers from memory: those must not be rarer than
    # ours.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 5_000),  # for all its name, how long one attempt may take
    ("grpc.max_reconnect_backoff_ms", 5_000),
    # Trying again is decided in one place, `policy`.
    ("grpc.enable_retries", 0),
    ("grpc.service_config", json.dumps({"loadBalancingConfig": [{"round_robin": {}}]})),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """A server. `target` is a gRPC target: `host:port`, `dns:///name:port`, `unix:/path`.

    `tls` with no `ca_file` trusts the roots that gRPC brings along; a `ca_file` (PEM) turns TLS on.
    """

    target: str = DEFAULT_TARGET
    api_key: str | None = field(default=None, repr=False)
    ca_file: Path | None = None
    tls: bool = False

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """What goes with every call."""
        return (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()

    def channel(self) -> grpc.Channel:
        """A new channel for threads. Raises OSError when the file of roots cannot be read."""
        credentials = self._credentials()
        if credentials is None:
            return grpc.insecure_channel(self.target, options=OPTIONS)
        return grpc.secure_channel(self.target, credentials, options=OPTIONS)

    def aio_channel(self) -> grpc.aio.Channel:
        """A new channel for the running event loop. Raises OSError as `channel`."""
        credentials = self._credentials()
        if credentials is None:
            return grpc.aio.insecure_channel(self.target, options=OPTIONS)
        return grpc.aio.secure_channel(self.target, credentials, options=OPTIONS)

    def _credentials(self) -> grpc.ChannelCredentials | None:
        if self.ca_file is None and not self.tls:
            return None
        roots = None if self.ca_file is None else self.ca_file.read_bytes()
        return grpc.ssl_channel_credentials(root_certificates=roots)

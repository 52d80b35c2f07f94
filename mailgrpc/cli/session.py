"""What the commands that call a server share: settings, the client, and errors in one line."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

import click

from mailgrpc.config import Settings, load_settings
from mailgrpc.errors import MailgrpcError

if TYPE_CHECKING:
    from mailgrpc.client import CallPolicy, MailClient, MailError
    from mailgrpc.client.endpoint import Endpoint

F = TypeVar("F", bound=Callable[..., object])


class Session:
    """One run of the command."""

    def __init__(self, overrides: Mapping[str, str], timeout_s: float) -> None:
        self._overrides = overrides
        self._timeout_s = timeout_s
        self._settings: Settings | None = None
        self._complained = False

    @property
    def settings(self) -> Settings:
        """The settings, with what the command line says about the client. Raises SettingsError."""
        if self._settings is None:
            self._settings = load_settings(overrides=self._overrides)
        return self._settings

    @property
    def overrides(self) -> Mapping[str, str]:
        """What the command line says about the client, by the names of the settings."""
        return self._overrides

    def policy(self) -> CallPolicy:
        """For a person who waits: an answer within `--timeout`, good or bad."""
        from mailgrpc.client import CallPolicy  # noqa: PLC0415

        return CallPolicy(timeout_s=self._timeout_s, try_timeout_s=self._timeout_s)

    def client(self) -> MailClient:
        """A client of the server that the settings name; to be closed."""
        from mailgrpc.client import MailClient  # noqa: PLC0415

        return MailClient.from_settings(
            self.settings, policy=self.policy(), on_retry=self._complain
        )

    def endpoint(self) -> Endpoint:
        """Where the settings say that the server is."""
        from mailgrpc.client.endpoint import Endpoint  # noqa: PLC0415

        settings = self.settings
        return Endpoint(target=settings.target, api_key=settings.api_key, ca_file=settings.ca_file)

    def explain(self, error: MailgrpcError) -> str:
        """One line that says what is wrong and what to do."""
        from mailgrpc.client import AccessDeniedError, InvalidRequestError, UnavailableError  # noqa: PLC0415

        if isinstance(error, UnavailableError) and not error.reason:
            return self._unreachable(error)
        if isinstance(error, InvalidRequestError) and error.violations:
            parts = (f"{v.field}: {v.description} ({v.reason})" for v in error.violations)
            return "; ".join(parts)
        if isinstance(error, AccessDeniedError):
            return f"{error}; give an API key by --api-key, MAILGRPC_API_KEY or its _FILE"
        return str(error)

    def _unreachable(self, error: MailError) -> str:
        target = self.settings.target
        if isinstance(error, TimeoutError):
            return error.text  # it was reached; what it was waited for did not come
        if "refused" in error.text.lower() or "No such file" in error.text:
            return (
                f"no server listens at {target}: start one with `mailgrpc up`, or name another"
                " by --target or MAILGRPC_TARGET"
            )
        return f"no answer from {target}: {error.text or error.code.name}"

    def _complain(self, error: MailError, _wait_s: float) -> None:
        """Say once that it takes longer, so that nobody waits in the dark."""
        if not self._complained:
            self._complained = True
            click.echo(f"{self.explain(error)}; trying again …", err=True)


pass_session = click.make_pass_decorator(Session)


def json_option(command: F) -> F:
    """`--json`: what the server answered, instead of what a person wants to see."""
    return click.option(
        "--json",
        "as_json",
        is_flag=True,
        help="Print the server's answers as ProtoJSON, one object a line.",
    )(command)

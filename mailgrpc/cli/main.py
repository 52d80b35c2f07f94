"""The root command: what there is, loaded only when it is used; errors as one line.

`mailgrpc --help` must be quick and must work in every install, so the commands stand in a table
here, with the first line of their help; a test holds the two together.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import click

from mailgrpc import __version__
from mailgrpc.cli.session import Session
from mailgrpc.errors import MailgrpcError

EXIT_INTERRUPTED = 130


@dataclass(frozen=True, slots=True)
class Entry:
    """A command: its one line of help, and the extra that brings what it imports."""

    help: str
    extra: str = "cli"


SECTIONS: dict[str, dict[str, Entry]] = {
    "Run": {
        "up": Entry("Run all of mailgrpc here.", "embedded"),
        "demo": Entry("Show the main job with real mails, and exit.", "embedded"),
        "serve": Entry("Serve gRPC until SIGTERM or Ctrl-C.", "server"),
        "work": Entry("Deliver what is due until SIGTERM or Ctrl-C.", "server"),
        "migrate": Entry("Create or upgrade the database schema.", "server"),
    },
    "Mail": {
        "send": Entry("Hand over one mail."),
        "status": Entry("Tell where a message stands."),
        "show": Entry("Show a message with its content and attempts."),
        "events": Entry("List what happened after a resume token."),
        "watch": Entry("Show what happens, as it happens."),
        "resend": Entry("Force one more attempt."),
        "clear": Entry("Remove messages that have ended."),
        "prefs": Entry("Show or change which mail an address refuses."),
        "inbox": Entry("Look at the mails that the local inbox caught."),
        "call": Entry("Call any method with JSON."),
    },
    "Look after": {
        "key": Entry(
            "Make, list and revoke API keys. Asks the database, not the server.", "server"
        ),
        "workers": Entry("List the worker sessions. Asks the database, not the server.", "server"),
        "config": Entry("Print all settings, secrets hidden."),
        "doctor": Entry("Check all that mailgrpc needs.", "server"),
    },
}
COMMANDS = {name: entry for section in SECTIONS.values() for name, entry in section.items()}


class Root(click.Group):
    """Loads a command when it is asked for, and ends every error in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """All names, none loaded."""
        return list(COMMANDS)

    def get_command(
        self,
        ctx: click.Context,  # noqa: ARG002
        cmd_name: str,
    ) -> click.Command | None:
        """Load one. Raises ClickException with what to install."""
        if cmd_name not in COMMANDS:
            return None
        try:
            module = importlib.import_module(f"mailgrpc.cli.{cmd_name}")
        except ModuleNotFoundError as error:
            raise _not_installed(cmd_name, error) from error
        command: click.Command = getattr(module, cmd_name)
        return command

    def format_commands(
        self,
        ctx: click.Context,  # noqa: ARG002
        formatter: click.HelpFormatter,
    ) -> None:
        """The table, by sections."""
        width = max(map(len, COMMANDS))
        for title, entries in SECTIONS.items():
            with formatter.section(title):
                rows = [(name.ljust(width), entry.help) for name, entry in entries.items()]
                formatter.write_dl(rows)

    def invoke(self, ctx: click.Context) -> Any:
        """Run, and tell an error in one line."""
        try:
            return super().invoke(ctx)
        except MailgrpcError as error:
            session = ctx.find_object(Session)
            text = str(error) if session is None else session.explain(error)
            raise click.ClickException(text) from error
        except ModuleNotFoundError as error:
            raise _not_installed(ctx.invoked_subcommand or "", error) from error
        except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
            raise click.ClickException(str(error)) from error  # a file that the user named
        except KeyboardInterrupt:
            raise click.exceptions.Exit(EXIT_INTERRUPTED) from None


def _not_installed(command: str, error: ModuleNotFoundError) -> Exception:
    if error.name is None or error.name.partition(".")[0] == "mailgrpc":
        return error  # a fault of ours, not a choice of the user's
    extra = COMMANDS[command].extra if command in COMMANDS else "cli"
    return click.ClickException(
        f"`mailgrpc {command}` needs {error.name}, which is not installed:"
        f" pip install 'mailgrpc[{extra}]'"
    )


@click.command(
    cls=Root,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit codes: 0 done, 1 an error (one line on stderr), 2 wrong usage, 130 interrupted."
    " `mailgrpc send --wait` has more. Settings come from MAILGRPC_* and mailgrpc.toml: see"
    " `mailgrpc config`.",
)
@click.option("--target", metavar="HOST:PORT", help="The server to call. [MAILGRPC_TARGET]")
@click.option(
    "--api-key",
    metavar="KEY",
    help="The API key to call it with; better given by MAILGRPC_API_KEY or MAILGRPC_API_KEY_FILE,"
    " since other users can see a command line.",
)
@click.option("--ca-file", metavar="PEM", help="Roots to trust; turns TLS on. [MAILGRPC_CA_FILE]")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0, min_open=True),
    default=10.0,
    show_default=True,
    metavar="SECONDS",
    help="How long to try, where the server does not answer.",
)
@click.version_option(__version__, prog_name="mailgrpc")
@click.pass_context
def root(
    ctx: click.Context,
    target: str | None,
    api_key: str | None,
    ca_file: str | None,
    timeout_s: float,
) -> None:
    """mailgrpc: a transactional mail gateway that can be trusted with the answer.

    Try `mailgrpc demo`, or `mailgrpc up` and, in another terminal, `mailgrpc send`.
    """
    given = {"target": target, "api_key": api_key, "ca_file": ca_file}
    overrides = {name: text for name, text in given.items() if text is not None}
    ctx.obj = Session(overrides, timeout_s)


def command_help() -> Iterable[tuple[str, str]]:
    """(name, line of help) of every command, as the table says."""
    return ((name, entry.help) for name, entry in COMMANDS.items())

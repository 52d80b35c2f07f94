"""`mailgrpc inbox`: the mails that the local inbox of `mailgrpc up` caught."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import click

from mailgrpc.cli.output import Output, Styled
from mailgrpc.cli.session import Session
from mailgrpc.embedded.mailbox import StoredMail, list_inbox, read_mail

INBOX = "inbox"


@click.group(invoke_without_command=True)
@click.option("--data-dir", type=click.Path(path_type=Path), help="The directory of `mailgrpc up`.")
@click.pass_context
def inbox(ctx: click.Context, data_dir: Path | None) -> None:
    """Look at the mails that the local inbox caught.

    Without a subcommand: list them.
    """
    session = ctx.find_object(Session)
    assert session is not None
    ctx.meta[INBOX] = (data_dir or session.settings.data_dir) / INBOX
    if ctx.invoked_subcommand is None:
        ctx.invoke(list_mails)


@inbox.command("list")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="One object a line.")
@click.pass_context
def list_mails(ctx: click.Context, limit: int, as_json: bool) -> None:
    """The newest mails, newest first."""
    output = Output()
    mails = list_inbox(ctx.meta[INBOX], limit)
    if as_json:
        for mail in mails:
            output.json(dataclasses.asdict(mail) | {"received_at": mail.received_at.isoformat()})
        return
    if not mails:
        click.echo(f"no mail in {ctx.meta[INBOX]}; `mailgrpc up` catches some", err=True)
    output.table(("mail", "from", "to", "subject", "bytes"), map(_row, mails))


@inbox.command("show")
@click.argument("mail", metavar="MAIL", default="latest")
@click.pass_context
def show_mail(ctx: click.Context, mail: str) -> None:
    """Print one mail as it came; without MAIL, the newest."""
    directory: Path = ctx.meta[INBOX]
    if mail == "latest":
        newest = list_inbox(directory, 1)
        if not newest:
            raise click.ClickException(f"no mail in {directory}")
        mail = newest[0].id
    try:
        _, content = read_mail(directory, mail)
    except LookupError as error:
        raise click.ClickException(str(error.args[0])) from error
    output = Output()
    if output.is_terminal:
        output.text(content.decode("utf-8", "replace"))
    else:
        sys.stdout.buffer.write(content)


def _row(mail: StoredMail) -> tuple[str, str, str, str | Styled, str]:
    return (
        mail.id,
        mail.envelope.mail_from,
        " ".join(mail.envelope.rcpt_tos),
        Styled(mail.subject, "bold"),
        str(mail.size),
    )

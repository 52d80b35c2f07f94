"""`mailgrpc config`: all settings."""

from __future__ import annotations

import click

from mailgrpc.cli.output import Output, Styled
from mailgrpc.cli.session import Session, pass_session
from mailgrpc.config import describe_settings, load_settings


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One object: setting to value.")
@pass_session
def config(session: Session, as_json: bool) -> None:
    """Print all settings, secrets hidden.

    They come from MAILGRPC_* in the environment, a secret also from the file that MAILGRPC_*_FILE
    names, then from mailgrpc.toml. Exit code 1 when one of them is wrong.
    """

    def warn(text: str) -> None:
        click.echo(f"warning: {text}", err=True)

    described = describe_settings(load_settings(overrides=session.overrides, warn=warn))
    output = Output()
    if as_json:
        output.json({name: value for name, value, _ in described})
        return
    rows = ((name, value, Styled(doc, "dim")) for name, value, doc in described)
    output.table(("setting", "value", "what it is"), rows)

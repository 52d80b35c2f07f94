"""The command, `mailgrpc` or `python -m mailgrpc`. The base install has none: it is a library."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the command line."""
    try:
        import click  # noqa: F401, PLC0415  asked first, so that its lack is told in one line
    except ModuleNotFoundError:
        sys.exit("mailgrpc: the command needs click: pip install 'mailgrpc[cli]'")
    # Else gRPC tells at length, among what a command says, of each connection that ends.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from mailgrpc.cli.main import root  # noqa: PLC0415  needs click

    root(prog_name="mailgrpc")


if __name__ == "__main__":
    main()

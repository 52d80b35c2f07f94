"""Runs `mailgrpc up` with stand-ins for what it starts of ours: a process for tests to kill."""

import sys
from pathlib import Path

from mailgrpc.cli.main import root
from mailgrpc.embedded import stack
from mailgrpc.embedded.command import python_command

STANDIN = str(Path(__file__).with_name("standin.py"))


def command(module: str, *arguments: str) -> list[str]:
    if module == "mailgrpc":
        return [sys.executable, STANDIN, *arguments]
    return python_command(module, *arguments)


stack.python_command = command  # type: ignore[attr-defined]

if __name__ == "__main__":
    root(["up", *sys.argv[1:]])

"""What is printed, for three readers: a terminal, a pipe, and a program that asked for JSON.

A terminal gets colours (not with NO_COLOR) and aligned tables; a pipe the same cells with tabs
between them and no heading. Foreign text, such as a subject or what a mail server answered, never
reaches a terminal as control characters.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TextIO, TypeAlias

from google.protobuf.json_format import MessageToJson
from google.protobuf.message import Message

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class Styled:
    """Text with a style of rich's, which only a terminal shows."""

    text: str
    style: str


Cell: TypeAlias = str | Styled


def clean(text: str) -> str:
    """One line without control characters."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


def clean_lines(text: str) -> str:
    """The same for text of many lines."""
    return "\n".join(clean(line.expandtabs()) for line in text.splitlines())


class Output:
    """Where a command prints.

    `for_people`: it is read by people even where it is no terminal (a log, the demo): aligned, and
    without tabs.
    """

    def __init__(self, stream: TextIO | None = None, *, for_people: bool = False) -> None:
        self._stream = stream or sys.stdout
        self.is_terminal = self._stream.isatty()
        self._for_people = for_people or self.is_terminal
        self._console: Console | None = None

    def line(self, *cells: Cell, widths: Sequence[int] = ()) -> None:
        """One line of cells. `widths`: the least width of each, for people."""
        if not self._for_people:
            self._write("\t".join(_text(cell) for cell in cells))
            return
        padded = [
            _text(cell).ljust(widths[index] if index < len(widths) else 0)
            for index, cell in enumerate(cells)
        ]
        if not self.is_terminal:
            self._write("  ".join(padded).rstrip())
            return
        from rich.text import Text  # noqa: PLC0415

        parts = [(text, _style(cell)) for text, cell in zip(padded, cells, strict=True)]
        line = Text("  ").join(Text(text, style=style) for text, style in parts)
        line.rstrip()
        self._rich().print(line, soft_wrap=True)

    def table(self, heading: Sequence[str], rows: Iterable[Sequence[Cell]]) -> None:
        """Rows of cells."""
        if not self.is_terminal:
            for row in rows:
                self.line(*row)
            return
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415

        table = Table(box=None, pad_edge=False, header_style="bold")
        for title in heading:
            table.add_column(title, overflow="fold")
        for row in rows:
            table.add_row(*(Text(_text(cell), style=_style(cell)) for cell in row))
        self._rich().print(table)

    def text(self, text: str) -> None:
        """Many lines as they are, clean on a terminal."""
        self._write(clean_lines(text) if self.is_terminal else text)

    def json(self, value: Message | dict[str, Any]) -> None:
        """One object on one line: ProtoJSON of a message."""
        if isinstance(value, Message):
            self._write(MessageToJson(value, indent=None, ensure_ascii=False))
        else:
            self._write(json.dumps(value, ensure_ascii=False))

    def _write(self, text: str) -> None:
        self._stream.write(text + "\n")
        self._stream.flush()

    def _rich(self) -> Console:
        if self._console is None:
            from rich.console import Console  # noqa: PLC0415

            self._console = Console(file=self._stream, highlight=False, markup=False, emoji=False)
        return self._console


def _text(cell: Cell) -> str:
    return clean(cell.text if isinstance(cell, Styled) else cell)


def _style(cell: Cell) -> str:
    return cell.style if isinstance(cell, Styled) else ""

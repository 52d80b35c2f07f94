"""What a terminal, a pipe and a program get; and what never reaches a terminal."""

from __future__ import annotations

import io
from datetime import UTC, datetime, timedelta

import pytest

from mailgrpc.cli.output import Output, Styled, clean, clean_lines
from mailgrpc.cli.values import parse_duration, parse_when
from mailgrpc.cli.words import delivery_detail, length, move_cell, result_text
from mailgrpc.v1 import delivery_pb2, event_pb2


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    return Terminal()


def test_a_pipe_gets_tabs_and_no_colours() -> None:
    stream = io.StringIO()
    output = Output(stream)
    output.table(("name", "state"), [("ada", Styled("SENT", "green"))])
    output.line("a", Styled("b", "red"), widths=[10])
    assert stream.getvalue() == "ada\tSENT\na\tb\n"


def test_a_terminal_gets_a_heading_and_colours(terminal: Terminal) -> None:
    Output(terminal).table(("name", "state"), [("ada", Styled("SENT", "green"))])
    text = terminal.getvalue()
    assert "name" in text
    assert "\x1b[32mSENT" in text


def test_no_color_is_heard(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    Output(terminal).line("ada", Styled("SENT", "green"))
    assert terminal.getvalue() == "ada  SENT\n"


def test_people_get_columns_even_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    Output(stream, for_people=True).line("a", Styled("b", "red"), "c", widths=[3, 3])
    assert stream.getvalue() == "a    b    c\n"


@pytest.mark.parametrize("text", ["\x1b]0;owned\x07", "a\x1b[2Jb", "a\u202eb", "a\x9bb", "a\rb"])
def test_foreign_text_cannot_move_the_cursor(terminal: Terminal, text: str) -> None:
    output = Output(terminal)
    output.line(text)
    output.table(("subject",), [(text,)])
    output.text(f"first\n{text}")
    shown = terminal.getvalue()
    assert all(
        c.isprintable() or c == "\n" for c in shown.replace("\x1b[1m", "").replace("\x1b[0m", "")
    )


def test_markup_of_rich_is_text(terminal: Terminal) -> None:
    Output(terminal).line("[red]no[/red] :smile:")
    assert terminal.getvalue() == "[red]no[/red] :smile:\n"


def test_clean_keeps_what_people_write() -> None:
    assert clean("Größe ☃ 好") == "Größe ☃ 好"
    assert clean_lines("a\tb\r\nc") == "a       b\nc"


NOW = datetime(2026, 11, 20, 12, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "ago", "expected"),
    [
        ("now", True, NOW),
        ("2h", False, NOW + timedelta(hours=2)),
        ("2h", True, NOW - timedelta(hours=2)),
        ("+2h", True, NOW + timedelta(hours=2)),
        ("-1.5d", False, NOW - timedelta(days=1.5)),
        ("2026-11-20T14:00:00Z", False, NOW + timedelta(hours=2)),
        ("2026-11-20T14:00+02:00", True, NOW),
    ],
)
def test_times(text: str, ago: bool, expected: datetime) -> None:
    assert parse_when(text, NOW, ago=ago) == expected


def test_a_time_without_a_zone_is_local() -> None:
    local = parse_when("2026-11-20T12:00", NOW, ago=True)
    assert local == datetime(2026, 11, 20, 12).astimezone()


@pytest.mark.parametrize("text", ["", "5", "5 m", "h", "-1h", "1y"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(ValueError, match="duration"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.021, "0.02 s"), (1.0, "1 s"), (1.26, "1.3 s"), (59.7, "60 s"), (600, "10 min"),
     (3 * 3600 + 1, "3.0 h"), (30 * 86400, "30 d"), (-5, "0 s")],
)  # fmt: skip
def test_lengths(seconds: float, text: str) -> None:
    assert length(seconds) == text


def test_a_result_is_the_providers_words_with_its_codes_once() -> None:
    result = delivery_pb2.AttemptResult(
        status_code=250, enhanced_code="2.0.0", text="250 2.0.0 Ok: queued"
    )
    assert result_text(result) == "250 2.0.0 Ok: queued"
    silent = delivery_pb2.AttemptResult(cause=delivery_pb2.FAILURE_CAUSE_BAD_ADDRESS)
    assert result_text(silent) == "bad address"


def test_a_deferred_delivery_says_when_it_is_tried_next() -> None:
    delivery = delivery_pb2.Delivery(
        state=delivery_pb2.DELIVERY_STATE_DEFERRED,
        wait_reason=delivery_pb2.WAIT_REASON_RATE_LIMITED,
        attempt_count=2,
        possibly_sent=True,
    )
    delivery.state_since.FromSeconds(100)
    delivery.due_at.FromSeconds(130)
    assert delivery_detail(delivery) == "next in 30 s (rate limited)   attempt 2   possibly sent"


def test_what_a_newer_server_says_is_shown_by_number() -> None:
    event = event_pb2.Event(kind=99)  # type: ignore[arg-type]
    assert move_cell(event) == Styled("99", "magenta")
    delivery = delivery_pb2.Delivery(state=98, suppression_reason=97)  # type: ignore[arg-type]
    change = event_pb2.StateChanged(delivery=delivery)
    kind = event_pb2.EVENT_KIND_STATE_CHANGED
    assert move_cell(event_pb2.Event(kind=kind, state_changed=change)) == Styled("98", "dim")

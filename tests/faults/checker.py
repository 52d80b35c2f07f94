"""What must hold after a run: the history of the clients against the rows and the ledger.

Pure: a run is handed in as data, so that the checker is itself tested with runs that never were.

A finding is a broken promise. What is allowed is counted, and each case is held to its reason:
    a second copy in RETRYING      only as many as attempts whose outcome nobody knew
    OUTCOME_UNKNOWN in SEND_ONCE   only where an attempt was started, and something happened to it
Something happened to an attempt: its worker was hit, PostgreSQL or the line was away while it ran,
or the provider itself broke off (`swallowed` or `cut`, which is in the nature of that attempt).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from mailgrpc.core.delivery import MOVES, UNENDED, Cause, Outcome, State
from tests.faults.clients import History, Seen
from tests.faults.ledger import Entry, copies

SLACK_S = 1.5
"""Clocks of one machine, but written down by different processes."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that was done to the world, from when to when (time.time())."""

    kind: str
    begun_at: float
    ended_at: float
    kills: int = 0


@dataclass(frozen=True, slots=True)
class Tried:
    """An attempt that ended, as its row says."""

    number: int
    started_at: float
    ended_at: float
    outcome: Outcome
    cause: Cause


@dataclass(frozen=True, slots=True)
class Box:
    """A delivery as its row says in the end."""

    delivery_id: str
    message_id: str
    key: str  # request_id
    recipient: str
    once: bool
    state: State
    version: int
    possibly_sent: bool
    attempts: tuple[Tried, ...] = ()


@dataclass(slots=True)
class Row:
    """One line of the table: what belongs to a kind of fault."""

    struck: int = 0
    kills: int = 0
    acknowledged: int = 0
    lost: int = 0
    twice_once: int = 0
    again: int = 0
    again_justified: int = 0
    sending: int = 0
    unknown: int = 0
    unknown_justified: int = 0


@dataclass(slots=True)
class Verdict:
    """What a run came to."""

    findings: list[str] = field(default_factory=list)
    rows: dict[str, Row] = field(default_factory=lambda: defaultdict(Row))
    gaps: int = 0
    repeats: int = 0
    sent: int = 0

    def found(self, text: str) -> None:
        self.findings.append(text)


def check(
    history: History,
    boxes: Sequence[Box],
    entries: Sequence[Entry],
    faults: Sequence[Fault],
) -> Verdict:
    """Hold a run to every promise."""
    verdict = Verdict()
    for fault in faults:
        verdict.rows[fault.kind].struck += 1
        verdict.rows[fault.kind].kills += fault.kills
    for surprise in history.surprises:
        verdict.found(f"a client was told {surprise}")
    _check_acknowledged(verdict, history, boxes, faults)
    taken = copies(entries)
    for box in boxes:
        _check_box(verdict, box, taken[box.key, box.recipient], faults)
    for seen in history.watchers:
        _check_watcher(verdict, seen, boxes)
    return verdict


def _latest(faults: Sequence[Fault], at: float) -> str:
    """The fault under which something stands in the table: the last one that had begun."""
    kind = "before any"
    for fault in faults:
        if fault.begun_at > at:
            break
        kind = fault.kind
    return kind


def _check_acknowledged(
    verdict: Verdict, history: History, boxes: Sequence[Box], faults: Sequence[Fault]
) -> None:
    by_key: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for box in boxes:
        by_key[box.key].add((box.message_id, box.recipient))
    for key, told in history.acknowledged.items():
        row = verdict.rows[_latest(faults, told.at)]
        row.acknowledged += 1
        if len(told.message_ids) != 1:
            verdict.found(f"{key} was acknowledged as {sorted(told.message_ids)}")
        stored = by_key.get(key, set())
        if stored != {(m, r) for m in told.message_ids for r in told.recipients}:
            row.lost += 1
            verdict.found(f"{key} was acknowledged, and of it is stored: {sorted(stored)}")


def _check_box(verdict: Verdict, box: Box, taken: int, faults: Sequence[Fault]) -> None:
    doubts = [a for a in box.attempts if a.outcome is Outcome.UNKNOWN]
    about = f"{box.key} to {box.recipient} ({box.state.name}, {taken} copies)"
    row = (
        verdict.rows[_latest(faults, (doubts or box.attempts)[0].started_at)]
        if (doubts or box.attempts)
        else verdict.rows["before any"]
    )
    if box.state in UNENDED:
        row.sending += box.state is State.SENDING
        verdict.found(f"{about}: it has not ended")
    if box.state is State.SENT:
        verdict.sent += 1
        if taken == 0:
            row.lost += 1
            verdict.found(f"{about}: nobody got it")
    if box.state is State.FAILED:
        last = box.attempts[-1] if box.attempts else None
        if not box.once and (last is None or last.outcome is not Outcome.REJECTED):
            row.lost += 1
            verdict.found(f"{about}: nobody refused it for good, it had {box.attempts}")
    if box.state not in (State.SENT, State.FAILED, State.OUTCOME_UNKNOWN) and (
        box.state not in UNENDED
    ):
        row.lost += 1
        verdict.found(f"{about}: nothing should have ended it so")
    if box.once:
        _check_once(verdict, row, box, taken, about, doubts, faults)
    elif taken > 1:
        row.again += taken - 1
        justified = min(taken - 1, sum(_happened(a, faults) for a in doubts), len(doubts))
        justified = max(justified, min(taken - 1, _late_doubts(box)))
        row.again_justified += justified
        if justified < taken - 1:
            verdict.found(f"{about}: sent again for no reason, it had {box.attempts}")
    _check_attempts(verdict, box, about)


def _late_doubts(box: Box) -> int:
    """Attempts that were in doubt when another was started, and proven later."""
    return sum(
        later.started_at < earlier.ended_at or box.possibly_sent
        for earlier, later in zip(box.attempts, box.attempts[1:], strict=False)
        if earlier.outcome in (Outcome.ACCEPTED, Outcome.UNKNOWN)
    )


def _check_once(
    verdict: Verdict,
    row: Row,
    box: Box,
    taken: int,
    about: str,
    doubts: Sequence[Tried],
    faults: Sequence[Fault],
) -> None:
    if taken > 1:
        row.twice_once += 1
        verdict.found(f"{about}: SEND_ONCE was sent twice, it had {box.attempts}")
    if box.state is State.OUTCOME_UNKNOWN:
        row.unknown += 1
        if doubts and all(_happened(a, faults) for a in doubts):
            row.unknown_justified += 1
        else:
            verdict.found(f"{about}: in doubt for no reason, it had {box.attempts}")


def _check_attempts(verdict: Verdict, box: Box, about: str) -> None:
    accepted = [a for a in box.attempts if a.outcome is Outcome.ACCEPTED]
    if accepted and box.state is not State.SENT:
        verdict.found(f"{about}: it was accepted, it had {box.attempts}")
    for one in accepted:
        after = [a for a in box.attempts if a.started_at > one.ended_at + SLACK_S]
        if after:
            verdict.found(f"{about}: tried again after it was accepted, it had {box.attempts}")


def _happened(tried: Tried, faults: Sequence[Fault]) -> bool:
    """Whether something befell an attempt that ended in doubt."""
    if tried.cause is not Cause.WORKER_LOST:
        return True  # the provider's own answer, or none: the ledger has `swallowed`, or the line
    return any(
        fault.begun_at <= tried.ended_at + SLACK_S and fault.ended_at >= tried.started_at - SLACK_S
        for fault in faults
    )


def _check_watcher(verdict: Verdict, seen: Sequence[Seen], boxes: Sequence[Box]) -> None:
    last: Counter[str] = Counter()
    ids: set[str] = set()
    for event in seen:
        repeated = event.event_id in ids or event.version <= last[event.delivery_id]
        if repeated:
            verdict.repeats += 1
            verdict.found(f"{event}: told again, or out of order")
            continue
        if event.version != last[event.delivery_id] + 1:
            verdict.gaps += 1
            verdict.found(f"{event}: after version {last[event.delivery_id]}")
        ids.add(event.event_id)
        last[event.delivery_id] = event.version
        _check_move(verdict, event)
    for box in boxes:
        if last[box.delivery_id] != box.version:
            verdict.gaps += 1
            verdict.found(
                f"{box.delivery_id} is at version {box.version}, told until {last[box.delivery_id]}"
            )


def _check_move(verdict: Verdict, event: Seen) -> None:
    if event.old_state and State(event.state) not in MOVES[State(event.old_state)]:
        verdict.found(f"{event}: not a move")


def table(verdict: Verdict) -> str:
    """The rows as Markdown; the kinds in the order in which they first struck."""
    head = (
        "| fault | struck | kills | acknowledged | lost | SEND_ONCE sent twice"
        " | RETRYING sent again (justified) | left in SENDING"
        " | SEND_ONCE in doubt (justified) |\n|---|---|---|---|---|---|---|---|---|"
    )
    total = Row()
    lines = []
    for kind, row in verdict.rows.items():
        lines.append(_line(kind, row))
        _add(total, row)
    return "\n".join([head, *lines, _line("**all**", total)])


def _line(kind: str, r: Row) -> str:
    return (
        f"| {kind} | {r.struck} | {r.kills} | {r.acknowledged:,} | {r.lost} | {r.twice_once}"
        f" | {r.again} ({r.again_justified}) | {r.sending} | {r.unknown} ({r.unknown_justified}) |"
    )


def _add(total: Row, row: Row) -> None:
    for name in Row.__slots__:
        setattr(total, name, getattr(total, name) + getattr(row, name))


def totals(verdict: Verdict) -> Mapping[str, int]:
    """The sums of all columns."""
    total = Row()
    for row in verdict.rows.values():
        _add(total, row)
    numbers = {name: getattr(total, name) for name in Row.__slots__}
    return {**numbers, "sent": verdict.sent, "gaps": verdict.gaps, "repeats": verdict.repeats}

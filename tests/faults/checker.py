"""What must hold after a run: the history of the clients against the rows and the ledger.

Pure: a run is handed in as data, so that the checker is itself tested with runs that never were
(test_checker.py).

A finding is a broken promise. What is allowed is counted, and each case is held to its reason:

    a second copy in RETRYING      only as many as times nobody knew what an attempt had come to
    OUTCOME_UNKNOWN in SEND_ONCE   only after an attempt, and only where something befell it

What can befall an attempt (`explanation`): the provider itself broke off or said nothing clear,
which its ledger tells; the line to the provider was spoilt while it ran; its worker was hit, or
lost PostgreSQL, while it ran. A fault of our own code (INTERNAL) explains nothing.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from mailgrpc.core.delivery import MOVES, UNENDED, Cause, Outcome, State
from tests.faults.clients import History, Seen
from tests.faults.ledger import UNCLEAR, Entry, copies, said

SLACK_S = 1.5
"""Clocks of one machine, but written down by different processes."""
PROVIDER = "the provider's own doing"
CALM = "before any"


@dataclass(frozen=True, slots=True)
class Fault:
    """Something that was done to the world, from when to when (time.time())."""

    kind: str
    begun_at: float
    ended_at: float
    kills: int = 0

    @property
    def hurts(self) -> str:
        """What it was done to: the first word of its kind."""
        return self.kind.split()[0].partition("'")[0]


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
    channel: str = "default"

    def __str__(self) -> str:
        tried = ", ".join(f"{a.outcome.name}/{a.cause.name}" for a in self.attempts)
        mode = "SEND_ONCE" if self.once else "RETRYING"
        return f"{self.delivery_id} to {self.recipient} ({mode}, {self.state.name}; {tried or '-'})"


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
    given_up: int = 0

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
    _Deliveries(verdict, history, entries, faults).check(boxes)
    for seen in history.watchers:
        _check_watcher(verdict, seen, boxes)
    _check_agreement(verdict, history)
    return verdict


def _latest(faults: Sequence[Fault], at: float) -> str:
    """The fault under which something stands in the table: the last one that had begun."""
    kind = CALM
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


class _Deliveries:
    """Each delivery against the ledger, and against what was told about it."""

    def __init__(
        self,
        verdict: Verdict,
        history: History,
        entries: Sequence[Entry],
        faults: Sequence[Fault],
    ) -> None:
        self._verdict = verdict
        self._faults = faults
        self._history = history
        self._copies = copies(entries)
        self._said = said(entries)
        self._doubted: Counter[str] = Counter()
        for seen in history.watchers[:1]:
            self._doubted.update(e.delivery_id for e in seen if e.outcome == Outcome.UNKNOWN)

    def check(self, boxes: Sequence[Box]) -> None:
        for box in boxes:
            for text in (*self._ended(box), *self._attempts(box), *self._copied(box)):
                self._verdict.found(f"{box}: {text}")

    def _row(self, box: Box) -> Row:
        told = self._history.acknowledged.get(box.key)
        return self._verdict.rows[_latest(self._faults, told.at) if told else CALM]

    def _ended(self, box: Box) -> Iterator[str]:
        """Every state is true of the ledger, and has a reason to be the last one."""
        taken, words = self._copies[box.key, box.recipient], self._said[box.recipient]
        if box.state in UNENDED:
            self._row(box).sending += box.state is State.SENDING
            yield "it has not ended"
        elif box.state is State.SENT:
            self._verdict.sent += 1
            if not taken:
                self._row(box).lost += 1
                yield "nobody got it"
        elif box.state is State.FAILED:
            if taken and not box.possibly_sent:
                yield "it says that it was not sent, and the mail is in the box"
            if self._is_given_up(box):
                self._verdict.given_up += 1
                yield "given up: six workers ended with it, and none had started it"
            elif not words["rejected"] and not (box.once and _was_in_doubt(box, self._doubted)):
                self._row(box).lost += 1
                yield "nobody refused it for good"
        elif box.state is not State.OUTCOME_UNKNOWN or not box.once:
            self._row(box).lost += 1
            yield "nothing should have ended it so"

    def _is_given_up(self, box: Box) -> bool:
        """Six workers ended with it in their hands before any could start it: so it is written."""
        last = box.attempts[-1] if box.attempts else None
        return (
            last is not None
            and (last.outcome, last.cause) == (Outcome.REJECTED, Cause.WORKER_LOST)
            and sum(f.hurts == "worker" and f.begun_at < last.ended_at for f in self._faults) >= 6
        )

    def _attempts(self, box: Box) -> Iterator[str]:
        """What attempts say agrees with the ledger, and with the state."""
        outcomes = Counter(a.outcome for a in box.attempts)
        taken, words = self._copies[box.key, box.recipient], self._said[box.recipient]
        if outcomes[Outcome.ACCEPTED] and box.state is not State.SENT:
            yield "it was accepted"
        if taken > outcomes[Outcome.ACCEPTED] + outcomes[Outcome.UNKNOWN]:
            yield f"{taken} copies: an attempt that is said to have sent nothing sent one"
        if outcomes[Outcome.ACCEPTED] > words["taken"]:
            yield f"said to be accepted {outcomes[Outcome.ACCEPTED]} times, by the ledger {words}"
        if [a.number for a in box.attempts] != list(range(1, len(box.attempts) + 1)):
            yield "an attempt has no result"

    def _copied(self, box: Box) -> Iterator[str]:
        """A second copy, and a doubt, only where there is a reason for it."""
        taken, doubted = self._copies[box.key, box.recipient], self._doubted[box.delivery_id]
        if box.once and taken > 1:
            self._row(box).twice_once += 1
            yield f"SEND_ONCE, and {taken} copies"
        elif taken > 1:
            row = self._row(box)
            row.again += taken - 1
            row.again_justified += min(taken - 1, doubted)
            if taken - 1 > doubted:
                yield f"{taken} copies after {doubted} doubts"
            if not box.possibly_sent:
                yield f"{taken} copies, and not marked possibly_sent"
        doubts = [a for a in box.attempts if a.outcome is Outcome.UNKNOWN]
        reasons = [
            explanation(a, box.channel, self._said[box.recipient], self._faults) for a in doubts
        ]
        if box.once and box.state is State.OUTCOME_UNKNOWN:
            row = self._verdict.rows[next(filter(None, reasons), CALM)]
            row.unknown += 1
            row.unknown_justified += bool(doubts) and all(reasons)
            if not doubts:
                yield "in doubt without an attempt that is"
        if not all(reasons):
            yield "nothing befell it that explains its doubt"


def _was_in_doubt(box: Box, doubted: Mapping[str, int]) -> bool:
    """SEND_ONCE in doubt that late proof of non-sending has ended: it is not tried again."""
    return doubted[box.delivery_id] > 0 and box.attempts[-1].outcome is Outcome.DEFERRED


def explanation(
    tried: Tried, channel: str, words: Mapping[str, int], faults: Sequence[Fault]
) -> str | None:
    """The kind of fault that put an attempt in doubt; None where nothing did."""
    if tried.cause is Cause.INTERNAL:
        return None
    if tried.cause is Cause.WORKER_LOST:
        culprits = {"worker", "PostgreSQL"}
    elif any(words[word] for word in UNCLEAR):
        return PROVIDER
    else:
        culprits = {"worker", "HTTP" if channel == "http" else "SMTP"}
    for fault in reversed(faults):
        within = (
            fault.begun_at <= tried.ended_at + SLACK_S
            and fault.ended_at >= tried.started_at - SLACK_S
        )
        if within and fault.hurts in culprits:
            return fault.kind
    return None


def _check_watcher(verdict: Verdict, seen: Sequence[Seen], boxes: Sequence[Box]) -> None:
    last: Counter[str] = Counter()
    ids: set[str] = set()
    for event in seen:
        if event.event_id in ids or event.version <= last[event.delivery_id]:
            verdict.repeats += 1
            verdict.found(f"{event}: told again, or out of order")
            continue
        if event.version != last[event.delivery_id] + 1:
            verdict.gaps += 1
            verdict.found(f"{event}: after version {last[event.delivery_id]}")
        ids.add(event.event_id)
        last[event.delivery_id] = event.version
    for box in boxes:
        if (told := last.pop(box.delivery_id, 0)) != box.version:
            verdict.gaps += 1
            verdict.found(f"{box} is at version {box.version}, told until {told}")
    for delivery_id in last:
        verdict.found(f"{delivery_id} was told of, and is not stored")


def _check_agreement(verdict: Verdict, history: History) -> None:
    """All subscribers are told the same, and only moves that there are."""
    told: dict[tuple[str, int], Seen] = {}
    for event in (event for seen in history.watchers for event in seen):
        first = told.setdefault((event.delivery_id, event.version), event)
        if first != event:
            verdict.found(f"one is told {first}, another {event}")
    for event in told.values():
        old, new = event.old_state, State(event.state)
        if (new not in MOVES[State(old)]) if old else (new is not State.QUEUED):
            verdict.found(f"{event}: not a move")
        elif old and new is State.QUEUED:
            verdict.found(f"{event}: nobody asked for a Resend")

"""A page of events in memory, searched by what filters ask for.

A batch knows which of its events a reader may want, by the one field of its filter that narrows
most. So what a batch costs grows with the events and with the readers that it is for, not with all
that wait.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any

from mailgrpc.core.event import Event, EventKind, Filter
from mailgrpc.core.place import Place
from mailgrpc.server import convert

Key = tuple[Hashable, ...]
_EVENT_BYTES = 1024


class Entry:
    """An event in memory, with its protobuf form once somebody needed it: made once for all."""

    __slots__ = ("_shown", "event")

    def __init__(self, event: Event) -> None:
        self.event = event
        self._shown: Any = None

    @property
    def shown(self) -> Any:
        """The event as callers see it."""
        if self._shown is None:
            self._shown = convert.event(self.event)
        return self._shown


class Batch:
    """A page of events, in order, and the place behind it."""

    __slots__ = ("_by_key", "_of_project", "_to_all", "behind", "bytes", "size")

    def __init__(self, events: Sequence[Event], behind: Place) -> None:
        self.behind = behind
        self.size = len(events)
        self.bytes = sum(map(_bytes_of, events))
        self._of_project: dict[int, list[Entry]] = {}
        for event in events:
            self._of_project.setdefault(event.project_id, []).append(Entry(event))
        self._by_key: dict[Key, list[Entry]] | None = None
        self._to_all: dict[int, list[Entry]] = {}

    def entries_for(self, project_id: int, keys: Sequence[Key]) -> Sequence[Entry]:
        """What a reader with these keys may want, in order; its filter has the last word."""
        mine = self._of_project.get(project_id, [])
        if is_of_all(keys) or len(keys) >= len(mine):
            return mine
        index = self.index()
        found = list(self._to_all.get(project_id, ()))
        for key in keys:
            found += index.get(key, ())
        # In order as the page was, and once where two tags have led to the same.
        by_seq = {entry.event.seq: entry for entry in found}
        return [by_seq[seq] for seq in sorted(by_seq)]

    def projects(self) -> Iterable[int]:
        """Whose events these are."""
        return self._of_project.keys()

    def projects_told(self) -> Iterable[int]:
        """Projects of which every reader is told something, whatever its filter."""
        self.index()
        return self._to_all.keys()

    def index(self) -> dict[Key, list[Entry]]:
        """The events by the keys that filters can name."""
        if self._by_key is None:
            self._by_key = {}
            for project_id, entries in self._of_project.items():
                for entry in entries:
                    if entry.event.kind is not EventKind.STATE_CHANGED:
                        self._to_all.setdefault(project_id, []).append(entry)
                        continue
                    for key in _keys_of_event(entry.event):
                        self._by_key.setdefault(key, []).append(entry)
        return self._by_key


def _bytes_of(event: Event) -> int:
    """About what an event takes in memory; payloads alone have no small bound."""
    payload = len(json.dumps(event.payload, default=str)) if event.payload is not None else 0
    args = sum(len(key) + len(value) for key, value in event.labels.custom_args.items())
    return _EVENT_BYTES + payload + args


def keys_of_filter(project_id: int, wanted: Filter) -> tuple[Key, ...]:
    """What to find a reader by: the values of one field, as every field has to be satisfied."""
    for field in ("message_ids", "correlation_ids", "recipients", "tags", "states"):
        if values := getattr(wanted, field):
            return tuple((project_id, field, value) for value in values)
    return ((project_id,),)


def is_of_all(keys: Sequence[Key]) -> bool:
    """Whether they name nothing that a batch can be searched for."""
    return len(keys[0]) == 1


def _keys_of_event(event: Event) -> Iterator[Key]:
    project_id, labels, delivery = event.project_id, event.labels, event.delivery
    yield project_id, "message_ids", event.message_id
    yield project_id, "correlation_ids", labels.correlation_id
    for tag in labels.tags:
        yield project_id, "tags", tag
    if delivery is not None:
        yield project_id, "recipients", delivery.recipient
        yield project_id, "states", delivery.state

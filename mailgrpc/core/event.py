"""Facts: what the feed holds and what the answers show."""

from __future__ import annotations

import enum
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import field
from datetime import UTC, datetime, timedelta
from typing import Any

from mailgrpc.core.delivery import UNENDED, Delivery, Result, State, aggregate
from mailgrpc.core.ids import message_of
from mailgrpc.core.value import value


class EventKind(enum.IntEnum):
    """What an event tells; numbers are those of the contract."""

    STATE_CHANGED = 16
    MESSAGE_REMOVED = 17
    MESSAGES_CLEARED = 18


@value
class Attempt:
    """One delivery's part in one call to a provider. `result` is None while it runs."""

    delivery_id: uuid.UUID
    number: int  # from 1
    call_id: uuid.UUID
    channel: str
    provider: str
    started_at: datetime
    ended_at: datetime | None = None
    result: Result | None = None


@value
class Labels:
    """What a message's events are found and recognised by; joined once a message, never copied.

    `created_at` is when the message was accepted, by the database's clock.
    """

    correlation_id: str = ""
    tags: tuple[str, ...] = ()
    custom_args: Mapping[str, str] = field(default_factory=dict)
    created_at: datetime | None = None  # None: the message is gone


NO_LABELS = Labels()
"""For an event whose message was cleared since."""

CLOCK_SLACK = timedelta(minutes=1)
"""How far the clocks of a server and of the database are thought to be apart."""


@value
class Event:
    """An immutable fact. `lane` and `seq` are its place; with `fingerprint` they are its id."""

    lane: int
    seq: int
    fingerprint: int  # 32 bits, signed
    project_id: int
    kind: EventKind
    occurred_at: datetime
    actor: str = ""
    message_id: uuid.UUID | None = None
    old_state: State | None = None  # None: the delivery is new
    delivery: Delivery | None = None  # as it is after
    attempt: Attempt | None = None
    payload: Mapping[str, Any] | None = None
    labels: Labels = NO_LABELS

    @property
    def event_id(self) -> uuid.UUID:
        """Ordered by place in the feed, and unlike any other even after a fail-over."""
        return uuid.UUID(
            int=self.seq << 64 | (self.lane & 0xFFFF) << 48 | (self.fingerprint & 0xFFFF_FFFF)
        )


@value
class MessageStatus:
    """A message without its content: who it went to and what became of each."""

    message_id: uuid.UUID
    request_id: str
    subject: str
    created_at: datetime
    deliveries: tuple[Delivery, ...]
    labels: Labels = NO_LABELS

    @property
    def state(self) -> State:
        """The aggregate of the deliveries' states."""
        return aggregate({delivery.state for delivery in self.deliveries})

    @property
    def ended(self) -> bool:
        """Whether no delivery will move by itself any more."""
        return not any(delivery.state in UNENDED for delivery in self.deliveries)

    @property
    def counts(self) -> Mapping[State, int]:
        """How many deliveries are in each state."""
        return Counter(delivery.state for delivery in self.deliveries)

    @property
    def updated_at(self) -> datetime:
        """When a delivery last changed its state."""
        return max(delivery.state_since for delivery in self.deliveries)


@value
class Filter:
    """Which messages or events are meant: AND between fields, OR within one; empty is all.

    `recipients` are normalised addresses. `created_after` is inclusive, `created_before` is not.
    """

    message_ids: frozenset[uuid.UUID] = frozenset()
    correlation_ids: frozenset[str] = frozenset()
    recipients: frozenset[str] = frozenset()
    tags: frozenset[str] = frozenset()
    states: frozenset[State] = frozenset()
    created_after: datetime | None = None
    created_before: datetime | None = None

    @property
    def is_empty(self) -> bool:
        """Whether everything matches."""
        return not (
            self.message_ids
            or self.correlation_ids
            or self.recipients
            or self.tags
            or self.states
            or self.created_after
            or self.created_before
        )

    def matches(self, event: Event) -> bool:
        """Whether a watcher with this filter is shown this event.

        The removal of many messages is shown to every watcher, which may hold some of them. Of the
        removal of one only the id and the time can be compared: the rest is gone with it.
        """
        if event.kind is EventKind.MESSAGES_CLEARED or self.is_empty:
            return True
        if not self._names(event.message_id, event.labels.created_at):
            return False
        if event.kind is EventKind.MESSAGE_REMOVED:
            return True
        return self._knows(event.labels) and (event.delivery is None or self._fits(event.delivery))

    def means(self, status: MessageStatus) -> bool:
        """Whether a message is meant, as it is now."""
        if self.is_empty:
            return True
        return (
            self._names(status.message_id, status.created_at)
            and self._knows(status.labels)
            and any(self._fits(delivery) for delivery in status.deliveries)
        )

    def _names(self, message_id: uuid.UUID | None, created_at: datetime | None) -> bool:
        if self.message_ids and message_id not in self.message_ids:
            return False
        slack = timedelta(0)
        if created_at is None:
            if message_id is None:
                return True
            # Gone: its id has the time, by another clock. Rather one fact more than a ghost.
            created_at, slack = created_at_of(message_id), CLOCK_SLACK
        if self.created_after is not None and created_at + slack < self.created_after:
            return False
        return self.created_before is None or created_at - slack < self.created_before

    def _knows(self, labels: Labels) -> bool:
        if self.correlation_ids and labels.correlation_id not in self.correlation_ids:
            return False
        return not self.tags or not self.tags.isdisjoint(labels.tags)

    def _fits(self, delivery: Delivery) -> bool:
        if self.recipients and delivery.recipient not in self.recipients:
            return False
        return not self.states or delivery.state in self.states


EVERYTHING = Filter()


def created_at_of(identifier: uuid.UUID) -> datetime:
    """When a message was accepted, from its id or a delivery's; to the millisecond."""
    return datetime.fromtimestamp((message_of(identifier).int >> 80) / 1000, UTC)

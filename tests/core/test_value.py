"""Values: equal and hashed by their fields, with room for these alone."""

from __future__ import annotations

import pytest
from mypy import api

from mailgrpc.core.message import Mailbox


def test_values_of_the_same_fields_are_one() -> None:
    one, same = Mailbox("ann@example.org", "Ann"), Mailbox("ann@example.org", "Ann")
    assert one == same
    assert len({one, same, Mailbox("ann@example.org")}) == 2


def test_a_value_has_its_fields_and_no_others() -> None:
    with pytest.raises(AttributeError):
        Mailbox("ann@example.org").nickname = "Ann"  # type: ignore[attr-defined]


def test_the_type_checker_holds_a_value_frozen() -> None:
    change = "from mailgrpc.core.message import Mailbox\nMailbox('ann@example.org').name = 'Ann'"
    told, _, _ = api.run(["--config-file=", "--follow-imports=silent", "-c", change])
    assert 'Property "name" defined in "Mailbox" is read-only' in told

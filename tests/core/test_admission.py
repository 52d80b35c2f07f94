"""Who refuses what."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mailgrpc.core.admission import (
    ACCEPTS_ALL,
    MAX_FLAGS,
    RESERVED_BIT,
    categories_of,
    flags_of,
    refuses,
    stored_mask,
)

BIT_OF = {"newsletter": 2, "receipts": 1, "surveys": 30}
_MASKS = st.integers(0, MAX_FLAGS)
_FLAGS = _MASKS.map(lambda mask: mask & ~RESERVED_BIT)


@given(_FLAGS)
def test_who_accepts_all_refuses_nothing(flags: int) -> None:
    assert not refuses(ACCEPTS_ALL, flags)


@given(_MASKS)
def test_mail_without_flags_is_refused_by_nobody(mask: int) -> None:
    assert not refuses(mask, 0)


@given(_MASKS, _FLAGS)
def test_one_shared_bit_is_enough(mask: int, flags: int) -> None:
    shared = [bit for bit in range(1, 31) if mask >> bit & 1 and flags >> bit & 1]
    assert refuses(mask, flags) is bool(shared)


@given(_MASKS, _FLAGS)
def test_a_mask_means_the_same_after_it_was_stored(mask: int, flags: int) -> None:
    stored = stored_mask(mask)
    assert refuses(stored, flags) == refuses(mask, flags)
    assert stored == ACCEPTS_ALL or not stored & RESERVED_BIT
    assert stored != 0


@given(st.sets(st.sampled_from(sorted(BIT_OF))))
def test_categories_are_names_of_flags(names: set[str]) -> None:
    flags = flags_of(names, BIT_OF)
    assert set(categories_of(flags, BIT_OF)) == names
    assert flags.bit_count() == len(names)
    assert flags <= MAX_FLAGS


def test_categories_come_in_the_order_of_their_bits() -> None:
    assert categories_of(MAX_FLAGS, BIT_OF) == ["receipts", "newsletter", "surveys"]


def test_an_unknown_category_is_named() -> None:
    with pytest.raises(KeyError, match="promos"):
        flags_of(["receipts", "promos"], BIT_OF)

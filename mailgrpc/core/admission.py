"""Who wants what: flag bits, categories, and the preferences of an address.

A message carries flags, one bit for each kind of mail that it is. An address has a mask of the
flags that it refuses. They meet in `refuses`. Bit 0 belongs to the mask alone, where it stands for
"accepts all" and never beside another bit; in a message it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

RESERVED_BIT = 1
ACCEPTS_ALL = 1
MAX_FLAGS = 2**31 - 1


def refuses(blocked_flags: int, flags: int) -> bool:
    """Whether an address with this mask refuses a message with these flags."""
    return blocked_flags & flags & ~RESERVED_BIT != 0


def flags_of(categories: Iterable[str], bit_of: Mapping[str, int]) -> int:
    """The bits of these categories, OR-ed. Raises KeyError with the first unknown name."""
    flags = 0
    for name in categories:
        flags |= 1 << bit_of[name]
    return flags


def categories_of(flags: int, bit_of: Mapping[str, int]) -> list[str]:
    """The names of the bits that have one, in the order of the bits."""
    return [n for n, bit in sorted(bit_of.items(), key=lambda e: e[1]) if flags >> bit & 1]


def stored_mask(flags: int) -> int:
    """The mask as it is stored and answered: 1 when nothing is blocked, else without bit 0."""
    return flags & ~RESERVED_BIT or ACCEPTS_ALL

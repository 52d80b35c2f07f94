"""UpdatePrefs and GetPrefs: what an address refuses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from mailgrpc.core.address import checked_address
from mailgrpc.core.admission import (
    ACCEPTS_ALL,
    RESERVED_BIT,
    categories_of,
    flags_of,
    stored_mask,
)
from mailgrpc.db.engine import Database
from mailgrpc.db.preferences import (
    Preference,
    change_preference,
    read_preference,
    replace_preference,
)
from mailgrpc.db.projects import Caller
from mailgrpc.errors import InvalidRequest, Reason, Violation
from mailgrpc.server.convert import timestamp
from mailgrpc.v1 import mail_service_pb2 as pb

MAX_CATEGORIES = 30


class Preferences:
    """Serves the two calls; `bit_of` are the categories of the settings."""

    def __init__(self, database: Database, bit_of: Mapping[str, int]) -> None:
        self._database = database
        self._bit_of = bit_of

    async def get(self, caller: Caller, request: pb.GetPrefsRequest) -> pb.GetPrefsResponse:
        """The mask of an address; one that is not known accepts all."""
        address = checked_address("address", request.address)
        found = await read_preference(self._database, caller.project_id, address)
        return pb.GetPrefsResponse(prefs=self._shown(found))

    async def update(
        self, caller: Caller, request: pb.UpdatePrefsRequest
    ) -> pb.UpdatePrefsResponse:
        """Replace the mask, or change bits of it in one step."""
        address = checked_address("address", request.address)
        if request.HasField("change"):
            if request.blocked_flags:
                raise InvalidRequest(
                    Violation("change", Reason.TOO_MANY, "not together with blocked_flags")
                )
            block, unblock = self._change(request.change)
            found = await change_preference(
                self._database, caller.project_id, address, block, unblock
            )
        else:
            mask = _checked_mask(request.blocked_flags)
            found = await replace_preference(self._database, caller.project_id, address, mask)
        return pb.UpdatePrefsResponse(prefs=self._shown(found))

    def _change(self, change: pb.PrefsChange) -> tuple[int, int]:
        block = _checked_bits("change.block_flags", change.block_flags)
        block |= self._bits("change.block_categories", change.block_categories)
        unblock = _checked_bits("change.unblock_flags", change.unblock_flags)
        unblock |= self._bits("change.unblock_categories", change.unblock_categories)
        if not block and not unblock:
            raise InvalidRequest(Violation("change", Reason.ZERO_FLAGS, "nothing to change"))
        return block, unblock

    def _bits(self, field: str, names: Iterable[str]) -> int:
        bits = 0
        for index, name in enumerate(names):
            if index >= MAX_CATEGORIES:
                text = f"at most {MAX_CATEGORIES} categories"
                raise InvalidRequest(Violation(field, Reason.TOO_MANY, text))
            try:
                bits |= flags_of([name], self._bit_of)
            except KeyError:
                known = ", ".join(self._bit_of) or "none is configured"
                raise InvalidRequest(
                    Violation(
                        f"{field}[{index}]", Reason.UNKNOWN_CATEGORY, f"known categories: {known}"
                    )
                ) from None
        return bits

    def _shown(self, found: Preference) -> pb.Prefs:
        return pb.Prefs(
            address=found.address,
            blocked_flags=found.blocked_flags,
            blocked_categories=categories_of(found.blocked_flags & ~RESERVED_BIT, self._bit_of),
            accepts_all=found.blocked_flags == ACCEPTS_ALL,
            updated_at=None if found.updated_at is None else timestamp(found.updated_at),
        )


def _checked_mask(flags: int) -> int:
    """The whole mask: 1 alone means that all is accepted, and 0 is nobody's wish."""
    if flags == 0:
        text = "0 is not a mask: 1 accepts all"
        raise InvalidRequest(Violation("blocked_flags", Reason.ZERO_FLAGS, text))
    if flags < 0:
        raise InvalidRequest(Violation("blocked_flags", Reason.OUT_OF_RANGE, "not negative"))
    if flags & RESERVED_BIT and flags != ACCEPTS_ALL:
        text = "bit 0 (accepts all) does not stand beside others"
        raise InvalidRequest(Violation("blocked_flags", Reason.RESERVED_FLAG, text))
    return stored_mask(flags)


def _checked_bits(field: str, flags: int) -> int:
    if flags < 0:
        raise InvalidRequest(Violation(field, Reason.OUT_OF_RANGE, "not negative"))
    if flags & RESERVED_BIT:
        raise InvalidRequest(Violation(field, Reason.RESERVED_FLAG, "bit 0 is reserved"))
    return flags

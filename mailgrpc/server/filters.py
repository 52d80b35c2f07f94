"""The filter of a request, checked: what Clear, WatchStatus and ListEvents have in common."""

from __future__ import annotations

from dataclasses import replace

from mailgrpc.core.address import checked_address
from mailgrpc.core.event import Filter
from mailgrpc.core.text import check_text
from mailgrpc.errors import InvalidRequest, Reason, Violation
from mailgrpc.server import convert
from mailgrpc.v1 import delivery_pb2

MAX_VALUES = 1000


def checked_filter(asked: delivery_pb2.MessageFilter) -> Filter:
    """The filter with its addresses normalised. Raises InvalidRequest."""
    violations: list[Violation] = []
    for name in ("message_ids", "correlation_ids", "recipients", "tags", "states"):
        values = getattr(asked, name)
        if len(values) > MAX_VALUES:
            text = f"at most {MAX_VALUES} values"
            raise InvalidRequest(Violation(f"filter.{name}", Reason.TOO_MANY, text))
    for name, limit in (("correlation_ids", 256), ("tags", 64)):
        for index, value in enumerate(getattr(asked, name)):
            violations += check_text(f"filter.{name}[{index}]", value, limit)
    recipients = set()
    for index, value in enumerate(asked.recipients):
        try:
            recipients.add(checked_address(f"filter.recipients[{index}]", value))
        except InvalidRequest as error:
            violations += error.violations
    if violations:
        raise InvalidRequest(*violations)
    wanted = convert.message_filter("filter", asked)
    return replace(wanted, recipients=frozenset(recipients))

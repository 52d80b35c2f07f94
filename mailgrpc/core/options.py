"""How a message is to be delivered: what may be asked for.

`check_options` judges a request by itself, `check_admissible` by the time and the settings of the
day. They are apart because a retry of what was accepted is answered as before, even after its
`expire_at` has passed or its channel is gone.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime, timedelta

from mailgrpc.core.delivery import Mode
from mailgrpc.core.message import (
    DEFAULT_CHANNEL,
    MAX_DEDUPE_WINDOW,
    MAX_EXPIRY_AHEAD,
    MAX_SEND_AHEAD,
    MIN_DEDUPE_WINDOW,
    DeliveryOptions,
    Priority,
    RetryWishes,
    Submission,
)
from mailgrpc.core.text import check_text, fits
from mailgrpc.errors import Reason, Violation

MAX_CHANNEL = 63
MAX_ATTEMPTS = 100
MIN_BACKOFF = timedelta(seconds=1)
MAX_BACKOFF = timedelta(hours=24)
MAX_MULTIPLIER = 10

_MODES = frozenset({0, *Mode})
_PRIORITIES = frozenset({0, *Priority})


def check_options(options: DeliveryOptions) -> list[Violation]:
    """What is wrong with the options whatever the time and the settings."""
    found = []
    if options.mode not in _MODES:
        found.append(_out_of_range("options.mode", "not a DeliveryMode"))
    if options.retry is not None:
        found += _check_retry(options.retry)
    if options.priority not in _PRIORITIES:
        found.append(_out_of_range("options.priority", "not a Priority"))
    if options.send_at and options.expire_at and options.expire_at <= options.send_at:
        text = "it has to be after send_at"
        found.append(Violation("options.expire_at", Reason.INVALID_SCHEDULE, text))
    if not fits(options.channel, MAX_CHANNEL):
        found += check_text("options.channel", options.channel, MAX_CHANNEL)
    window = options.dedupe_window
    if window is not None and not MIN_DEDUPE_WINDOW <= window <= MAX_DEDUPE_WINDOW:
        found.append(_out_of_range("options.dedupe_window", "1 second to 24 hours"))
    return found


def _check_retry(retry: RetryWishes) -> list[Violation]:
    found = []
    if not 0 <= retry.max_attempts <= MAX_ATTEMPTS:
        found.append(_out_of_range("options.retry.max_attempts", f"0 to {MAX_ATTEMPTS}"))
    first, longest = retry.initial_backoff, retry.max_backoff
    if first is not None and not MIN_BACKOFF <= first <= MAX_BACKOFF:
        found.append(_out_of_range("options.retry.initial_backoff", "1 second to 24 hours"))
    if longest is not None:
        if not MIN_BACKOFF <= longest <= MAX_BACKOFF:
            found.append(_out_of_range("options.retry.max_backoff", "1 second to 24 hours"))
        elif first is not None and longest < first:
            found.append(_out_of_range("options.retry.max_backoff", "less than initial_backoff"))
    # Written so that NaN, of which every comparison is false, is refused as well.
    if not (retry.multiplier == 0 or 1 <= retry.multiplier <= MAX_MULTIPLIER):
        found.append(_out_of_range("options.retry.multiplier", f"0, or 1 to {MAX_MULTIPLIER}"))
    return found


def check_admissible(
    submission: Submission,
    *,
    now: datetime,
    bit_of: Mapping[str, int],
    channels: Collection[str],
) -> list[Violation]:
    """What time and settings have against a submission whose shape was checked.

    `bit_of` gives the flag bit of each category that is configured, `channels` holds the names of
    the channels. UNKNOWN_CATEGORY, UNKNOWN_CHANNEL, INVALID_SCHEDULE. A `send_at` that has passed
    is fine: it means at once.
    """
    found = []
    for number, name in enumerate(submission.message.categories):
        if name not in bit_of:
            text = "the server's settings know no category of this name"
            found.append(Violation(f"message.categories[{number}]", Reason.UNKNOWN_CATEGORY, text))
    options = submission.options
    if (options.channel or DEFAULT_CHANNEL) not in channels:
        text = "the server has no channel of this name"
        if not options.channel:
            text = f"none is named, and the server has no channel {DEFAULT_CHANNEL!r}"
        found.append(Violation("options.channel", Reason.UNKNOWN_CHANNEL, text))
    if options.send_at is not None and options.send_at - now > MAX_SEND_AHEAD:
        found.append(_bad_schedule("options.send_at", f"at most {MAX_SEND_AHEAD.days} days ahead"))
    if options.expire_at is not None:
        ahead = options.expire_at - now
        if ahead <= timedelta(0):
            found.append(_bad_schedule("options.expire_at", "it has passed"))
        elif ahead > MAX_EXPIRY_AHEAD:
            text = f"at most {MAX_EXPIRY_AHEAD.days} days ahead"
            found.append(_bad_schedule("options.expire_at", text))
    return found


def _out_of_range(field: str, description: str) -> Violation:
    return Violation(field, Reason.OUT_OF_RANGE, description)


def _bad_schedule(field: str, description: str) -> Violation:
    return Violation(field, Reason.INVALID_SCHEDULE, description)

"""What is told of many times."""

from __future__ import annotations

from collections.abc import Sequence


def of_times(seconds: Sequence[float]) -> dict[str, float]:
    """How many there are, and their median and 99th percentile in milliseconds."""
    found = sorted(seconds)
    if not found:
        return {"count": 0, "p50_ms": float("nan"), "p99_ms": float("nan")}
    return {
        "count": len(found),
        "p50_ms": found[len(found) // 2] * 1e3,
        "p99_ms": found[int(len(found) * 0.99)] * 1e3,
    }

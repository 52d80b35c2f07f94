"""What this machine is, as far as rates depend on it."""

from __future__ import annotations

import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

PLACE = "/var/tmp"  # a disk, not a memory file system: durability is what is paid for


def fdatasync_us() -> float:
    """The latency of making 8 KiB durable, median, in microseconds."""
    with tempfile.NamedTemporaryFile(dir=PLACE) as file:
        times = []
        for _ in range(200):
            os.pwrite(file.fileno(), os.urandom(8192), 0)
            began = time.perf_counter()
            os.fdatasync(file.fileno())
            times.append(time.perf_counter() - began)
    return statistics.median(times) * 1e6


def python_us() -> float:
    """How long this Python takes for a little work, in microseconds; builds differ by two."""

    def work() -> float:
        began = time.perf_counter()
        for number in range(20_000):
            str(number).encode()
        return time.perf_counter() - began

    return min(work() for _ in range(7)) * 1e6


def facts() -> dict[str, str]:
    return {
        "cores": str(os.cpu_count()),
        "processor": _processor(),
        "fdatasync of 8 KiB": f"{fdatasync_us():.0f} µs",
        "Python": f"{platform.python_version()}, {python_us():.0f} µs for 20,000 short steps",
        "Linux": platform.release(),
    }


def kind() -> str:
    """What machines have in common whose rates may be compared."""
    return f"{_processor()}, {os.cpu_count()} cores, Python {platform.python_version()}"


def _processor() -> str:
    """Its name, family and model: a cloud gives one name to generations that differ by half."""
    told: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        told.setdefault(name.strip(), value.strip())
    if "model name" not in told:
        return platform.machine()
    numbers = f"{told.get('cpu family', '?')}/{told.get('model', '?')}"
    return f"{told['model name']} ({numbers})"

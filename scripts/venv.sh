#!/bin/sh
# Make .venv with the Python that is named, or else with the first one found here, unless another is faster
# by a fifth.
#
# Which one it is matters: built without optimisations, as pyenv does unless it is told otherwise, Python
# takes twice as long for a step, and a mail up to a fifth longer. bench/machine.py measures the same steps.
set -eu

# Microseconds of a little work, the best of some; nothing where this Python will not do.
measure() {
    "$1" -I - 2>/dev/null <<'PYTHON' || true
import sys, time
if sys.version_info >= (3, 11):
    import ensurepip, venv

    def work():
        began = time.perf_counter()
        for number in range(20_000):
            str(number).encode()
        return time.perf_counter() - began

    print(int(min(work() for _ in range(7)) * 1e6))
PYTHON
}

# The same as `took`; what a site's own start-up prints is no number.
take_measure() {
    took=$(measure "$1" | tail -n 1)
    case $took in *[!0-9]*) took= ;; esac
}

chosen=${1:-}
if [ -z "$chosen" ]; then
    best=
    for python in python3 /usr/bin/python3 /usr/local/bin/python3; do
        take_measure "$python"
        # The first one stays unless another is much faster: it is what the user calls Python.
        if [ -n "$took" ] && { [ -z "$best" ] || [ $((took * 5)) -lt $((best * 4)) ]; }; then
            best=$took chosen=$python
        fi
    done
    if [ -z "$chosen" ]; then
        echo "mailgrpc needs Python 3.11 or newer, with its venv module (Debian: python3-venv):" \
            "make PYTHON=/path/to/python3.11"
        exit 1
    fi
else
    take_measure "$chosen"
    if [ -z "$took" ]; then
        echo "$chosen is not Python 3.11 or newer with its venv module (Debian: python3-venv)"
        exit 1
    fi
fi

echo "making .venv with $chosen ($("$chosen" -V))"
"$chosen" -m venv --clear .venv || {
    rm -rf .venv
    exit 1
}

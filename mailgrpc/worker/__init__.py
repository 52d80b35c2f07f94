"""The worker: claims, starts, sends and records. Read `drain.py` first, then `sessions.py`."""

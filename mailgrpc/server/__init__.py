"""The gRPC server. Read `mail.py` first; `intake.py` and `feed.py` hold the two protocols."""

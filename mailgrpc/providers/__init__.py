"""Providers: how mail leaves. One file a protocol or service; see `provider.py` for what it owes."""

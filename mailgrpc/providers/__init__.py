"""Providers: how mail leaves. One file a protocol or service; `provider.py` says what it owes."""

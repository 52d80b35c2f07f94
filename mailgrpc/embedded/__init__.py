"""The embedded default: PostgreSQL, Valkey and a local inbox, so that one command is enough.

Real servers, from wheels. Read `stack` for what is started, `postgres` for what is hard about it,
`lifeline` for why nothing stays behind.
"""

"""What a message weighs: write-ahead log and database, enqueued and sent.

One recipient, a body of 600 random hexadecimal characters, one custom argument, a request id; sent
once by the capture provider. It begins with a checkpoint and is too little to cause another, so the
log is what the rows themselves write: after each checkpoint an image of every page that is touched
again comes on top, more of them the shorter they lie apart. Tables are told with their indexes and
TOAST as they stand after the run: what is dead and will be used again is in it, as on a disk.
"""

from __future__ import annotations

from bench.family import Family, backlog
from bench.row import Measured
from bench.rows.drain import wait_until_drained

MAILS = 20_000
_WAL = "SELECT pg_current_wal_lsn() - '0/0' AS bytes"
# A table that lies in days is told as one.
_TABLES = """SELECT t.relname AS name, sum(pg_table_size(c.oid))::bigint AS rows,
        sum(pg_indexes_size(c.oid))::bigint AS indexes
    FROM pg_class c JOIN pg_class t ON t.oid = coalesce(pg_partition_root(c.oid), c.oid)
    WHERE c.relnamespace = 'mailgrpc'::regnamespace AND c.relkind = 'r'
    GROUP BY t.relname ORDER BY sum(pg_total_relation_size(c.oid)) DESC"""
_SENT = "SELECT count(*) AS n FROM deliveries WHERE state = 4"


def run(family: Family) -> list[Measured]:
    row = Measured("bytes a message, enqueued and sent")
    before = _sizes(family)
    family.checkpoint()
    wal = [_wal(family)]
    with family.running("serve") as server:
        taken = backlog(server.address, MAILS)
    wal.append(_wal(family))
    with family.running("work", MAILGRPC_CHANNEL_URL="capture:?keep=0"):
        wait_until_drained(family)
    wal.append(_wal(family))
    after = _sizes(family)
    row.check("books", wanted=MAILS, acknowledged=taken, sent=family.sql(_SENT)[0]["n"])
    grown = {
        name: (rows - before[name][0], indexes - before[name][1])
        for name, (rows, indexes) in after.items()
    }
    row.facts = {
        "write-ahead log": _bytes(wal[2] - wal[0]),
        "  to enqueue": _bytes(wal[1] - wal[0]),
        "  to send": _bytes(wal[2] - wal[1]),
        "database": _bytes(sum(map(sum, grown.values()))),
    }
    for name, (rows, indexes) in grown.items():
        if rows + indexes >= MAILS:
            text = f"{_bytes(rows + indexes)}, of these indexes {_bytes(indexes)}"
            row.facts[f"  {name}"] = text
    return [row]


def _wal(family: Family) -> int:
    return int(family.sql(_WAL)[0]["bytes"])


def _sizes(family: Family) -> dict[str, tuple[int, int]]:
    return {r["name"]: (r["rows"], r["indexes"]) for r in family.sql(_TABLES)}


def _bytes(total: int) -> str:
    return f"{total / MAILS:,.0f} B"

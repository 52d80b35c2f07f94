"""The rows: a file each, in the order of the table."""

from bench.rows import batch, claim, drain, enqueue, idle, size, stream, watchers

ROWS = {
    "enqueue": enqueue.run,
    "batch": batch.run,
    "drain": drain.run,
    "stream": stream.run,
    "watchers": watchers.run,
    "claim": claim.run,
    "idle": idle.run,
    "size": size.run,
}

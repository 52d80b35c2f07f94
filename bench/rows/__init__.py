"""The rows: a file each, in the order of the table."""

from bench.rows import batch, clear, enqueue, history

ROWS = {
    "enqueue": enqueue.run,
    "batch": batch.run,
    "history": history.run,
    "clear": clear.run,
}

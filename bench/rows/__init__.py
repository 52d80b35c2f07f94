"""The rows: a file each, in the order of the table."""

from bench.rows import batch, enqueue

ROWS = {
    "enqueue": enqueue.run,
    "batch": batch.run,
}

"""The rows: a file each, in the order of the table."""

from bench.rows import attachment, batch, end_to_end, enqueue, latency

ROWS = {
    "enqueue": enqueue.run,
    "batch": batch.run,
    "end_to_end": end_to_end.run,
    "latency": latency.run,
    "attachment": attachment.run,
}

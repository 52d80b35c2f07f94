"""The rows: a file each, in the order of the table."""

from bench.rows import (
    attachment,
    batch,
    claim,
    clear,
    drain,
    end_to_end,
    enqueue,
    history,
    idle,
    latency,
    scale,
    size,
    soak,
    stream,
    watchers,
)

ROWS = {
    "enqueue": enqueue.run,
    "batch": batch.run,
    "end_to_end": end_to_end.run,
    "latency": latency.run,
    "drain": drain.run,
    "stream": stream.run,
    "watchers": watchers.run,
    "history": history.run,
    "claim": claim.run,
    "clear": clear.run,
    "attachment": attachment.run,
    "scale": scale.run,
    "idle": idle.run,
    "size": size.run,
    "soak": soak.run,
}

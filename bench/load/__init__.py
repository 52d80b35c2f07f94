"""The load: processes of their own, so that what they cost is known and is not the server's.

`calls` makes one Enqueue a call, closed (as fast as answers come) or open (at a rate, whatever the
answers do); `batches` makes EnqueueBatch calls; `attachments` makes large ones; `smtp` is the load
for Postfix; `watch` subscribes to everything. Each prints one JSON line when it is done.
"""

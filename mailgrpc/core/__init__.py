"""The domain: what a message is, the states of a delivery, what an outcome means. No I/O.

Read `message`, then `delivery`. Time and chance are handed in by the caller.
"""

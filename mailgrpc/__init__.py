"""mailgrpc: a transactional mail gateway that can be trusted with the answer."""

__version__ = "0.1.0"

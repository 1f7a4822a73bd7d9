"""Over-the-air releases: how authentic bytes arrive on a device and stay intact. Knows nothing of how models run."""

__version__ = "0.1.0"

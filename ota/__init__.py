"""Over-the-air releases: how authentic bytes arrive on a device and stay intact. Knows nothing of how models run."""

import datetime

__version__ = "0.1.0"
BUILT = datetime.datetime(2026, 11, 1, tzinfo=datetime.timezone.utc)
"""A day before which this version was certainly not made: the earliest that a device's clock can be right. Moved with
`__version__`."""

"""The device side of updates: verify metadata, fetch, store, try, activate, and roll back when that fails."""

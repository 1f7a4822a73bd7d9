"""The unprivileged side: cameras, models and accelerators. Never holds a key and never opens the network."""

"""Ways for bytes to reach the device; each implements `ota.client.ports.Transport` and is trusted with nothing."""

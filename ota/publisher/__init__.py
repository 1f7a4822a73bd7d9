"""The publisher's side: builds, seals, signs and serves releases. Never imported on a device."""

"""Speed, measured: the host's half, the device's step part by part, both together, and what the hardware could do."""

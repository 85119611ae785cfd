"""Ports for processes that meet."""

from __future__ import annotations

import random
import socket

BELOW_THE_SYSTEM_S_OWN = range(15_000, 30_000)  # from the ports above these anybody is given one at any time


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on now, nor is likely to before they are used."""
    ports: list[int] = []
    for port in random.SystemRandom().sample(BELOW_THE_SYSTEM_S_OWN, 50 * count):
        with socket.socket() as trial:
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
        ports.append(port)
        if len(ports) == count:
            return ports
    raise OSError("hardly a port is free")

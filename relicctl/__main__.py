"""``python -m relicctl``, as ``torchrun -m relicctl`` needs it."""

from __future__ import annotations

from relicctl.cli import main

main()

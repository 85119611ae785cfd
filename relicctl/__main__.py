"""``python -m relicctl``, as ``torchrun -m relicctl`` needs it."""

from relicctl.cli import main

main()

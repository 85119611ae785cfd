"""What commands share: the device, the workers, and what a line of progress shows."""

from __future__ import annotations

from pathlib import Path

from relicctl.errors import UsageError
from relicctl.runs.resume import LinearOptions, TransferOptions


def get_transfer_folder(options: TransferOptions) -> Path | None:
    return Path(options.resume) if options.resume else options.out


def parse_named_data(texts: tuple[str, ...]) -> dict[str, str] | None:
    """NAME=DATA, split at the first "="; None for none."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, spec = text.partition("=")
        if not (name and equals and spec):
            raise UsageError(f"--data {text!r} is no NAME=DATA.", "Write it like --data dtd=dtd.zip.")
        if name in found:
            raise UsageError(f"--data {name} is given twice.", "Name every data set differently.")
        found[name] = spec
    return found or None


def get_linear_folder(options: LinearOptions) -> Path | None:
    return Path(options.resume) if options.resume else options.out


def parse_test_sets(texts: tuple[str, ...]) -> dict[str, str]:
    """NAME=DATA, split at the first "="."""
    tests: dict[str, str] = {}
    for text in texts:
        name, equals, spec = text.partition("=")
        if not (name and equals and spec):
            raise UsageError(f"--test {text!r} is no NAME=DATA.", "Write it like --test sketch=imagenet-sketch.tar.")
        if name in tests:
            raise UsageError(f"--test {name} is given twice.", "Name every test set differently.")
        tests[name] = spec
    return tests

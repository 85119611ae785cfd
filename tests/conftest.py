"""Fixtures that every test directory shares."""

from __future__ import annotations

import os
import signal

# Before torch is imported: as many test processes as cores, so one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell's background job ignores Ctrl-C and so would every command that the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from pathlib import Path

import pytest
from hypothesis import settings

from tests.helpers.runs import make_classifier, make_run  # noqa: F401 (fixtures)

# The same examples everywhere, however slow the machine; benchmarks/fuzz.py looks for new ones.
settings.register_profile("suite", deadline=None, derandomize=True)
settings.load_profile("suite")


@pytest.fixture(scope="session")
def realdata_dir() -> Path:
    """The folder of real images: $RELICCTL_REALDATA, or ../shared/data seen from the checkout.

    With $RELICCTL_REQUIRE_REALDATA set, as in CI, a missing folder is a failure and no skip.
    """
    checkout = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("RELICCTL_REALDATA", checkout.parent / "shared" / "data"))
    if not folder.is_dir():
        missing = pytest.fail if os.environ.get("RELICCTL_REQUIRE_REALDATA") else pytest.skip
        missing(f"no real images at {folder}; set RELICCTL_REALDATA to their folder")
    return folder

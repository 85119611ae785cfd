"""The tiny config and the run that meets no fault, for tests of faults in several processes."""

from tests.faults.conftest import tiny, whole  # noqa: F401 (fixtures)

"""Record what relicctl does, by its command line and its files alone, and compare two recordings.

python tools/golden.py record --tree TREE --out DIR [--only NAME ...] [--renamed FILE]
python tools/golden.py compare DIR_A DIR_B [--renamed FILE] [--verbose]
"""

from __future__ import annotations

import argparse
from pathlib import Path

from golden_lib.compare import compare
from golden_lib.record import record
from golden_lib.renames import Renames


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record", help="run every case with a source tree")
    recording.add_argument("--tree", type=Path, required=True, help="folder that holds the package relicctl")
    recording.add_argument("--out", type=Path, required=True, help="folder of the recording, one JSON for each case")
    recording.add_argument("--only", nargs="+", default=[], metavar="NAME", help="cases whose names begin so")
    recording.add_argument("--jobs", type=int, default=2, help="cases at a time")
    recording.add_argument("--work", type=Path, help="keep what the cases leave in this new folder")
    comparing = commands.add_parser("compare", help="exit code 1 if anything differs but words and renamed keys")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    comparing.add_argument("--verbose", action="store_true", help="a diff of everything that is not identical")
    for command in (recording, comparing):
        command.add_argument("--renamed", type=Path, help="YAML of renamed keys; see tools/golden_lib/renames.py")
    told = parser.parse_args()
    renames = Renames.load(told.renamed)
    if told.command == "record":
        record(told.tree.resolve(), told.out, told.only, renames, jobs=told.jobs, work=told.work)
    else:
        raise SystemExit(compare(told.before, told.after, renames, verbose=told.verbose))


if __name__ == "__main__":
    main()

"""Record what relicctl does, by its command line and its files alone, and compare two recordings.

    python tools/golden.py record --tree TREE --out DIR [--only NAME ...] [--renamed FILE]
    python tools/golden.py compare DIR_A DIR_B [--renamed FILE] [--verbose]

Everything runs on the CPU in fp32 with fixed seeds and one thread a process, in one folder that all paths are relative
to. Two recordings of one tree are identical; a recording of another tree shows what a change of the code has changed.
``record`` writes the cases named (all where none is) and those that they need; ``compare`` tells words from renamed
keys from differences, and exits with 1 for the last. The cases are in ``golden_lib/cases.py`` and ``errors.py``.

Left out, since two recordings of one tree differ in it or another machine would:

- values of TIMINGS in ``golden_lib/snapshot.py`` (images_per_s, data_wait, eta_s, seconds, started, updated, pid, host,
  free_memory): the clock, the process, the machine. That the keys are there is compared.
- the SHA-256 of safetensors files, and of exports as told and in their cards: safetensors writes metadata in an order
  that changes from process to process. Every tensor's own SHA-256, their order and all metadata are compared.
- header_checksum in checkpoints: it follows from the header, in which keys may be renamed.
- lines of progress on stderr (``step 3/12 ...``): they come every few seconds. Their figures are in metrics.jsonl.
- lines of torchrun and gloo, paths of the tree, the folder and Python, free memory in texts: the machine.
- contents of pictures: they hold matplotlib's version. That they are there is compared.
- names of modules and source lines noted at the nodes of an ONNX graph. Operations, weights and metadata are compared.
- what ``bench`` and ``doctor`` measure: of their JSON the keys, the types of values and the checks' names are compared.
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

"""Fuzz everything that reads strangers' bytes, guided by coverage where atheris is installed (pip install atheris).

    python benchmarks/fuzz.py --minutes 10 --out fuzz.json [--only pickle archive]

The targets and their honest seeds are those of tests/helpers/hostile.py, each in a process of its own for its share of
the time. A finding is any exception but our errors, an input that takes longer than SECONDS, or a process that grows
beyond MEGABYTES; it is saved beside --out. Without atheris, seeds are mutated blindly.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
SECONDS, MEGABYTES = 30, 3000
NAMES = ("config", "archive", "image", "checkpoint", "weights", "pickle", "bank")
INSTRUMENTED = ["relicctl", "yaml", "zipfile", "tarfile", "pickletools", "PIL"]


def guided(name: str, seconds: float, findings: Path) -> None:
    """Hand a target to atheris, which ends the process."""
    import atheris

    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.helpers import hostile
    warnings.simplefilter("ignore")
    target, corpus = hostile.TARGETS[name], findings / f"corpus-{name}"
    corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(target.seeds()):
        (corpus / f"seed-{number}").write_bytes(seed)
    limits = [f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}", f"-max_total_time={max(1, round(seconds))}"]
    keep = [f"-artifact_prefix={findings}/{name}-", "-print_final_stats=1", "-max_len=20000", "-seed=1"]
    atheris.Setup([sys.argv[0], *limits, *keep, str(corpus)], target.read)
    atheris.Fuzz()


def blind(name: str, seconds: float, findings: Path) -> None:
    """Mutate seeds until the time is over; prints what ``guided`` prints."""
    from tests.helpers import hostile

    warnings.simplefilter("ignore")
    target, chance, tried, until = hostile.TARGETS[name], random.Random(1), 0, time.monotonic() + seconds
    seeds = target.seeds()
    while time.monotonic() < until:
        data = bytearray(chance.choice(seeds))
        for _ in range(chance.randint(1, 8)):
            at = chance.randrange(len(data) + 1)
            data[at : at + chance.randint(0, 4)] = chance.randbytes(chance.randint(0, 4))
        tried += 1
        try:
            target.read(bytes(data))
        except Exception:
            (findings / f"{name}-{tried}").write_bytes(data)
            traceback.print_exc()
            sys.exit(1)
    print(f"stat::number_of_executed_units: {tried}", file=sys.stderr)


def fuzz(name: str, seconds: float, findings: Path) -> dict[str, object]:
    """One target in its own process; how many inputs were tried, and the finding that ended it if there was one."""
    before, began = set(findings.iterdir()), time.monotonic()
    command = [sys.executable, __file__, "--target", name, "--seconds", str(seconds), "--out", str(findings / "x")]
    with tempfile.TemporaryDirectory() as place:  # atheris ends the process without tidying up
        environment = os.environ | {"TMPDIR": place}
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False, env=environment)
    counts = re.findall(r"number_of_executed_units: *(\d+)", done.stderr) or re.findall(r"^#(\d+)", done.stderr, re.M)
    new = [path for path in set(findings.iterdir()) - before if path.is_file()]
    found = [str(path) for path in new if "slow-unit" not in path.name]  # libFuzzer's note of 10 s is none of ours
    inputs = int(counts[-1]) if counts else 0
    stderr = done.stderr[-3000:] if done.returncode else None
    return {
        "target": name,
        "inputs": inputs,
        "seconds": round(time.monotonic() - began, 1),
        "input": found,
        "stderr": stderr,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=10, help="for all targets together")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--target", choices=NAMES, help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        import atheris  # noqa: F401

        way = guided
    except ImportError:
        way = blind
    if args.target:
        way(args.target, args.seconds, args.out.parent)
        return
    findings = args.out.absolute().parent / "findings"
    findings.mkdir(parents=True, exist_ok=True)
    done = [fuzz(name, args.minutes * 60 / len(args.only), findings) for name in args.only]
    inputs = sum(int(str(one["inputs"])) for one in done)
    args.out.write_text(json.dumps({"way": way.__name__, "inputs": inputs, "targets": done}, indent=1))
    for one in done:
        print(f"{one['target']:<12}{one['inputs']:>9} inputs  {one['seconds']:>6} s  {one['input'] or 'nothing found'}")


if __name__ == "__main__":
    main()

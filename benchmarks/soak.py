"""Run a long pretraining and watch the process: does memory grow, do files stay open, does it slow down?

    python benchmarks/soak.py --minutes 120 --out soak.json [-- more arguments of `relicctl pretrain`]

The run is the demo's at small size, without an end; after the time SIGTERM ends it, so that saving on a signal is
tried too. Every 30 s: memory of its own (USS: what its end would free; shared libraries are not in it), open files
and CPU time of the process and its children.
Slopes are of a least-squares line after the first tenth. Images per CPU second stay comparable on a machine
that does other work meanwhile; images per second do not.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

SMALL = ["optim.epochs=100000", "eval.every_epochs=20", "checkpoint.every_minutes=2", "runtime.log_every=100"]


def look(process: psutil.Process) -> dict[str, float]:
    family = [process, *process.children(recursive=True)]
    return {
        "uss": sum(p.memory_full_info().uss for p in family),
        "files": sum(p.num_fds() for p in family),
        "threads": sum(p.num_threads() for p in family),
        "processes": len(family),
        "cpu_s": sum(sum(p.cpu_times()[:2]) for p in family),
    }


def images(metrics: Path, batch: int) -> int:
    """Images trained on so far, by the last line with a step."""
    lines = metrics.read_text("utf-8").splitlines() if metrics.exists() else []
    return json.loads(lines[-1])["step"] * batch if lines else 0


def slope_per_hour(seconds: np.ndarray, values: np.ndarray) -> float:
    return float(np.polyfit(seconds / 3600, values, 1)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=120)
    parser.add_argument("--every", type=float, default=30, help="seconds between two looks")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("more", nargs="*", help="further arguments of relicctl pretrain")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        sets = [part for setting in SMALL for part in ("--set", setting)]
        command = [sys.executable, "-m", "relicctl", "pretrain", "--preset", "demo", "--out", str(run), "--quiet"]
        child = subprocess.Popen([*command, *sets, *args.more], stdout=subprocess.DEVNULL)
        process, start, seen = psutil.Process(child.pid), time.monotonic(), []
        while time.monotonic() - start < args.minutes * 60 and child.poll() is None:
            time.sleep(args.every)
            if child.poll() is None:
                looked = look(process)
                seen.append({"s": time.monotonic() - start, **looked, "images": images(run / "metrics.jsonl", 32)})
                args.out.write_text(json.dumps(seen))
        child.send_signal(signal.SIGTERM)
        code = child.wait(120)
    late = [row for row in seen if row["s"] > args.minutes * 6 and row["images"]]
    seconds = np.array([row["s"] for row in late])
    column = {name: np.array([row[name] for row in late], dtype=float) for name in late[0]}
    thirds = np.array_split(np.arange(len(late)), 3)
    per_cpu_s = [
        round(float((column["images"][part[-1]] - column["images"][part[0]]) / np.ptp(column["cpu_s"][part])), 2)
        for part in thirds
    ]
    summary = {
        "minutes": round(late[-1]["s"] / 60, 1),
        "images": int(late[-1]["images"]),
        "exit_code": code,
        "uss_mib": [round(column["uss"][i] / 2**20, 1) for i in (0, len(late) // 2, -1)],
        "uss_mib_per_hour": round(slope_per_hour(seconds, column["uss"]) / 2**20, 3),
        "files": [int(column["files"].min()), int(column["files"].max())],
        "threads": [int(column["threads"].min()), int(column["threads"].max())],
        "images_per_cpu_s_by_thirds": per_cpu_s,
    }
    args.out.write_text(json.dumps({"summary": summary, "cores": os.cpu_count(), "looks": seen}, indent=1))
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()

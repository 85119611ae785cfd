"""Two hosts joined by a cable that is pulled: network namespaces, veth, and torchrun over both.

Needs root and iproute2.

    python benchmarks/two_hosts.py --out two_hosts.json

Three runs by one command line per host: one that nothing happens to; one whose cable is pulled for --pulled seconds and
plugged in again; one where the second host loses power (cable pulled, then all its processes killed), comes back and
executes its command line again. Each ends with the tensors of the first, or the script says how it differs.
The hosts share this machine's file system, as a cluster's do.
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
from typing import Any

import torch

from relicctl.core import checkpoint

SETS = [
    "model.arch=resnet18", "model.width=0.125", "model.stem=stride2", "views.large.count=2", "views.large.size=16",
    "views.small.count=0", "loss.negatives=4", "optim.batch_size=8", "optim.epochs=20",
    "data.train=shapes:size=16,train=64,val=8",
    "eval.every_epochs=0", "checkpoint.every_steps=10", "checkpoint.every_minutes=null", "runtime.log_every=1",
    "runtime.device=cpu", "runtime.threads=1", "runtime.precision=fp32",
]  # fmt: skip
CABLE = "relic"  # the two ends: relic0 in the first host, relic1 in the second


def system(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: {done.stderr.strip()}")


class Hosts:
    """Two network namespaces, 10.77.0.1 and 10.77.0.2, and what runs in them."""

    def __enter__(self) -> Hosts:
        self.groups: dict[int, subprocess.Popen] = {}
        for host in (0, 1):
            system("ip", "netns", "add", f"{CABLE}{host}")
        ends = ["ip", "link", "add", f"{CABLE}0", "netns", f"{CABLE}0", "type", "veth"]
        system(*ends, "peer", "name", f"{CABLE}1", "netns", f"{CABLE}1")
        for host in (0, 1):
            self.ip(host, "addr", "add", f"10.77.0.{host + 1}/24", "dev", f"{CABLE}{host}")
            self.ip(host, "link", "set", "lo", "up")
            self.ip(host, "link", "set", f"{CABLE}{host}", "up")
        return self

    def __exit__(self, *exc: object) -> None:
        for host in (0, 1):
            self.power_off(host)
            subprocess.run(["ip", "netns", "del", f"{CABLE}{host}"], check=False)

    def ip(self, host: int, *words: str) -> None:
        system("ip", "-n", f"{CABLE}{host}", *words)

    def cable(self, state: str) -> None:
        self.ip(1, "link", "set", f"{CABLE}1", state)

    def power_off(self, host: int) -> None:
        """End all processes of a host."""
        inside = subprocess.run(["ip", "netns", "pids", f"{CABLE}{host}"], capture_output=True, text=True, check=False)
        for pid in inside.stdout.split():
            os.kill(int(pid), signal.SIGKILL)
        if host in self.groups:
            self.groups.pop(host).wait()

    def start(self, host: int, run: Path) -> None:
        sets = [part for setting in SETS for part in ("--set", setting)]
        launch = [
            "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1", "--max-restarts", "5",
            "--rdzv-backend", "c10d", "--rdzv-endpoint", "10.77.0.1:29400", "--rdzv-id", run.name,
            "--rdzv-conf", "is_host=" + str(1 - host), "--local-addr", f"10.77.0.{host + 1}",
        ]  # fmt: skip
        command = [
            sys.executable,
            *launch,
            "-m",
            "relicctl",
            "pretrain",
            *sets,
            "--quiet",
            "--out",
            str(run),
            "--resume",
        ]
        settings = {
            "GLOO_SOCKET_IFNAME": f"{CABLE}{host}",
            "OMP_NUM_THREADS": "1",
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        log = open(run.parent / f"{run.name}-{host}.log", "a")  # noqa: SIM115
        self.groups[host] = subprocess.Popen(
            ["ip", "netns", "exec", f"{CABLE}{host}", *command], env=os.environ | settings, stdout=log, stderr=log
        )

    def wait(self, limit: float) -> list[int | None]:
        """Exit codes of both hosts' torchrun; None for one that did not end in time."""
        until, codes = time.monotonic() + limit, []
        for host in (0, 1):
            try:
                codes.append(self.groups[host].wait(max(1, until - time.monotonic())))
            except subprocess.TimeoutExpired:
                codes.append(None)
        return codes


def steps(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.read_text("utf-8").count("\n") if path.exists() else 0


def wait_for(run: Path, step: int, limit: float) -> None:
    until = time.monotonic() + limit
    while steps(run) < step:
        if time.monotonic() > until:
            sys.exit(f"{run} did not reach step {step}")
        time.sleep(0.02)


def final(run: Path) -> dict[str, torch.Tensor] | None:
    found = checkpoint.list_checkpoints(run / "checkpoints")
    return checkpoint.load_checkpoint(found[-1])[0] if found else None


def one(place: Path, name: str, pulled: float, limit: float) -> dict[str, Any]:
    """A run with the fault called ``name``: what it met, and how it ended."""
    run, began = place / name, time.monotonic()
    with Hosts() as hosts:
        for host in (0, 1):
            hosts.start(host, run)
        met: dict[str, Any] = {}
        if name != "whole":
            wait_for(run, 25, limit)
            hosts.cable("down")
            met["step_when_cut"] = steps(run)
            if name == "power":
                hosts.power_off(1)
            time.sleep(pulled)
            met["step_when_back"] = steps(run)
            hosts.cable("up")
            if name == "power":
                hosts.start(1, run)
        codes = hosts.wait(limit)
    return met | {"exit_codes": codes, "seconds": round(time.monotonic() - began, 1), "steps": steps(run)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pulled", type=float, default=20, help="seconds without a cable")
    parser.add_argument("--limit", type=float, default=400, help="seconds for a run to end")
    parser.add_argument("--keep", type=Path, help="where runs and logs stay")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        place = args.keep or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        seen: dict[str, Any] = {}
        for name in ("whole", "cable", "power"):
            seen[name] = one(place, name, args.pulled, args.limit)
            tensors, expected = final(place / name), final(place / "whole")
            same = tensors is not None and expected is not None and tensors.keys() == expected.keys()
            seen[name]["same"] = same and all(torch.equal(tensors[key], expected[key]) for key in expected)
            print(name, seen[name], file=sys.stderr, flush=True)
        args.out.write_text(json.dumps(seen, indent=1))
        print(json.dumps(seen, indent=1))


if __name__ == "__main__":
    main()

"""Runs ``python -m relicctl`` of a source tree as a user would, and makes what it prints comparable."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

TIMEOUT = 600.0  # seconds of one command

# Progress is printed every few seconds, so which lines appear depends on the clock; their figures are in metrics.jsonl.
_DROPPED = re.compile(
    r"^step \d+/\d+"  # progress
    r"|^\[?[WEI]\d{4} |^W\d{4}|^\*{5,}$|Setting OMP_NUM_THREADS"  # torchrun's own
    r"|^\[rank\d+\]:|\[Gloo\] Rank"
)
_FILE_HASH = re.compile(r"(sha256 (?:of the weights \| )?)[0-9a-f]{64}")  # of an export: see read_safetensors
_FREE_MEMORY = re.compile(r"[\d.,]+ (?:bytes|[KMGT]i?B)(?= (?:free|(?:of memory )?are free))")


@dataclass(frozen=True)
class Program:
    """relicctl of the source tree ``tree``, run in the folder ``work``, which all of its paths are relative to."""

    tree: Path
    work: Path

    def check(self) -> None:
        """Raises SystemExit unless the package is imported from the tree and not from an installed one."""
        code = "import relicctl; print(relicctl.__file__)"
        found = subprocess.run(
            [sys.executable, "-c", code], cwd=self.work, env=self.make_environment(), capture_output=True, text=True
        )
        if found.returncode or not Path(found.stdout.strip()).is_relative_to(self.tree):
            raise SystemExit(f"relicctl does not come from {self.tree}: {found.stdout}{found.stderr}")

    def make_environment(self) -> dict[str, str]:
        """One thread, no GPU, no colours, a fixed width of the terminal: the same output everywhere."""
        hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        kept = {name: value for name, value in os.environ.items() if name not in hidden}
        return kept | {
            "PYTHONPATH": str(self.tree),
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "100",
            "TERM": "dumb",
            "NO_COLOR": "1",
            "LC_ALL": "C.UTF-8",
            "TZ": "UTC",
        }

    def make_command(self, arguments: list[str], ranks: int = 1) -> list[str]:
        """The whole command line, under torchrun where there are several ranks."""
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
        return [sys.executable, *launcher, "-m", "relicctl", *arguments]

    def run(self, arguments: list[str], *, ranks: int = 1, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run to the end."""
        return subprocess.run(
            self.make_command(arguments, ranks),
            cwd=self.work,
            env=self.make_environment(),
            input=stdin,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
        )

    def start(self, arguments: list[str]) -> subprocess.Popen[bytes]:
        """Start and return at once; its output is thrown away."""
        return subprocess.Popen(
            self.make_command(arguments),
            cwd=self.work,
            env=self.make_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def normalise(self, text: str) -> str:
        """Text without progress lines, paths of this machine, amounts of free memory and exports' file hashes."""
        for path, name in ((self.work, "<WORK>"), (self.tree, "<TREE>"), (Path(sys.prefix), "<PYTHON>")):
            text = text.replace(str(path), name)
        lines = [line.rstrip() for line in text.splitlines() if not _DROPPED.search(line)]
        return _FILE_HASH.sub(r"\1<SHA256>", _FREE_MEMORY.sub("<FREE>", "\n".join(lines)))

"""What linear-eval and transfer share: which encoders, NAME=DATA, and the folder of the results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from relicctl.config import yaml_io
from relicctl.config.base import CommandConfig
from relicctl.config.resolve import dump_yaml
from relicctl.core.distributed import World
from relicctl.encoders.resolve import read_path_from_stdin
from relicctl.errors import UsageError
from relicctl.runs.folder import RunFolder, check_overwrite, find_free_name
from relicctl.runs.resume import LinearOptions, TransferOptions

EvaluationOptions = LinearOptions | TransferOptions


def resolve_job(job_class: Any, options: EvaluationOptions, world: World) -> tuple[Any, Path | None]:
    """Return the job, of the folder to resume or of the command line, and the folder of the results if it is named."""
    out = get_results_folder(options)
    # one rank reads stdin
    sources = tuple(world.broadcast_from_main(lambda: [read_path_from_stdin(source) for source in options.sources]))
    if options.resume is not None and out is not None:
        return job_class.resume(yaml_io.load_mapping(out / "config.yaml")["run"]["job"], sources, options), out
    job = job_class.start(sources, options)
    if out is not None:
        check_overwrite(out, overwrite=options.overwrite)
    return job, out


def get_results_folder(options: EvaluationOptions) -> Path | None:
    """Return the folder to resume or to start, None if it is not named. Raises UsageError if it cannot be resumed."""
    if options.resume is None:
        return options.out
    out = Path(options.resume) if options.resume else options.out
    if out is None or not (out / "config.yaml").is_file():
        raise UsageError(f"--resume names no folder of results{f': {out}' if out else ''}.", "Write --resume DIR.")
    return out


def choose_results_folder(out: Path | None, parent: Path, name: str, world: World) -> Path:
    """Return ``out``, or a new folder ``name`` in ``parent``; the same on every rank."""
    return Path(world.broadcast_from_main(lambda: str(out or find_free_name(parent, name))))


def save_config(run: RunFolder, config: CommandConfig, record: dict[str, Any]) -> None:
    """Write config.yaml: the config, and under ``run`` what resuming needs besides."""
    run.write_text(run.config_path, dump_yaml(config) + yaml.safe_dump({"run": record}, sort_keys=False))


def parse_named_data(texts: tuple[str, ...], option: str = "--data") -> dict[str, str]:
    """Parse NAME=DATA, split at the first "="."""
    named: dict[str, str] = {}
    for text in texts:
        name, equals, spec = text.partition("=")
        if not (name and equals and spec):
            raise UsageError(f"{option} {text!r} is not NAME=DATA.", f"Write it like {option} dtd=dtd.zip.")
        if name in named:
            raise UsageError(f"{option} {name} is given twice.", "Give every data set a different name.")
        named[name] = spec
    return named

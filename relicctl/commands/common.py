"""What several commands share: which encoders, NAME=DATA, the folder of the results and its config.yaml."""

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
from relicctl.runs.resume import EvaluationOptions, find_folder_to_resume


def resolve_job(job_class: Any, options: EvaluationOptions, world: World) -> tuple[Any, Path | None]:
    """Return the job, of the folder to resume or of the command line, and the folder of the results if it is named."""
    resumed = find_folder_to_resume(options)
    # one rank reads stdin
    sources = tuple(world.broadcast_from_main(lambda: [read_path_from_stdin(source) for source in options.sources]))
    if resumed is not None:
        return job_class.resume(yaml_io.load_mapping(resumed / "config.yaml")["run"]["job"], sources, options), resumed
    job = job_class.start(sources, options)
    if options.out is not None:
        check_overwrite(options.out, overwrite=options.overwrite)
    return job, options.out


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

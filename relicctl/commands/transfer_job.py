"""What a transfer evaluation is asked to do: from the command line, or the folder to go on with."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from relicctl import __version__
from relicctl.baselines import open_encoder
from relicctl.commands.options import TransferOptions
from relicctl.commands.processes import open_on_main
from relicctl.config import plain_yaml
from relicctl.config.resolve import ResolvedConfig, resolve_from_run
from relicctl.config.schema import EncoderConfig
from relicctl.config.transfer import TransferConfig
from relicctl.console import Console
from relicctl.core.distributed import World
from relicctl.core.models.resnet import ResNet
from relicctl.errors import Interrupted, Terminated, UsageError
from relicctl.evaluation.subsets import check_label_subset
from relicctl.reference import ResolvedEncoder, read_path_from_stdin
from relicctl.runs import RunFolder, check_overwrite, find_free_name


@dataclass(frozen=True)
class TransferJob:
    """Which encoders; noted in config.yaml, so that ``--resume`` needs nothing else."""

    sources: tuple[str, ...]
    baselines: tuple[str, ...]
    network: str

    @property
    def encoders(self) -> tuple[str, ...]:
        return self.sources + self.baselines


def resume_transfer_config(resolved: ResolvedConfig, options: TransferOptions) -> ResolvedConfig:
    """The config, that of the folder to go on with where there is one."""
    if options.resume is None:
        return resolved
    out = get_transfer_folder(options)
    if out is None or not (out / "config.yaml").is_file():
        raise UsageError(f"--resume names no folder of results{f': {out}' * bool(out)}.", "Write --resume DIR.")
    return resolve_from_run(resolved, out / "config.yaml")


def get_transfer_folder(options: TransferOptions) -> Path | None:
    return Path(options.resume) if options.resume else options.out


def resolve_transfer_job(config: Any, options: TransferOptions, world: World) -> tuple[TransferJob, Path]:
    """Which encoders, and where the results go; refusals that need no data come here."""
    sources = world.broadcast_from_main(
        lambda: [read_path_from_stdin(source) for source in options.sources]
    )  # one process reads stdin
    job, out = TransferJob(tuple(sources), options.baselines, options.network), get_transfer_folder(options)
    if options.resume is not None:
        assert out is not None
        before = plain_yaml.load_mapping(out / "config.yaml")["run"]["job"]
        if job.network not in ("online", before["network"]):
            raise UsageError(
                f"{out} looks at the {before['network']} networks, not the {job.network} ones.", "Choose another --out."
            )
        job = TransferJob(
            job.sources or tuple(before["sources"]), job.baselines or tuple(before["baselines"]), before["network"]
        )
    elif out is not None:
        check_overwrite(out, overwrite=options.overwrite)
    if not job.sources:
        raise UsageError("No encoder is named.", "Give runs, files of weights, -, random or torchvision:NAME.")
    duplicates = [name for number, name in enumerate(job.encoders) if name in job.encoders[:number]]
    if duplicates:
        raise UsageError(f"The encoder {duplicates[0]} is named twice.", "Name every encoder once, baselines included.")
    if not config.data.sets:
        raise UsageError("No data are named.", "Give --data NAME=DATA, or --preset byol-suite.")
    for labels in getattr(config, "labels", ()):  # dense tasks take all
        check_label_subset(format_labels(labels))
    return job, Path(world.broadcast_from_main(lambda: str(out or find_free_name(Path("runs"), "transfer"))))


def open_encoders(job: TransferJob, config: TransferConfig, console: Console) -> list[ResolvedEncoder]:
    """``random`` is the untrained network of the first encoder that has a run, ``pixels`` go with its images.

    Where none has, they are made like the first encoder, whose file says what it is.
    """
    references: list[ResolvedEncoder] = []
    for source in job.encoders:
        random_run = next((str(r.run) for r in references if r.run), None)
        spec = f"{source}:{random_run}" if random_run and source in ("random", "pixels") else source
        first_metadata: dict[str, str] = vars(references[0].encoder)["metadata"] if references else {}
        references.append(
            open_encoder(
                spec,
                network=job.network,
                model=match_architecture(references, config.model),
                size=config.eval.size or (int(first_metadata["size"]) if references else None),
                crop_ratio=float(first_metadata["crop_ratio"]) if references else None,
                seed=config.seed,
                warn=console.warn,
            )
        )
    return references


def match_architecture(references: list[ResolvedEncoder], model: EncoderConfig) -> EncoderConfig:
    """``model`` made like the first encoder found, unless that is none with an architecture."""
    first = references[0].encoder if references else None
    if not isinstance(first, ResNet):
        return model
    return model.model_copy(update={name: getattr(first, name) for name in ("arch", "width", "stem", "padding")})


def open_transfer_folder(out: Path, options: TransferOptions, config: Any, world: World) -> RunFolder:
    keep = config.checkpoint.keep
    if options.resume is not None:
        return open_on_main(world, lambda: RunFolder.reopen(out, keep=keep), out, keep)
    return open_on_main(world, lambda: RunFolder.create(out, overwrite=options.overwrite, keep=keep), out, keep)


@contextmanager
def close_with_resume_hint(run: RunFolder, options: str = "") -> Iterator[RunFolder]:
    """Close the folder after the block, and where a signal ended it, say how to go on."""
    try:
        yield run
    except (KeyboardInterrupt, Terminated) as stop:
        signum = signal.SIGTERM if isinstance(stop, Terminated) else signal.SIGINT
        command = f"relicctl transfer {options}--resume {shlex.quote(str(run.path))}"
        raise Interrupted("Stopped; finished cells are saved.", f"Go on with: {command}", signum) from None
    finally:
        run.close()


def make_transfer_record(job: TransferJob) -> dict[str, Any]:
    return {
        "version": __version__,
        "job": {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(job).items()},
    }


def format_labels(labels: str | float) -> str:
    return labels if isinstance(labels, str) else f"{labels:g}"


def parse_named_data(texts: tuple[str, ...]) -> dict[str, str] | None:
    """NAME=DATA, split at the first "="; None for none."""
    found: dict[str, str] = {}
    for text in texts:
        name, equals, spec = text.partition("=")
        if not (name and equals and spec):
            raise UsageError(f"--data {text!r} is no NAME=DATA.", "Write it like --data dtd=dtd.zip.")
        if name in found:
            raise UsageError(f"--data {name} is given twice.", "Name every data set differently.")
        found[name] = spec
    return found or None

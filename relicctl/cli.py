"""The command line: options and help. Commands are imported when they run, so that help answers at once."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from relicctl import __version__

# click's base of all wrong usage, wherever this typer keeps click
_WrongUsage: type[Exception] = typer.BadParameter.__bases__[0]

app = typer.Typer(
    name="relicctl",
    help="ReLICv2: image encoders trained without labels.",
    epilog="""\b
Examples:
  relicctl pretrain --preset demo
  relicctl linear-eval runs/demo
  relicctl presets ls""",
    rich_markup_mode=None,
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
)
presets = typer.Typer(
    help="The experiments that come with relicctl.",
    epilog="""\b
Examples:
  relicctl presets ls
  relicctl presets show demo
  relicctl presets cp demo my.yaml""",
    rich_markup_mode=None,
    no_args_is_help=True,
)
app.add_typer(presets, name="presets")


# Options that several commands have.
ConfigFile = Annotated[Path | None, typer.Option(metavar="FILE", help="YAML that overrides the preset.")]
Sets = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, as in loss.beta=1; repeatable."),
]
Download = Annotated[bool, typer.Option("--download", help="Fetch torchvision:NAME data.")]
Device = Annotated[str | None, typer.Option(metavar="auto|cpu|cuda", help="Where to compute.")]
Workers = Annotated[int | None, typer.Option(metavar="N", help="Processes that decode and crop.")]
Seed = Annotated[int | None, typer.Option(metavar="N", help="Seed of every random draw.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of a path.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="Say nothing but warnings and errors.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
WhichNetwork = Annotated[str, typer.Option(metavar="online|target", help="Which of the two networks.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Delete the results that --out holds.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the config and where it comes from; then stop.")]
PresetName = Annotated[str, typer.Argument(metavar="NAME")]


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog="""\b
Examples:
  relicctl pretrain --preset demo
  relicctl pretrain --preset demo --dry-run
  relicctl pretrain --preset demo --set optim.max_steps=20 --out runs/short
  relicctl pretrain --preset cifar10-r18 --download --device auto
  relicctl pretrain --resume runs/short"""
)
def pretrain(
    preset: Annotated[str | None, typer.Option(metavar="NAME", help="Experiment to start from.")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Training images: folder, .zip, .tar, torchvision:NAME or shapes [#subfolder].",
        ),
    ] = None,
    val: Annotated[str | None, typer.Option(metavar="DATA", help="Labelled images to evaluate on.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="The run's folder.")] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="[RUN]", help="Go on with a run; without RUN, with --out's or the newest of the preset."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Delete the run that --out holds.")] = False,
    init_from: Annotated[
        str | None, typer.Option(metavar="WEIGHTS", help="Start the encoder from these weights or this run.")
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print the config, where it comes from and what it costs; then stop."),
    ] = False,
    download: Download = False,
    device: Device = None,
    workers: Workers = None,
    seed: Seed = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train an encoder on images, without their labels; prints the run's folder."""
    from relicctl.commands.options import PretrainOptions
    from relicctl.config.resolve import resolve
    from relicctl.config.schema import Config

    options = {"data": data, "val": val, "device": device, "workers": workers, "seed": seed}
    resolved = resolve(preset, config, sets or (), options, schema=Config)
    told = PretrainOptions(out, resume, overwrite, init_from, dry_run, download, as_json, quiet)
    if dry_run:
        from relicctl.commands import plan

        _emit(plan.dry_run(resolved, told))
        return
    from relicctl.commands import pretrain as command

    result = command.pretrain(resolved, told)
    if os.environ.get("RANK", "0") == "0":  # of a process group, one process prints
        _emit(json.dumps(result, default=str) if as_json else str(result["run"]))


@app.command(
    epilog="""\b
Examples:
  relicctl linear-eval runs/demo
  relicctl linear-eval random:runs/demo
  relicctl linear-eval runs/demo --test swapped=shapes:backgrounds=swapped
  relicctl linear-eval runs/demo random:runs/demo pixels:runs/demo --analysis
  relicctl linear-eval torchvision:resnet50 --data photos.zip#train --val photos.zip#val
  relicctl linear-eval --preset linear-imagenet runs/r50 --data imagenet/train --val imagenet/val
  relicctl pretrain --preset demo | relicctl linear-eval -"""
)
def linear_eval(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN|WEIGHTS|-",
            help="The encoder; - reads a path from stdin. Also random[:RUN], pixels[:RUN], torchvision:NAME. "
            "More than one with --analysis.",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Labelled training images; the run's where not given.")
    ] = None,
    val: Annotated[str | None, typer.Option(metavar="DATA", help="Labelled images to test on.")] = None,
    tests: Annotated[
        list[str] | None,
        typer.Option("--test", metavar="NAME=DATA", help="Further test set, its classes known by name; repeatable."),
    ] = None,
    analysis: Annotated[
        bool, typer.Option("--analysis", help="Cluster analysis of the test images' features, with a map.")
    ] = False,
    network: WhichNetwork = "online",
    preset: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="linear-imagenet for the ImageNet protocol; none is the fast one."),
    ] = None,
    config: ConfigFile = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one key, as in sweep.rates=[0.3]; repeatable."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of the results; else a new one in the encoder's run.")
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="[DIR]", help="Go on with an evaluation; without DIR, with --out's.")
    ] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    download: Download = False,
    device: Device = None,
    workers: Workers = None,
    seed: Seed = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Train a linear classifier on an encoder's frozen features; prints the folder of the results."""
    from functools import partial

    from relicctl.commands import linear_eval as command
    from relicctl.commands.options import LinearOptions
    from relicctl.config.linear import LinearConfig
    from relicctl.config.resolve import resolve

    options = {"data": data, "val": val, "device": device, "workers": workers, "seed": seed}
    ask = partial(resolve, preset, config, sets or (), options, schema=LinearConfig)
    told = LinearOptions(
        tuple(sources or ()), network, tuple(tests or ()), analysis, out, resume, overwrite, download, quiet
    )
    if dry_run:
        _emit(command.dry_run(ask, told))
        return
    result = command.linear_eval(ask, told)
    _emit(json.dumps(result) if as_json else result["run"])


@app.command(
    epilog="""\b
Examples:
  relicctl transfer runs/demo --baseline random --data shapes=shapes
  relicctl transfer runs/a runs/b --baseline torchvision:resnet50 --preset byol-suite --download
  relicctl transfer runs/a --data dtd=dtd.zip --protocol logistic --protocol knn --labels all --labels 0.1
  relicctl transfer runs/a --preset finetune-quick --data pets=pets-{split}.zip
  relicctl transfer --resume runs/transfer"""
)
def transfer(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="RUN|WEIGHTS|-",
            help="Encoders; - reads a path from stdin. Also random[:RUN], pixels[:RUN], torchvision:NAME.",
        ),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DATA",
            help="Data with train, perhaps val, and test in it, or with {split} in its name; repeatable.",
        ),
    ] = None,
    baselines: Annotated[
        list[str] | None,
        typer.Option("--baseline", metavar="ENCODER", help="Also evaluated, and improved on; repeatable."),
    ] = None,
    protocol: Annotated[
        list[str] | None,
        typer.Option(metavar="logistic|knn|finetune", help="How features are judged; repeatable. [logistic]"),
    ] = None,
    labels: Annotated[
        list[str] | None,
        typer.Option(metavar="all|SHARE|N-per-class|FILE", help="Training labels that are known; repeatable. [all]"),
    ] = None,
    network: WhichNetwork = "online",
    preset: Annotated[
        str | None, typer.Option(metavar="NAME", help="byol-suite, finetune-byol or finetune-quick.")
    ] = None,
    config: ConfigFile = None,
    sets: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one key, as in data.metrics={x: map11}; repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the results; else a new one.")] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="[DIR]", help="Go on; without DIR, with --out's. What is finished is kept.")
    ] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    download: Download = False,
    device: Device = None,
    workers: Workers = None,
    seed: Seed = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare encoders on other data sets, by classification; prints the folder of the results."""
    from relicctl.commands import transfer as command
    from relicctl.commands.options import TransferOptions
    from relicctl.commands.transfer_job import named_data
    from relicctl.config.resolve import resolve
    from relicctl.config.transfer import TransferConfig

    options = {
        "sets": named_data(tuple(data or ())),
        "protocol": protocol or None,
        "labels": labels or None,
        "device": device,
        "workers": workers,
        "seed": seed,
    }
    resolved = resolve(preset, config, sets or (), options, schema=TransferConfig)
    told = TransferOptions(
        tuple(sources or ()), tuple(baselines or ()), network, out, resume, overwrite, download, quiet
    )
    if dry_run:
        _emit(command.dry_run(resolved, told))
        return
    result = command.transfer(resolved, told)
    _emit(json.dumps(result) if as_json else result["run"])


@app.command(
    epilog="""\b
Examples:
  relicctl export runs/demo --format torchvision --out encoder.safetensors
  relicctl export runs/demo --format timm --classifier runs/linear-demo --out encoder-timm
  relicctl pretrain --preset demo | relicctl export - --format onnx --out encoder.onnx"""
)
def export(
    source: Annotated[
        str, typer.Argument(metavar="RUN|CHECKPOINT|WEIGHTS|-", help="Where the encoder is; - reads a path from stdin.")
    ],
    format: Annotated[
        str, typer.Option("--format", metavar="torchvision|timm|transformers|onnx|relicctl", help="Who shall load it.")
    ],
    out: Annotated[Path, typer.Option(metavar="PATH", help="File; for timm and transformers a folder.")],
    network: WhichNetwork = "online",
    origin: Annotated[
        str, typer.Option("--from", metavar="relicctl|deepmind", help="Who wrote it; deepmind: the authors' .pkl.")
    ] = "relicctl",
    classifier: Annotated[
        Path | None, typer.Option(metavar="RUN", help="Linear evaluation whose classifier goes in as the head.")
    ] = None,
    license: Annotated[str, typer.Option(metavar="NAME", help="Licence of the weights, for the card.")] = "unspecified",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the export that --out holds.")] = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write an encoder in the form of another library, and prove it there; prints its path."""
    from relicctl.commands import export as command

    result = command.export(
        source,
        format=format,
        out=out,
        network=network,
        origin=origin,
        classifier=classifier,
        license=license,
        overwrite=overwrite,
        quiet=quiet,
    )
    _emit(json.dumps(result) if as_json else result["path"])


@app.command(
    epilog="""\b
Examples:
  relicctl bench --preset r50-1000ep
  relicctl bench --preset r50-1000ep --data photos.zip --json
  relicctl bench --preset cifar10-r18 --set model.width=0.25 --batch 64"""
)
def bench(
    preset: Annotated[str | None, typer.Option(metavar="NAME", help="Experiment to measure.")] = None,
    config: ConfigFile = None,
    sets: Sets = None,
    data: Annotated[
        str | None, typer.Option(metavar="DATA", help="Images; without, the preset's, else generated JPEGs.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(metavar="N", help="Images a step; without, what fits and takes minutes.")
    ] = None,
    repeats: Annotated[int, typer.Option(metavar="N", help="Measurements of each figure, after one to warm up.")] = 5,
    download: Download = False,
    device: Device = None,
    workers: Workers = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure what a pretraining takes here: images a second, waits, memory, hours; prints the bottleneck."""
    from relicctl.commands import bench as command
    from relicctl.config.resolve import resolve
    from relicctl.config.schema import Config

    options = {"data": data, "device": device, "workers": workers}
    resolved = resolve(preset, config, sets or (), options, schema=Config)
    result = command.bench(resolved, batch=batch, repeats=repeats, quiet=quiet, download=download)
    _emit(json.dumps(result) if as_json else result["bottleneck"])


@presets.command("ls")
def presets_ls() -> None:
    """List the presets and what each is."""
    from relicctl.commands.presets import listing

    _emit(listing())


@presets.command("show")
def presets_show(name: PresetName) -> None:
    """Print a preset's whole config and where each value comes from."""
    from relicctl.commands.presets import show

    _emit(show(name))


@presets.command("cp")
def presets_cp(
    name: PresetName,
    destination: Annotated[Path, typer.Argument(metavar="DEST")],
) -> None:
    """Copy a preset to a file or folder, to change it and pass it to --config; prints the file."""
    from relicctl.commands.presets import copy

    _emit(str(copy(name, destination)))


def main() -> None:
    """The console entry point: every failure ends here, as two sentences and an exit code."""
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run a command line; its exit code."""
    try:
        code: Any = app(_normalised(arguments), prog_name="relicctl", standalone_mode=False)
        if code == 130:  # what typer makes of ^C outside the training loop
            return _report(KeyboardInterrupt(), arguments)
        return code or 0
    except _WrongUsage as error:
        return _report_usage(error)
    except typer.Abort:  # what click makes of ^C
        return _report(KeyboardInterrupt(), arguments)
    except (Exception, KeyboardInterrupt) as error:
        return _report(error, arguments)


def _normalised(arguments: list[str]) -> list[str]:
    """A bare ``--resume`` becomes ``--resume=``: click has no options whose value may be left out."""
    return [
        "--resume=" if argument == "--resume" and (not after or after[0].startswith("-")) else argument
        for argument, after in ((argument, arguments[i + 1 : i + 2]) for i, argument in enumerate(arguments))
    ]


def _emit(result: str) -> None:
    from relicctl.console import emit

    emit(result)


def _report(error: BaseException, arguments: list[str]) -> int:
    from relicctl.console import report

    return report(error, debug="--debug" in arguments)


def _report_usage(error: Any) -> int:
    """A wrong option or argument; or none at all where one is needed, which is answered with the help."""
    from relicctl.console import report
    from relicctl.errors import UsageError

    command = error.ctx.command_path if error.ctx else "relicctl"
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return int(error.exit_code)
    what = error.format_message().rstrip(".")
    return report(UsageError(f"{what}.", f"See `{command} --help`."))

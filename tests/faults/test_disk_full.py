"""A full disk costs no more than the way from the last checkpoint, and says so; with room made, the run goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from relicctl.cli import run as relicctl
from relicctl.core import checkpoint
from tests.helpers.faults import assert_same_run, command, in_a_process, two_sentences

LEFT = 1000  # bytes: less than any file here takes


def fill(folder: Path, left: int = LEFT) -> None:
    """Use up the file system that ``folder`` lies on, but for about ``left`` bytes."""
    disk = next(path for path in (folder, *folder.parents) if os.path.ismount(path))
    with open(disk / "ballast", "ab", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(1 << 16))
        except OSError:
            pass
        ballast.truncate(max(0, ballast.tell() - left))


def _before(owner: object, name: str, when: Callable[..., Path | None]) -> None:
    """Fill the disk before the call of ``owner.name`` for whose arguments ``when`` gives a folder on it."""
    genuine = getattr(owner, name)

    def filling(*given, **named):
        folder = when(*given)
        if folder is not None:
            fill(folder)
        return genuine(*given, **named)

    setattr(owner, name, filling)


def at_a_checkpoint() -> None:
    _before(
        checkpoint,
        "save_checkpoint",
        lambda path, *_: path.parent if path.name == checkpoint.format_checkpoint_name(6) else None,
    )


def at_metrics() -> None:
    from relicctl.runs.folder import RunFolder

    def when(run: RunFolder, record: dict) -> Path | None:
        if record["step"] != 5:
            return None
        page = 4096 - (run.path / "metrics.jsonl").stat().st_size % 4096  # what the file's last page still takes
        with open(run.path / "metrics.jsonl", "a") as handle:
            handle.write(json.dumps({"step": 4, "filler": "x" * (page - 50)})[: page - 1] + "\n")
        return run.path

    _before(RunFolder, "write_metrics", when)


def at_the_encoder() -> None:
    from relicctl.pretraining import run

    _before(run, "save_encoder", lambda path, *_: path.parent)


def at_the_results() -> None:
    from relicctl.runs.folder import RunFolder

    _before(RunFolder, "write_json", lambda run, *_: run.path)


@pytest.mark.parametrize(
    ("moment", "kept"),
    [(at_a_checkpoint, 3), (at_metrics, 3), (at_the_encoder, 8), (at_the_results, 8)],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_full_disk_ends_the_run_and_loses_nothing_that_was_saved(tiny, whole, small_disk, tmp_path, moment, kept):
    run, log = small_disk.path / "run", tmp_path / "log"
    ended = in_a_process(command(tiny, run), f"{__name__}.{moment.__name__}", log)
    assert ended.code == 1
    assert two_sentences(ended.err)
    assert "No space left" in ended.err or "disk is full" in ended.err
    assert "--resume" in ended.err
    newest = checkpoint.list_checkpoints(run / "checkpoints")[-1]
    assert checkpoint.load_checkpoint(newest)[1]["step"] == kept
    small_disk.free()
    again = in_a_process(command(tiny, run), log=log)
    assert again.code == 0, again.err
    assert_same_run(run, whole)


def test_an_export_on_a_full_disk_leaves_nothing(whole, small_disk, capsys):
    fill(small_disk.path, 300_000)  # an encoder takes 718 kB
    out = small_disk.path / "export" / "r18.safetensors"
    export = ["export", str(whole), "--format", "relicctl", "--out", str(out), "--quiet"]
    assert relicctl(export) == 1
    told = capsys.readouterr()
    assert two_sentences(told.err)
    assert "disk is full" in told.err
    assert (told.out, list(out.parent.iterdir())) == ("", [])
    small_disk.free()
    assert relicctl(export) == 0


def test_features_that_did_not_fit_on_disk_are_extracted_again(small_disk):
    """The feature cache of transfer and linear-eval: either whole or absent."""
    from types import SimpleNamespace
    from unittest.mock import Mock

    import numpy as np
    import torch

    from relicctl.core.distributed import World
    from relicctl.errors import RunFailed
    from relicctl.evaluation.features import LabelledFeatures, load_or_extract

    path = small_disk.path / "features" / "a.safetensors"
    images = SimpleNamespace(labels=np.arange(20_000) % 10)
    made = LabelledFeatures.from_rows(torch.randn(20_000, 32), images, np.arange(20_000))
    extract = Mock(return_value=made, context=SimpleNamespace(device=torch.device("cpu"), world=World()))
    fill(small_disk.path, 500_000)
    with pytest.raises(RunFailed, match="No space left") as failed:
        load_or_extract(path, images, extract)
    assert failed.value.code == 1
    assert list(path.parent.iterdir()) == []
    small_disk.free()
    for _ in range(2):
        assert torch.equal(load_or_extract(path, images, extract).features, made.features)
    assert extract.call_count == 2  # once on the full disk, then once: the file was kept

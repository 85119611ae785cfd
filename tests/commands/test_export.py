"""``relicctl export`` around the formats: where encoders come from, what is kept, what is refused."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from relicctl.commands import export as command
from relicctl.encoders.file import load_encoder
from relicctl.encoders.resolve import open_trained_encoder
from relicctl.errors import RunFailed, UsageError
from relicctl.export import torchvision
from relicctl.export.bundle import EncoderOutputs
from relicctl.export.write import compute_max_difference


def export(source: str, **options: object) -> dict:
    return command.export(source, command.ExportOptions(**options))  # type: ignore[arg-type]


@pytest.fixture
def run(make_run) -> Path:
    return make_run("resnet18")


def exported(source: object, out: Path, **options: object) -> dict:
    return export(str(source), **{"format": "torchvision", "out": out, "quiet": True, **options})


def test_a_run_a_checkpoint_and_weights_give_the_same_online_encoder(run, tmp_path):
    sources = [run, run / "checkpoints" / "step-00000005.safetensors", run / "encoder.safetensors"]
    hashes = set()
    for number, source in enumerate(sources):
        exported(source, tmp_path / f"{number}.safetensors")
        hashes.add(tensor_bytes(load_file(tmp_path / f"{number}.safetensors")))
    assert len(hashes) == 1


def test_the_target_network_is_another_one_and_comes_from_the_checkpoint(run, tmp_path):
    result = exported(run, tmp_path / "t.safetensors", network="target")
    stored = load_file(run / "checkpoints" / "step-00000005.safetensors")
    written = load_file(tmp_path / "t.safetensors")
    assert result["network"] == "target"
    assert all(torch.equal(t, stored[f"state.target.encoder.{name}"]) for name, t in written.items())
    assert not torch.equal(written["conv1.weight"], stored["state.online.encoder.conv1.weight"])


def test_a_run_that_has_not_ended_gives_its_newest_checkpoint(run):
    expected = load_encoder(run).state_dict()
    (run / "encoder.safetensors").unlink()
    (run / "checkpoints" / "step-00000009.safetensors").write_bytes(b"cut short")
    (run / "status.json").write_text('{"state": "stopped", "total": 9}')
    warnings: list[str] = []
    found = open_trained_encoder(str(run), warn=warnings.append).encoder.state_dict()
    assert all(torch.equal(found[name], t) for name, t in expected.items())
    assert "step-00000009" in warnings[0]
    assert len(warnings) == 2
    assert warnings[1].startswith(f"{run} is not finished: ")
    assert warnings[1].endswith("is used, step 5 of 9")


def test_a_dash_reads_the_last_line_of_stdin(run, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"some words\n{run}\n\n"))
    assert exported("-", tmp_path / "o.safetensors")["path"] == str(tmp_path / "o.safetensors")


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_a_dash_with_nothing_on_stdin_says_so(text, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    with pytest.raises(UsageError, match="got none"):
        exported("-", tmp_path / "o.safetensors")


def test_metadata_and_card_say_where_the_weights_are_from(run, make_classifier, tmp_path):
    out = tmp_path / "r18.safetensors"
    result = exported(run, out, classifier=make_classifier(512), license="mit")
    with safe_open(out, framework="pt") as handle:
        metadata = handle.metadata()
    assert metadata["preset"] == "demo"
    assert metadata["version"] == "0.1.0"
    assert metadata["data_fingerprint"] == "f1e2d3"
    assert metadata["license"] == "mit"
    assert json.loads(metadata["figures"]) == {"pretraining": {"knn20": 0.471}, "classifier": {"top1": 0.625}}
    card = Path(result["card"]).read_text("utf-8")
    assert all(text in card for text in ("mit", "f1e2d3", "0.471", "0.625", result["sha256"], "r18.safetensors"))
    assert "upright by EXIF orientation" in card  # what other libraries leave to their users
    assert str(tmp_path) not in card


def test_an_export_that_differs_leaves_nothing(run, tmp_path, monkeypatch):
    out = tmp_path / "new" / "r18.safetensors"
    monkeypatch.setattr(
        torchvision, "compute_outputs", lambda path, bundle, x: EncoderOutputs(bundle(x).features + 1e-3, None)
    )
    with pytest.raises(RunFailed, match="other features"):
        exported(run, out)
    assert list(out.parent.iterdir()) == []


def test_what_is_there_is_replaced_only_when_asked_and_only_by_a_good_export(run, tmp_path, monkeypatch):
    out = tmp_path / "r18.safetensors"
    out.write_text("precious")
    with pytest.raises(UsageError, match="exists already"):
        exported(run, out)
    with monkeypatch.context() as broken:
        broken.setattr(
            torchvision, "compute_outputs", lambda path, bundle, x: EncoderOutputs(bundle(x).features * 2, None)
        )
        with pytest.raises(RunFailed):
            exported(run, out, overwrite=True)
    assert out.read_text() == "precious"
    exported(run, out, overwrite=True)
    assert "fc.weight" not in load_file(out)


def test_overwrite_deletes_no_folder_that_is_no_export(run, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years")
    with pytest.raises(UsageError, match="will not delete"):
        export(str(run), format="timm", out=tmp_path / "home", overwrite=True, quiet=True)
    assert (tmp_path / "home" / "thesis.tex").exists()


def test_where_tensorflow_padding_is_lost_its_cost_is_measured_and_told(make_run, tmp_path, capsys):
    run = make_run("resnet18", padding="same")
    result = exported(run, tmp_path / "o.safetensors", quiet=False)
    assert "trained with padding `same`" in capsys.readouterr().err
    told = re.search(r"mean relative difference ([0-9.]+)%", result["padding_change"])
    assert told is not None
    assert float(told[1]) > 0
    assert result["padding_change"] in Path(result["card"]).read_text("utf-8")


def test_relicctls_own_form_keeps_everything(make_run, tmp_path):
    """Padding, width and stem that no other library expresses; what comes back gives the same features."""
    run = make_run("resnet18", width=0.25, stem="cifar", padding="same")
    result = export(str(run), format="relicctl", out=tmp_path / "e.safetensors", quiet=True)
    assert result["largest_difference"] == 0
    assert result["padding_change"] is None
    scope = {}
    exec("\n".join(result["load"]), scope)
    before, after = load_encoder(run), scope["model"]
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(before(images), after(images))
    assert (after.width, after.stem, after.padding) == (0.25, "cifar", "same")


def test_an_absent_library_leaves_the_export_unverified_or_is_named_with_its_pip_line(run, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "find_missing_packages", lambda libraries: list(libraries))
    result = export(str(run), format="timm", out=tmp_path / "timm", quiet=True)
    assert result["largest_difference"] is None
    assert "Not verified" in (tmp_path / "timm" / "README.md").read_text("utf-8")
    with pytest.raises(UsageError, match="pip install onnx onnxscript"):
        export(str(run), format="onnx", out=tmp_path / "net.onnx", quiet=True)


def test_a_classifier_of_another_encoder_is_refused(run, make_classifier, tmp_path):
    with pytest.raises(UsageError, match="512 features"):
        exported(run, tmp_path / "o.safetensors", classifier=make_classifier(100))


def test_values_that_are_no_numbers_differ():
    ones = EncoderOutputs(torch.ones(2, 3), None)
    assert compute_max_difference(ones, EncoderOutputs(torch.full((2, 3), torch.nan), None)) == float("inf")
    assert compute_max_difference(ones, ones) == 0


@pytest.mark.realdata
def test_the_run_s_own_images_are_compared_where_they_can_be_read(run, tmp_path, realdata_dir):
    data = realdata_dir / "imagenette128-val.zip"
    config = (run / "config.yaml").read_text("utf-8").replace("train: null", f"train: {data}")
    (run / "config.yaml").write_text(config)
    result = exported(run, tmp_path / "o.safetensors")
    assert result["images"] == f"4 images of {data}"
    assert result["largest_difference"] < 1e-4


def tensor_bytes(tensors: dict[str, torch.Tensor]) -> bytes:
    return b"".join(tensors[name].numpy().tobytes() for name in sorted(tensors))


@pytest.mark.parametrize("format", sorted(command.FORMATS))
def test_exporting_twice_gives_the_same_bytes(format, run, tmp_path):
    target = command.FORMATS[format]
    for package in (*target.read_packages, *target.write_packages):
        pytest.importorskip(package)
    outs = [tmp_path / number / "export" for number in ("0", "1")]
    results = [exported(run, out, format=format) for out in outs]
    assert results[0]["sha256"] == results[1]["sha256"]
    contents = [{p.name: p.read_bytes() for p in out.parent.rglob("*") if p.is_file()} for out in outs]
    assert contents[0] == contents[1]

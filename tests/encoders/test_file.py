from __future__ import annotations

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import relicctl
from relicctl.core.counter_rng import fork_seeded_rng
from relicctl.data.decoding import decode_rgb
from relicctl.encoders.file import EvalTransform, describe_transform, load_encoder, save_encoder
from relicctl.errors import UsageError
from relicctl.models.resnet import build_encoder

METADATA = {
    "size": "32",
    "crop_ratio": "0.875",
    "mean": "[0.485, 0.456, 0.406]",
    "std": "[0.229, 0.224, 0.225]",
    "network": "online",
    "preset": "demo",
}


def trained(**changes):
    """A small encoder whose running statistics are no longer those of the start."""
    with fork_seeded_rng(0):
        encoder = build_encoder(**({"arch": "resnet18", "width": 0.125, "stem": "cifar"} | changes))
    encoder(images())
    return encoder


def images():
    return torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "encoder.safetensors"
    encoder = trained()
    save_encoder(path, encoder, METADATA)
    return path, encoder


@pytest.fixture(scope="module")
def torchvision_weights():
    torch.manual_seed(0)
    return torchvision.models.resnet18().state_dict()


def refusal(path, **keys):
    with pytest.raises(UsageError) as caught:
        load_encoder(path, **keys)
    for sentence in (caught.value.what, caught.value.fix):
        assert sentence.endswith(".")
    return caught.value.what


@pytest.mark.parametrize(
    "changes",
    [{}, {"arch": "resnet50"}, {"width": 0.25, "stem": "stride2"}, {"stem": "imagenet", "padding": "same"}],
)
def test_saved_and_loaded_gives_the_same_features(tmp_path, changes):
    encoder = trained(**changes)
    save_encoder(tmp_path / "e.safetensors", encoder, METADATA)
    loaded = load_encoder(tmp_path / "e.safetensors")
    assert not loaded.training
    assert loaded.feature_dim == encoder.feature_dim
    assert torch.equal(loaded(images()), encoder.eval()(images()))
    assert list(loaded.state_dict()) == list(encoder.state_dict())


def test_loaded_encoder_can_be_trained(saved):
    loaded = load_encoder(saved[0]).train()
    loaded(images()).sum().backward()
    assert all(p.grad is not None for p in loaded.parameters())


def test_a_run_folder_stands_for_its_encoder(saved):
    assert torch.equal(load_encoder(saved[0].parent)(images()), relicctl.load_encoder(str(saved[0]))(images()))


def test_the_file_has_torchvision_s_names_and_says_how_to_build(saved):
    with safe_open(saved[0], framework="pt") as file:
        metadata = file.metadata()
    assert metadata == METADATA | {
        "format": "relicctl-encoder",
        "version": relicctl.__version__,
        "arch": "resnet18",
        "width": "0.125",
        "stem": "cifar",
        "padding": "symmetric",
    }
    assert load_encoder(saved[0]).metadata == metadata
    names = [name for name in torchvision.models.resnet18().state_dict() if not name.startswith("fc.")]
    assert sorted(load_file(saved[0])) == sorted(names)


def test_channels_last_weights_are_saved_as_they_count(tmp_path):
    encoder = trained()
    expected = encoder.eval()(images())
    save_encoder(tmp_path / "e.safetensors", encoder.to(memory_format=torch.channels_last), METADATA)
    torch.testing.assert_close(load_encoder(tmp_path / "e.safetensors")(images()), expected)


def test_a_failed_write_leaves_the_old_file_and_no_other(saved):
    path, encoder = saved
    before = path.read_bytes()
    with pytest.raises(Exception, match="metadata"):
        save_encoder(path, encoder, METADATA | {"size": 32})  # metadata must be strings
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_torchvision_weights_are_recognised(tmp_path, torchvision_weights, suffix):
    path = tmp_path / f"weights.{suffix}"
    save = torch.save if suffix == "pth" else save_file
    save(torchvision_weights, path)
    loaded = load_encoder(path)
    theirs = torchvision.models.resnet18()
    theirs.load_state_dict(torchvision_weights)
    theirs.fc = torch.nn.Identity()
    torch.testing.assert_close(loaded(images()), theirs.eval()(images()))
    assert (loaded.metadata["arch"], loaded.transform.size) == ("resnet18", 224)


@pytest.mark.parametrize("arch", ["resnet34", "resnet50", "resnet101", "resnet152"])
def test_torchvision_architectures_are_told_apart(tmp_path, arch):
    """Narrow ones, to keep the files small."""
    save_file(dict(build_encoder(arch, 0.125).state_dict()), tmp_path / "w.safetensors")
    loaded = load_encoder(tmp_path / "w.safetensors")
    assert (loaded.arch, loaded.width) == (arch, 0.125)


def test_weights_without_batch_counters_load(tmp_path, torchvision_weights):
    kept = {k: v for k, v in torchvision_weights.items() if "num_batches_tracked" not in k}
    save_file(kept, tmp_path / "w.safetensors")
    assert load_encoder(tmp_path / "w.safetensors").bn1.num_batches_tracked == 0


def test_half_precision_weights_become_float32(tmp_path, torchvision_weights):
    save_file({k: v.half() if v.is_floating_point() else v for k, v in torchvision_weights.items()}, tmp_path / "w")
    assert load_encoder(tmp_path / "w").conv1.weight.dtype == torch.float32


def test_transform_is_the_centre_resized_and_normalised():
    pixels = np.zeros((40, 64, 3), np.uint8)
    pixels[:, 16:48] = (255, 128, 0)  # the centre square of 32 lies within
    transform = EvalTransform(16, 0.8, (0.5, 0.25, 0.0), (0.5, 0.25, 1.0))
    found = transform(pixels)
    assert found.dtype == torch.float32
    expected = torch.tensor([1.0, (128 / 255 - 0.25) / 0.25, 0.0])
    torch.testing.assert_close(found, expected[:, None, None].expand(3, 16, 16))
    assert torch.equal(found, transform(Image.fromarray(pixels)))
    assert transform(Image.new("L", (50, 20))).shape == (3, 16, 16)
    with pytest.raises(ValueError, match="uint8"):
        transform(np.zeros((3, 8, 8), np.float32))


def as_files() -> dict[str, bytes]:
    """One picture in files that Pillow alone does not make the training's pixels of."""
    pixels = np.array(Image.linear_gradient("L").resize((60, 40)).convert("RGB"))
    pixels[:20, :30, 0] = 255
    picture, exif = Image.fromarray(pixels), Image.Exif()
    exif[0x0112] = 6
    transparent = picture.copy()
    transparent.putalpha(Image.linear_gradient("L").resize((60, 40)).rotate(180))
    grey = pixels[..., 0].astype(np.float64) / 255
    images: dict[str, tuple[Image.Image, str, dict]] = {
        "plain": (picture, "PNG", {}),
        "turned": (picture, "JPEG", {"exif": exif}),
        "turned tiff": (picture, "TIFF", {"exif": exif}),
        "alpha": (transparent, "PNG", {}),
        "palette": (picture.quantize(16), "PNG", {"transparency": 3}),
        "16 bits": (Image.fromarray((grey * 65535).astype(np.uint16)), "PNG", {}),
        "16 bits tiff": (Image.fromarray((grey * 4095).astype(np.uint16)), "TIFF", {}),
        "floats": (Image.fromarray(grey.astype(np.float32)), "TIFF", {}),
        "integers": (Image.fromarray((grey * 60000).astype(np.int32)), "TIFF", {}),
        "cmyk": (picture.convert("CMYK"), "JPEG", {}),
    }
    files = {}
    for name, (image, form, options) in images.items():
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        files[name] = buffer.getvalue()
    return files


@pytest.mark.parametrize("white_point", [None, 4095.0])
@pytest.mark.parametrize("kind", as_files())
def test_transform_prepares_a_picture_as_training_reads_its_file(kind, white_point):
    data = as_files()[kind]
    transform = EvalTransform(16, 0.8, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), white_point)
    assert torch.equal(transform(Image.open(io.BytesIO(data))), transform(decode_rgb(data, white_point=white_point)))


def test_a_white_point_is_saved_with_the_encoder(tmp_path):
    save_encoder(tmp_path / "e", trained(), METADATA | describe_transform(32, 0.875, 4095.0))
    assert load_encoder(tmp_path / "e").transform.white_point == 4095
    save_encoder(tmp_path / "f", trained(), METADATA | describe_transform(32, 0.875))
    assert load_encoder(tmp_path / "f").transform.white_point is None


def test_loaded_transform_fits_the_encoder(saved):
    loaded = load_encoder(saved[0])
    assert loaded.transform == EvalTransform(32, 0.875, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    x = loaded.transform(Image.new("RGB", (70, 50)))[None]
    assert loaded(x).shape == (1, loaded.feature_dim)


def test_missing_file_is_refused(tmp_path):
    assert "no encoder weights" in refusal(tmp_path / "nothing.safetensors")
    assert "encoder.safetensors" in refusal(tmp_path)


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("share", [0.0, 0.00001, 0.001, 0.5, 0.999])
def test_truncated_files_are_refused(tmp_path, torchvision_weights, suffix, share):
    path = tmp_path / f"w.{suffix}"
    (torch.save if suffix == "pth" else save_file)(torchvision_weights, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    assert "truncated" in refusal(path)


class Anything:
    def __reduce__(self):
        return print, ("foreign code ran",)


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
def test_pickles_are_refused_and_never_run(tmp_path, capsys, protocol):
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Anything(), protocol=protocol))
    refusal(tmp_path / "w.pth")
    torch.save({"net": Anything()}, tmp_path / "v.pth")
    assert "pickle" in refusal(tmp_path / "v.pth")
    assert capsys.readouterr().out == ""


def test_foreign_networks_are_refused(tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "w.safetensors")
    assert "neither" in refusal(tmp_path / "w.safetensors")


def test_every_tensor_that_does_not_fit_is_named(saved):
    path, _ = saved
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    del tensors["bn1.weight"], tensors["layer4.1.conv2.weight"]
    tensors["layer5.weight"] = torch.zeros(1)
    tensors["bn1.bias"] = torch.zeros(3)
    save_file(tensors, path, metadata=metadata)
    what = refusal(path)
    for part in ("bn1.weight is missing", "layer4.1.conv2.weight is missing", "layer5.weight is unexpected"):
        assert part in what
    assert "bn1.bias is [3] instead of [8]" in what


def test_wide_resnets_of_torchvision_are_refused(tmp_path):
    """They widen only the inner convolutions: another network than ours of width 2."""
    with torch.device("meta"):
        shapes = torchvision.models.wide_resnet50_2().state_dict()
    torch.save({k: torch.zeros((), dtype=v.dtype).expand(v.shape) for k, v in shapes.items()}, tmp_path / "w.pth")
    assert "layer1.0.conv1.weight is [128" in refusal(tmp_path / "w.pth")


@pytest.mark.parametrize(
    "damage",
    [
        {"arch": "resnet19"}, {"width": "wide"}, {"mean": "0.5,"}, {"size": ""}, {"std": "1"}, {"size": "-1"},
        {"crop_ratio": "nan"}, {"mean": "[1, 2]"}, {"white_point": "0"}, {"white_point": "inf"},
    ],
)  # fmt: skip
def test_damaged_metadata_are_refused(saved, damage):
    path, _ = saved
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata=metadata | damage)
    assert "metadata" in refusal(path)


def test_the_other_network_is_not_passed_off(saved):
    assert "online" in refusal(saved[0], network="target")


def test_a_file_that_claims_more_than_it_holds_is_refused(tmp_path, torchvision_weights):
    claimed = {name: torch.zeros((), dtype=t.dtype).expand(t.shape) for name, t in torchvision_weights.items()}
    torch.save(claimed, tmp_path / "w.pth")
    assert "fewer numbers" in refusal(tmp_path / "w.pth")


def test_a_compressed_torch_file_is_refused_before_it_is_unpacked(tmp_path, torchvision_weights):
    torch.save(torchvision_weights, tmp_path / "stored.pth")
    with zipfile.ZipFile(tmp_path / "stored.pth") as stored, zipfile.ZipFile(tmp_path / "w.pth", "w") as packed:
        for name in stored.namelist():
            packed.writestr(name, bytes(len(stored.read(name))), zipfile.ZIP_DEFLATED)
    assert "compressed" in refusal(tmp_path / "w.pth")

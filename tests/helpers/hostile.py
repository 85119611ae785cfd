"""What reads strangers' bytes, each a function that may raise nothing but our own errors; and honest seeds."""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from relicctl.config.resolve import resolve_config
from relicctl.config.yaml_io import load_mapping
from relicctl.core import checkpoint
from relicctl.data import mask_bank
from relicctl.data.datasets.archives import open_container
from relicctl.data.datasets.open import open_dataset
from relicctl.data.datasets.shapes import ShapesDataset
from relicctl.data.decoding import BadImageError, decode_rgb
from relicctl.encoders.deepmind import read_deepmind
from relicctl.encoders.file import load_encoder, save_encoder
from relicctl.encoders.safe_pickle import load_pickle
from relicctl.errors import RelicError

_REMOVED_AT_EXIT = tempfile.TemporaryDirectory(prefix="hostile-")
PLACE = Path(_REMOVED_AT_EXIT.name)


@dataclass(frozen=True)
class Target:
    """``read`` gets bytes, and raises only what is a finding; ``seeds`` are honest inputs to spoil."""

    read: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


def written(data: bytes, name: str) -> Path:
    path = PLACE / name
    path.write_bytes(data)
    return path


def read_config(data: bytes) -> None:
    with contextlib.suppress(RelicError):
        load_mapping(written(data, "c.yaml"))
    with contextlib.suppress(RelicError):
        resolve_config(config_file=written(data, "c.yaml"))
    with contextlib.suppress(RelicError):
        resolve_config(sets=[data.decode("utf-8", "replace")])


def read_archive(data: bytes) -> None:
    path = written(data, "a.tar" if data[257:262] == b"ustar" else "a.zip")
    with contextlib.suppress(RelicError):
        container = open_container(str(path))
        for name, member in container.iter_files():
            assert not name.startswith("/")
            assert ".." not in name.split("/")
            with contextlib.suppress(BadImageError):
                assert len(container.read(name.encode("utf-8", "surrogateescape"), member)) == member.size
    with contextlib.suppress(RelicError):
        source = open_dataset(str(path))
        for index in range(min(len(source), 20)):
            source.get_name(index).encode()
            with contextlib.suppress(BadImageError):
                source.load(index)


def read_image(data: bytes) -> None:
    with contextlib.suppress(BadImageError):
        assert decode_rgb(data).ndim == 3


def read_checkpoint(data: bytes) -> None:
    with contextlib.suppress(RelicError):
        tensors, header = checkpoint.load_checkpoint(written(data, "step-00000001.safetensors"))
        assert isinstance(header, dict)
        assert all(isinstance(tensor, torch.Tensor) for tensor in tensors.values())


def read_weights(data: bytes) -> None:
    with contextlib.suppress(RelicError):
        load_encoder(written(data, "encoder.safetensors"))


def read_pickle(data: bytes) -> None:
    with contextlib.suppress(RelicError):
        load_pickle(written(data, "a.pkl"))
    with contextlib.suppress(RelicError):
        read_deepmind(PLACE / "a.pkl")


def read_bank(data: bytes) -> None:
    with contextlib.suppress(RelicError):
        bank = mask_bank.MaskBank.open(written(data, "masks.bank"))
        with contextlib.suppress(RelicError):
            for row in bank.find_rows(MASKED)[:4].tolist():
                assert bank.load_mask(row).shape == (bank.side, bank.side)
                bank.get_foreground_ratio(row)


MASKED = ShapesDataset.from_spec("shapes:size=16,train=8,val=8", "train")


def configs() -> list[bytes]:
    whole = "objective: relicv2\noptim: {batch_size: 64, base_lr: 1e-3}\nviews: {large: {count: 2, area: [0.2, 1.0]}}\n"
    return [whole.encode(), b"loss.beta: 1\nseed: 3\nextends: demo\n", b"optim.epochs=3", b"a: &a [1, 2]\nb: *a\n"]


def archives() -> list[bytes]:
    files = {
        "a/x.png": images()[1],
        "b/y.jpg": images()[0],
        "b/z.jpg": b"no picture",
        "../up.jpg": b"x",
        "/etc/w.jpg": b"y",
    }
    made = []
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w", method) as archive:
            for name, data in files.items():
                archive.writestr(name, data)
        made.append(file.getvalue())
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        file = io.BytesIO()
        with tarfile.open(fileobj=file, mode="w", format=form) as tar:
            for name, data in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
            link = tarfile.TarInfo("c/link.jpg")
            link.type, link.linkname = tarfile.SYMTYPE, "../../etc/passwd"
            tar.addfile(link)
        made.append(file.getvalue())
    return made


def images() -> list[bytes]:
    picture = Image.linear_gradient("L").resize((16, 12)).convert("RGB")
    made = []
    for form in ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"):
        file = io.BytesIO()
        picture.save(file, form)
        made.append(file.getvalue())
    return made


def checkpoints() -> list[bytes]:
    path = PLACE / "seed.safetensors"
    checkpoint.save_checkpoint(
        path, {"state.w": torch.arange(6.0).reshape(2, 3), "optim.0.m": torch.zeros(2)}, {"step": 1}
    )
    save_file({"w": torch.ones(2)}, PLACE / "foreign.safetensors")
    return [path.read_bytes(), (PLACE / "foreign.safetensors").read_bytes()]


def weights() -> list[bytes]:
    from relicctl.models.resnet import build_encoder

    path = PLACE / "weights.safetensors"
    about = {"size": "32", "crop_ratio": "0.875", "mean": "[0, 0, 0]", "std": "[1, 1, 1]"}
    save_encoder(path, build_encoder("resnet18", 0.015625, "cifar", "symmetric"), about)
    file = io.BytesIO()
    torch.save({"conv1.weight": torch.ones(2, 3)}, file)
    return [path.read_bytes(), file.getvalue(), *checkpoints()]


def pickles() -> list[bytes]:
    held = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "b": [1, "x", (2.5, None, True), {3}, b"bytes"]}
    whole = {"experiment_state": OrderedDict(online_params=held), "step": np.int64(7), "rng": np.arange(2)}
    return [pickle.dumps(whole, protocol) for protocol in (0, 2, 3, 4, 5)]


def banks() -> list[bytes]:
    path = PLACE / "seed.bank"
    path.unlink(missing_ok=True)
    writer = mask_bank.MaskBankWriter(path, MASKED, made_by="hostile")
    for row in writer.find_missing().tolist():
        writer.write_mask(row, np.eye(mask_bank.MASK_SIDE, dtype=bool))
    writer.close()
    data = path.read_bytes()
    return [data[: mask_bank.HEADER_BYTES], data]


def with_true_sums(data: bytes) -> bytes:
    """A bank whose checksums are made to fit again: who wants to do harm computes them too."""
    try:
        length = struct.unpack_from("<I", data, len(mask_bank.FORMAT.magic) + 4)[0]
        start = len(mask_bank.FORMAT.magic) + 12
        header = json.loads(data[start : start + length])
        layout = mask_bank.make_layout(int(header["count"]), int(header["side"]))
        if 0 <= layout.offsets["masks"] <= len(data):
            header["tables_crc"] = zlib.crc32(data[mask_bank.HEADER_BYTES : layout.offsets["masks"]])
        text = json.dumps(header).encode()
        prefix = data[: len(mask_bank.FORMAT.magic) + 4] + struct.pack("<II", len(text), zlib.crc32(text))
        return (prefix + text).ljust(mask_bank.HEADER_BYTES, b"\0")[: mask_bank.HEADER_BYTES] + data[
            mask_bank.HEADER_BYTES :
        ]
    except Exception:
        return data


TARGETS = {
    "config": Target(read_config, configs),
    "archive": Target(read_archive, archives),
    "image": Target(read_image, images),
    "checkpoint": Target(read_checkpoint, checkpoints),
    "weights": Target(read_weights, weights),
    "pickle": Target(read_pickle, pickles),
    "bank": Target(lambda data: (read_bank(data), read_bank(with_true_sums(data)))[0], banks),
}

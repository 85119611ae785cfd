"""A checkpoint is whole or it is refused; the newest whole one is taken."""

import errno
import json
import pickle
import struct

import pytest
import torch

from relicctl.core import atomic_io, checkpoint
from relicctl.core.checkpoint import BrokenCheckpoint
from relicctl.errors import RunFailed


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return {
        "a": torch.randn(3, 4),
        "half": torch.randn(5).bfloat16(),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 2),
        "strided": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }


def write(path, tensors, step=5):
    checkpoint.save_checkpoint(path, tensors, {"step": step, "facts": {"knn20": 0.5}})
    return path


def test_checkpoint_round_trip_is_bitwise(tmp_path, tensors):
    read, header = checkpoint.load_checkpoint(write(tmp_path / "c.safetensors", tensors))
    assert header == {"step": 5, "facts": {"knn20": 0.5}}
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_a_truncated_file_is_refused(tmp_path, tensors, keep):
    path = write(tmp_path / "c.safetensors", tensors)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(BrokenCheckpoint):
        checkpoint.load_checkpoint(path)


def test_any_flipped_bit_is_detected(tmp_path, tensors):
    path = write(tmp_path / "c.safetensors", tensors)
    whole = path.read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    for position in range(start, len(whole), 37):
        broken = bytearray(whole)
        broken[position] ^= 16
        path.write_bytes(bytes(broken))
        with pytest.raises(BrokenCheckpoint, match="damaged"):
            checkpoint.load_checkpoint(path)


def test_foreign_newer_and_pickled_files_are_refused(tmp_path, tensors, monkeypatch):
    from safetensors.torch import save_file

    foreign = tmp_path / "foreign.safetensors"
    save_file({"w": torch.ones(2)}, foreign)
    with pytest.raises(BrokenCheckpoint, match="not a checkpoint"):
        checkpoint.load_checkpoint(foreign)

    pickled = tmp_path / "pickled.safetensors"
    pickled.write_bytes(pickle.dumps({"step": 1}))
    with pytest.raises(BrokenCheckpoint):
        checkpoint.load_checkpoint(pickled)

    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 99)
    newer = write(tmp_path / "newer.safetensors", tensors)
    monkeypatch.undo()
    with pytest.raises(BrokenCheckpoint, match="newer"):
        checkpoint.load_checkpoint(newer)


def test_the_newest_whole_checkpoint_is_taken_with_a_warning_for_the_broken_one(tmp_path, tensors):
    write(tmp_path / checkpoint.format_checkpoint_name(10), tensors, 10)
    write(tmp_path / checkpoint.format_checkpoint_name(20), tensors, 20)
    newest = write(tmp_path / checkpoint.format_checkpoint_name(30), tensors, 30)
    newest.write_bytes(newest.read_bytes()[:50])
    warnings: list[str] = []
    path, _, header = checkpoint.load_newest_valid(tmp_path, warnings.append)
    assert (path.name, header["step"]) == (checkpoint.format_checkpoint_name(20), 20)
    assert len(warnings) == 1
    assert newest.name in warnings[0]
    assert checkpoint.load_newest_valid(tmp_path / "nothing", warnings.append) is None


def test_failed_write_leaves_the_old_file_and_no_temporary(tmp_path, tensors):
    path = write(tmp_path / "c.safetensors", tensors)
    before = path.read_bytes()

    def half(temporary):
        temporary.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        atomic_io.write_atomically(path, half)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_checkpoint_permissions_follow_the_umask(tmp_path, tensors):
    import os

    before = os.umask(0o027)
    try:
        path = write(tmp_path / "c.safetensors", tensors)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_prune_keeps_the_newest_and_removes_temporaries(tmp_path, tensors):
    for step in (1, 2, 3):
        write(tmp_path / checkpoint.format_checkpoint_name(step), tensors, step)
    (tmp_path / f".{checkpoint.format_checkpoint_name(4)}.123.tmp").write_bytes(b"half")
    checkpoint.prune_checkpoints(tmp_path, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        checkpoint.format_checkpoint_name(2),
        checkpoint.format_checkpoint_name(3),
    ]


@pytest.mark.parametrize("name", ["lars", "sgd", "adamw"])
def test_restored_optimizer_continues_bitwise(name):
    from relicctl.core.optim import build_optimizer

    def steps(optimizer, parameters, count):
        for _ in range(count):
            for p in parameters:
                p.grad = p.detach() * 0.5 + 1
            optimizer.step()

    def build(values):
        parameters = [torch.nn.Parameter(v.clone()) for v in values]
        return build_optimizer(name, [(str(i), p) for i, p in enumerate(parameters)], 0.1, 0.9, 1e-4), parameters

    start = [torch.ones(3, 2), torch.full((4,), 2.0)]
    whole, expected = build(start)
    steps(whole, expected, 6)

    first, parameters = build(start)
    steps(first, parameters, 3)
    saved = {k: v.clone() for k, v in checkpoint.flatten_optimizer_state(first).items()}
    second, parameters = build([p.detach() for p in parameters])
    checkpoint.load_optimizer_state(second, saved)
    steps(second, parameters, 3)
    assert all(torch.equal(a, b) for a, b in zip(parameters, expected, strict=True))
    assert json.dumps(sorted(saved))  # names are plain text


def test_disk_error_is_not_reported_as_damage(tmp_path, monkeypatch):
    path = tmp_path / checkpoint.format_checkpoint_name(1)
    checkpoint.save_checkpoint(path, {"x": torch.zeros(1)}, {"step": 1})

    def unreadable(*args, **kwargs):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, "safe_open", unreadable)
    with pytest.raises(RunFailed, match="cannot be read"):
        checkpoint.load_newest_valid(tmp_path, pytest.fail)

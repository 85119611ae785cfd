from __future__ import annotations

import contextlib
import gzip
import io
import multiprocessing
import os
import stat
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from relicctl.data.datasets import archives
from relicctl.data.datasets.archives import open_container
from relicctl.data.datasets.open import open_dataset
from relicctl.data.decoding import BadImageError
from relicctl.errors import DataError

FILES = {f"{name}.jpg": os.urandom(100 + number) for number, name in enumerate(["a", "b/c", "b/d e"])}


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, files: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def contents(path: Path) -> dict[str, bytes]:
    container = open_container(str(path))
    return {name: container.read(os.fsencode(name), member) for name, member in list(container.iter_files())}


def refusal(path: Path) -> str:
    """The one member's reason why it cannot be read."""
    container = open_container(str(path))
    [(name, member)] = container.iter_files()
    with pytest.raises(BadImageError) as bad:
        container.read(os.fsencode(name), member)
    return bad.value.reason


# ---------------------------------------------------------------- what is packed comes out


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_zip_members_are_read_in_place(tmp_path, method):
    assert contents(write_zip(tmp_path / "a.zip", FILES, method)) == FILES


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_tar_members_are_read_in_place(tmp_path, form):
    long = {f"{'folder' * 12}/{'name' * 15}.png": b"x" * 2000}  # beyond the 100 bytes of the plain header
    assert contents(write_tar(tmp_path / "a.tar", FILES | long, form)) == FILES | long


def test_folders_are_read_in_place(tmp_path):
    for name, data in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert contents(tmp_path) == FILES


def test_a_zip_may_begin_with_something_else(tmp_path):
    path = write_zip(tmp_path / "a.zip", FILES)
    path.write_bytes(b"#!/bin/sh\n" * 50 + path.read_bytes())
    assert contents(path) == FILES


def test_the_kind_is_told_by_content(tmp_path):
    assert contents(write_tar(tmp_path / "a.data", FILES)) == FILES
    assert contents(write_zip(tmp_path / "b.data", FILES)) == FILES


# ---------------------------------------------------------------- processes and threads


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_what_the_parent_reads(tmp_path, method):
    files = {f"{n}.png": _png(n) for n in range(20)}
    for path in (write_zip(tmp_path / "a.zip", files), write_tar(tmp_path / "a.tar", files)):
        source = open_dataset(str(path))
        before = [source.load(index) for index in range(20)]  # the parent's file is open when workers start
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert all(map(np.array_equal, pool.map(source.load, range(20)), before))


def test_threads_share_more_archives_than_may_be_open(tmp_path):
    count = archives._MAX_OPEN_FILES + 10
    for number in range(count):
        write_tar(tmp_path / f"{number:03d}.tar", {"x.png": bytes([number])})
    source = open_dataset(f"{tmp_path}/{{000..{count - 1:03d}}}.tar")
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with ThreadPoolExecutor(8) as pool:
        order = np.random.default_rng(0).integers(0, count, 2000).tolist()
        assert list(pool.map(source.read, order)) == [bytes([number]) for number in order]
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + archives._MAX_OPEN_FILES


def test_a_replaced_archive_is_noticed(tmp_path):
    path = write_zip(tmp_path / "a.zip", FILES)
    container = open_container(str(path))
    name, member = next(iter(container.iter_files()))
    write_zip(path, {"other.jpg": b"longer than before" * 100})
    with pytest.raises(DataError, match="has changed"):
        container.read(os.fsencode(name), member)


def _png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (number, 2 * number, 3 * number)).save(buffer, "PNG")
    return buffer.getvalue()


# ---------------------------------------------------------------- names that lead astray

ESCAPES = ["../up.jpg", "/etc/passwd.jpg", "a/../../up.jpg", "C:/x.jpg", "..", "."]
UNWANTED = [".hidden.jpg", "a/._fork.jpg", ".git/x.jpg", "__MACOSX/x.jpg", "a/@eaDir/x.jpg/thumb.jpg", "#recycle/x.jpg"]


@pytest.mark.parametrize("write", [write_zip, write_tar])
def test_only_safe_names_are_listed(tmp_path, write):
    path = write(tmp_path / "a", dict.fromkeys([*ESCAPES, *UNWANTED], b"evil") | {"./b//ok.JPG": b"good"})
    container = open_container(str(path))
    [(name, member)] = container.iter_files()
    assert name == "b/ok.JPG"
    assert container.read(os.fsencode(name), member) == b"good"


def test_links_and_devices_in_archives_are_passed_over(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE):
            member = tarfile.TarInfo(f"kind{kind.decode()}.jpg")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for number, mode in enumerate((stat.S_IFLNK, stat.S_IFIFO, stat.S_IFBLK, stat.S_IFDIR)):
            member = zipfile.ZipInfo(f"{number}.jpg")
            member.external_attr = (mode | 0o644) << 16
            archive.writestr(member, "/etc/passwd")
    assert contents(tmp_path / "a.tar") == contents(tmp_path / "a.zip") == {}


def test_folders_follow_links_but_not_in_circles(tmp_path):
    (tmp_path / "pool/inner").mkdir(parents=True)
    (tmp_path / "pool/inner/x.jpg").write_bytes(b"x")
    (tmp_path / "root").mkdir()
    (tmp_path / "root/cats").symlink_to("../pool")
    (tmp_path / "pool/inner/up").symlink_to("../..")
    (tmp_path / "root/self.jpg").symlink_to("self.jpg")
    (tmp_path / "root/gone.jpg").symlink_to("nowhere")
    os.mkfifo(tmp_path / "root/pipe.jpg")
    container = open_container(str(tmp_path / "root"))
    found = dict(container.iter_files())
    assert "cats/inner/x.jpg" in found
    assert len(found) <= 6
    assert container.read(b"cats/inner/x.jpg", found["cats/inner/x.jpg"]) == b"x"
    assert "pipe.jpg" not in found
    with pytest.raises(BadImageError, match="cannot be read"):
        container.read(b"gone.jpg", found["gone.jpg"])


# ---------------------------------------------------------------- claims and damage


def test_a_claimed_size_beyond_the_limit_is_never_read(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_FILE_BYTES", 1000)
    bomb = {"x.jpg": bytes(1001)}
    for path in (
        write_zip(tmp_path / "s.zip", bomb),
        write_zip(tmp_path / "d.zip", bomb, zipfile.ZIP_DEFLATED),
        write_tar(tmp_path / "a.tar", bomb),
    ):
        assert refusal(path) == "claims 1001 bytes, more than the 1000 allowed"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/x.jpg").write_bytes(bomb["x.jpg"])
    assert "claims 1001 bytes" in refusal(tmp_path / "folder")


def rewrite(path: Path, old: bytes, new: bytes, count: int = -1) -> Path:
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, count))
    return path


def test_a_member_that_unpacks_to_more_than_it_claims_is_stopped(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"x.jpg": bytes(50_000_000)}, zipfile.ZIP_DEFLATED)
    rewrite(path, (50_000_000).to_bytes(4, "little"), (77).to_bytes(4, "little"))
    assert "77 bytes it claims" in refusal(path)


def test_a_flipped_bit_is_noticed(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"x.jpg": b"The picture."})
    assert "checksum" in refusal(rewrite(path, b"picture", b"pictura"))


def test_a_member_without_its_header_is_refused(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"x.jpg": b"data"})
    assert "damaged" in refusal(rewrite(path, b"PK\3\4", b"PK\3\3"))


def test_other_packings_and_passwords_are_named(tmp_path):
    path = write_zip(tmp_path / "a.zip", {"x.jpg": b"data" * 99}, zipfile.ZIP_LZMA)
    assert refusal(path) == "packed with LZMA"
    path = write_zip(tmp_path / "b.zip", {"x.jpg": b"data"})
    central = bytearray(path.read_bytes())
    central[central.index(b"PK\1\2") + 8] |= 1
    path.write_bytes(central)
    assert "encrypted" in refusal(path)


@pytest.mark.parametrize("write", [write_zip, write_tar])
@pytest.mark.parametrize("kept", [1000, 7168 + 100, 7168 + 2000, 60000])  # a member of the tar takes 3584 bytes
def test_a_cut_archive_is_refused(tmp_path, write, kept):
    path = write(tmp_path / "a", {f"{n}.jpg": bytes(3000) for n in range(20)})
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError, match="damaged"):
        contents(path)


def test_a_damaged_header_does_not_hide_the_rest_of_a_tar(tmp_path):
    path = write_tar(tmp_path / "a.tar", {f"{n}.jpg": bytes(3000) for n in range(20)})
    with pytest.raises(DataError, match="damaged"):
        contents(rewrite(path, b"9.jpg", b"9.jpX", 1))


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.jpg"])
@pytest.mark.parametrize("data", [b"no archive at all" * 100, b"PK\3\4 no zip", b""])
def test_what_is_no_archive_is_refused(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as error:
        list(open_container(str(tmp_path / name)).iter_files())
    assert "no zip or tar archive" in error.value.what


def test_a_compressed_tar_is_refused_with_the_way_out(tmp_path):
    path = write_tar(tmp_path / "a.tar", FILES)
    packed = tmp_path / "a.tar.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(DataError, match="gzip") as error:
        open_container(str(packed))
    assert "plain .tar" in error.value.fix


def test_a_pipe_is_no_archive(tmp_path):
    os.mkfifo(tmp_path / "a.zip")
    with pytest.raises(DataError, match="neither a folder nor a file"):
        open_container(str(tmp_path / "a.zip"))


@pytest.mark.parametrize("write", [write_zip, write_tar])
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damage_raises_nothing_but_our_errors(tmp_path, write, data):
    path = write(tmp_path / "a", {"a/x.jpg": b"some data", "b/y.jpg": b"other data"})
    damaged = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        damaged[data.draw(st.integers(0, min(len(damaged), 2600) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        container = open_container(str(path))
        entries = list(container.iter_files())
    except DataError:
        return
    for name, member in entries:
        assert ".." not in name.split("/")
        with contextlib.suppress(BadImageError):
            assert len(container.read(name.encode("utf-8", "surrogateescape"), member)) == member.size

"""Whatever bytes come: a value or one of our errors, soon, and without taking much memory."""

from __future__ import annotations

import json
import resource
import struct
import tarfile
import time
import zipfile
import zlib

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.hostile import (
    TARGETS,
    banks,
    read_archive,
    read_bank,
    read_checkpoint,
    read_config,
    read_weights,
    with_true_sums,
)

SECONDS, BYTES = 20, 400 << 20  # of one input at most, on a busy machine; of all inputs together

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # libraries', about the damage


@pytest.fixture(autouse=True)
def memory_is_bounded():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < BYTES


@pytest.fixture(scope="module")
def seeds():
    return {name: target.seeds() for name, target in TARGETS.items()}


@st.composite
def spoilt(draw, honest: list[bytes]) -> bytes:
    """An honest input with some places overwritten, cut out, doubled or filled with extreme numbers."""
    data = bytearray(draw(st.sampled_from(honest)))
    # headers lie at the start or, in a zip, at the end
    place = st.one_of(
        st.integers(0, min(len(data), 700)), st.integers(0, 200).map(lambda back: max(0, len(data) - back))
    )
    extreme = st.sampled_from(
        [b"\xff" * 4, b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7, b"\0\0\0\x80", b"99999999999"]
    )
    for _ in range(draw(st.integers(1, 4))):
        at, cut = draw(place), draw(st.integers(0, 8))
        data[at : at + cut] = draw(st.one_of(st.binary(max_size=8), extreme))
    if draw(st.integers(0, 5)) == 0:
        del data[draw(place) :]
    return bytes(data)


@pytest.mark.parametrize("name", TARGETS)
def test_damaged_files_raise_only_our_errors(seeds, name):
    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(spoilt(seeds[name]))
    def check(data: bytes) -> None:
        began = time.monotonic()
        TARGETS[name].read(data)
        assert time.monotonic() - began < SECONDS

    check()


@pytest.mark.parametrize("name", TARGETS)
def test_random_bytes_raise_only_our_errors(name):
    @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.binary(max_size=600))
    def check(data: bytes) -> None:
        TARGETS[name].read(data)

    check()


@settings(max_examples=60, deadline=None, database=None)
@given(st.text(max_size=80))
def test_random_config_text_raises_only_our_errors(text):
    read_config(text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize(
    "text",
    [
        "a: &a [x, x]\n" + "".join(f"{c}: &{c} [{', '.join(['*' + chr(ord(c) - 1)] * 9)}]\n" for c in "bcdefghi"),
        "a: !!python/object/apply:os.system ['true']",
        "a: !!python/name:os.system",
        "a: " + "[" * 20_000,
        "a: " + "{b: " * 20_000,
        "seed: " + "9" * 4000,
        "seed: 1e400",
        "optim.base_lr: .nan",
        "<<: {seed: 1}",
        "? [1, 2]\n: 3",
        "? {a: 1}\n: 3",
        "a: 2001-99-99",
        "a: 0x" + "f" * 3000,
        "a: !!binary '*'",
        "a: !!set {b, c}",
        "a: 1:" + ":59" * 2000,
        "seed: \x00",
        "\ufeffseed: 1",
    ],
    ids=range(18),
)
def test_known_attacks_on_yaml_are_refused_or_harmless(text):
    began = time.monotonic()
    read_config(text.encode())
    assert time.monotonic() - began < SECONDS


def test_an_archive_member_that_claims_ten_gigabytes_allocates_none(tmp_path):
    """In the directory of a zip, and in the header of a tar of that length without any blocks."""
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", b"x" * 4444)
    data = path.read_bytes().replace((4444).to_bytes(4, "little"), (0xFFFFFFF0).to_bytes(4, "little"))
    read_archive(data)

    entry = tarfile.TarInfo("a.jpg")
    entry.size = 10 << 30
    read_archive(entry.tobuf(tarfile.GNU_FORMAT))
    sparse = tmp_path / "sparse.tar"
    with open(sparse, "wb") as file:
        file.write(entry.tobuf(tarfile.GNU_FORMAT))
        file.truncate((10 << 30) + 4096)
    from relicctl.data.datasets.open import open_dataset
    from relicctl.data.decoding import BadImageError

    with pytest.raises(BadImageError, match="claims"):
        open_dataset(str(sparse)).read(0)


@pytest.mark.parametrize(
    "header",
    [
        {"w": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}},
        {"w": {"dtype": "F32", "shape": [1 << 62, 4], "data_offsets": [0, 0]}},
        {"w": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}},
        {"w": {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}},
        {"w": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}},
        {"__metadata__": {"format": "relicctl-checkpoint"}},
        {"__metadata__": {"format": "relicctl-checkpoint", "format_version": "x", "header": "{}", "checksum": "0"}},
        {"__metadata__": {"format": "relicctl-checkpoint", "format_version": "1", "header": "[]", "checksum": "0"}},
        {
            "__metadata__": {
                "format": "relicctl-checkpoint",
                "format_version": "1",
                "header": "[" * 9999,
                "checksum": "0",
            }
        },
        {"__metadata__": {"arch": "resnet18", "width": "1e9", "stem": "cifar", "padding": "same", "size": "1"}},
        {"__metadata__": {"arch": "resnet18", "width": "nan", "stem": "cifar", "padding": "same", "size": "1"}},
        {"__metadata__": {"arch": "resnet18", "width": "-1", "stem": "cifar", "padding": "same", "size": "x"}},
        {"__metadata__": {"arch": "../../x", "width": "1", "stem": "cifar", "padding": "same", "size": "32"}},
        {"__metadata__": 3},
        [],
    ],
    ids=range(15),
)
def test_safetensors_headers_are_validated(header):
    text = json.dumps(header).encode()
    for data in (struct.pack("<Q", len(text)) + text + bytes(4), struct.pack("<Q", 1 << 60) + text):
        read_checkpoint(data)
        read_weights(data)


@pytest.mark.parametrize(
    "claim",
    [
        {"count": 1 << 40}, {"count": 0}, {"count": -8}, {"count": "8"}, {"count": None}, {"side": 1 << 20},
        {"side": 0}, {"side": 127}, {"side": 1.5}, {"tables_crc": None}, {"fingerprint": 3}, {"made_by": None},
        {"sha256": []},
    ],
    ids=str,
)  # fmt: skip
def test_mask_bank_headers_are_validated(claim):
    """With checksums that fit; and rows that point beyond the masks."""
    whole = banks()[1]
    length = struct.unpack_from("<I", whole, 12)[0]
    header = json.loads(whole[20 : 20 + length]) | claim
    text = json.dumps(header).encode()
    prefix = whole[:12] + struct.pack("<II", len(text), zlib.crc32(text)) + text
    read_bank(prefix.ljust(4096, b"\0") + whole[4096:])
    rows = 4096 + 16 * 8
    read_bank(with_true_sums(whole[:rows] + b"\xff" * 32 + whole[rows + 32 :]))

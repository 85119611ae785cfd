"""Data that break: pictures of every bad kind, a folder that goes away, a process that reads and dies."""

from __future__ import annotations

import io
import os
import signal
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from relicctl.data.decoding import BadImageError, decode_rgb
from tests.helpers.faults import command, in_a_process, two_sentences

GRADIENT = np.add.outer(np.arange(24) * 5, np.arange(32) * 4).astype(np.uint8)
PHOTO = Image.fromarray(np.stack([GRADIENT, GRADIENT.T.copy().reshape(24, 32), 255 - GRADIENT], axis=2))


def encoded(image: Image.Image = PHOTO, form: str = "JPEG", **how) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **how)
    return file.getvalue()


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, data: bytes, interlaced: int = 0, *more: bytes) -> bytes:
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, interlaced))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(more) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def with_a_wrong_checksum(data: bytes) -> bytes:
    at = data.index(b"IDAT") + 12
    return data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :]


def text_bomb() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("bomb", "0" * 50_000_000, zip=True)
    return info


JPEG, PNG, GIF, WEBP, TIFF, BMP = (encoded(form=form) for form in ("JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"))
ROW = b"\0" + bytes(32 * 3)
REPORTED = {
    "empty.jpg": b"",
    "zeros.jpg": bytes(5000),
    "text.jpg": b"This is not a picture.\n" * 20,
    "page.jpg": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "drawing.png": b"<svg xmlns='http://www.w3.org/2000/svg'><rect width='9' height='9'/></svg>",
    "document.jpg": b"%PDF-1.7\n" + bytes(500),
    "program.png": b"\x7fELF" + bytes(500),
    "magic-alone.jpg": b"\xff\xd8\xff",
    "cut-in-the-header.jpg": JPEG[:100],
    "cut-in-the-middle.jpg": JPEG[: len(JPEG) * 2 // 3],
    "cut-in-the-header.png": PNG[:20],
    "cut-in-the-middle.png": PNG[: len(PNG) // 2],
    "cut.gif": GIF[: len(GIF) // 2],
    "cut.webp": WEBP[: len(WEBP) // 2],
    "cut.tif": TIFF[: len(TIFF) // 2],
    "cut.bmp": BMP[: len(BMP) // 2],
    "bomb.png": png(40_000, 25_000, zlib.compress(bytes(1000))),  # claims 10^9 pixels
    "no-pixels.png": png(0, 0, zlib.compress(b"")),
    "interlaced-and-broken.png": png(32, 24, zlib.compress(ROW * 3), 1),
    "wrong-checksum.png": with_a_wrong_checksum(PNG),
    "not-deflated.png": png(32, 24, b"no zlib stream"),
    "no-height.jpg": JPEG[: JPEG.index(b"\xff\xc0") + 5] + b"\0\0" + JPEG[JPEG.index(b"\xff\xc0") + 7 :],
}
DECODED = {
    "text-bomb.png": encoded(form="PNG", pnginfo=text_bomb()),  # the text is not read
    "cmyk.jpg": encoded(PHOTO.convert("CMYK")),
    "grey.jpg": encoded(PHOTO.convert("L")),
    "progressive.jpg": encoded(progressive=True),
    "sixteen-bits.png": encoded(Image.fromarray(GRADIENT.astype(np.uint16) * 257), "PNG"),
    "palette.png": encoded(PHOTO.convert("P"), "PNG"),
    "one-bit.png": encoded(PHOTO.convert("1"), "PNG"),
    "transparent.png": encoded(PHOTO.convert("RGBA"), "PNG"),
    "floats.tif": encoded(Image.fromarray(GRADIENT.astype(np.float32) / 255), "TIFF"),
    "animated.gif": encoded(form="GIF", save_all=True, append_images=[PHOTO.rotate(90)] * 3),
    "animated.webp": encoded(form="WEBP", save_all=True, append_images=[PHOTO.rotate(90)] * 3),
    "animated.png": encoded(form="PNG", save_all=True, append_images=[PHOTO.rotate(90)] * 3),
    "really-a-png.jpg": PNG,
    "really-a-jpeg.gif": JPEG,
    "garbage-for-exif.jpg": encoded(exif=b"Exif\0\0" + bytes(range(200))),
    "broken-profile.jpg": encoded(icc_profile=b"no profile" * 50),
    "broken-profile.png": encoded(form="PNG", icc_profile=b"no profile" * 50),
    "rubbish-behind.jpg": JPEG + os.urandom(3000),
    "too-few-rows.png": png(32, 24, zlib.compress(ROW * 3)),  # whole for zlib; what is missing is black
    "one-pixel.png": encoded(PHOTO.resize((1, 1)), "PNG"),
    "a-line.png": encoded(PHOTO.resize((3000, 1)), "PNG"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the damage
@pytest.mark.parametrize("name", [*REPORTED, *DECODED])
def test_every_kind_of_picture_is_decoded_or_reported(name):
    if name in DECODED:
        assert decode_rgb(DECODED[name]).shape[2] == 3
    else:
        with pytest.raises(BadImageError) as bad:
            decode_rgb(REPORTED[name])
        assert bad.value.reason


@pytest.fixture
def photos(tmp_path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(16):
        PHOTO.rotate(number * 20).save(folder / f"{number:02d}.png")
    return folder


def test_a_run_over_corrupt_images_lists_them_and_continues(tiny, photos, tmp_path):
    """Beside them what only a folder can hold: a folder named like a picture, a pipe, links that lead nowhere."""
    for name, data in (REPORTED | DECODED).items():
        (photos / name).write_bytes(data)
    (photos / "folder.jpg").mkdir()
    os.mkfifo(photos / "pipe.jpg")
    (photos / "nowhere.jpg").symlink_to("gone.jpg")
    (photos / "circle.jpg").symlink_to("circle.jpg")
    run, log = tmp_path / "run", tmp_path / "log"
    sets = ("--data", str(photos), "--workers", "1", "--set", "data.cache=none", "--set", "data.max_corrupt_fraction=1")
    ended = in_a_process(command(tiny, run, *sets, "--set", "optim.epochs=2"), log=log)
    assert ended.code == 0, ended.err
    listed = {line.split("\t")[0] for line in (run / "bad_images.txt").read_text().splitlines()}
    assert listed - {"nowhere.jpg", "circle.jpg"} == set(REPORTED)
    strict = in_a_process(command(tiny, tmp_path / "strict", *sets, "--set", "data.max_corrupt_fraction=0.01"), log=log)
    assert strict.code == 3
    assert two_sentences(strict.err)


def _take_away() -> None:
    os.rename(os.environ["PHOTOS"], os.environ["PHOTOS"] + "-elsewhere")


def at_step_4_the_folder_is_gone() -> None:
    _at_step_4(_take_away)


def at_step_4_the_folder_is_empty() -> None:
    """As when a disk is unmounted, and the place where it was stays."""

    def unmount() -> None:
        _take_away()
        os.mkdir(os.environ["PHOTOS"])

    _at_step_4(unmount)


def at_step_4_a_reader_is_killed() -> None:
    def kill() -> None:
        import multiprocessing

        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)

    _at_step_4(kill)


def _at_step_4(fault) -> None:
    from relicctl.pretraining.task import PretrainTask

    genuine = PretrainTask.after_step

    def after_step(self: PretrainTask, step: int) -> None:
        if step == 4:
            fault()
        genuine(self, step)

    PretrainTask.after_step = after_step  # type: ignore[method-assign]


@pytest.mark.parametrize("fault", ["at_step_4_the_folder_is_gone", "at_step_4_the_folder_is_empty"])
def test_a_vanished_data_folder_costs_only_the_steps_since_the_last_checkpoint(tiny, photos, tmp_path, fault):
    """And is not taken for a thousand bad images: those would be held against the run when the folder is back."""
    run, log = tmp_path / "run", tmp_path / "log"
    line = command(tiny, run, "--data", str(photos), "--set", "data.cache=none", "--workers", "1")
    line += ["--set", "optim.epochs=12"]
    ended = in_a_process(line, f"{__name__}.{fault}", log, PHOTOS=str(photos))
    assert ended.code == 3
    assert two_sentences(ended.err)
    assert "photos" in ended.err
    assert not (run / "bad_images.txt").exists()
    if photos.exists():
        photos.rmdir()
    (photos.parent / "photos-elsewhere").rename(photos)
    again = in_a_process(line, log=log)
    assert again.code == 0, again.err


def test_a_killed_data_worker_ends_the_run_with_one_sentence(tiny, photos, tmp_path):
    run, log = tmp_path / "run", tmp_path / "log"
    line = command(tiny, run, "--data", str(photos), "--set", "data.cache=none", "--workers", "1")
    line += ["--set", "optim.epochs=12"]
    ended = in_a_process(line, f"{__name__}.at_step_4_a_reader_is_killed", log)
    assert ended.code == 1
    assert two_sentences(ended.err)
    assert "A data worker died" in ended.err
    assert "--resume" in ended.err
    again = in_a_process(line, log=log)
    assert again.code == 0, again.err

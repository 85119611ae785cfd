from __future__ import annotations

import io
import pickle
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from relicctl.data import decoding
from relicctl.data.decoding import BadImageError, decode_rgb

LOSSLESS = {
    "PNG": {},
    "WEBP": {"lossless": True, "exact": True},
    "BMP": {},
    "TIFF": {},
}


def encode(image: Image.Image, form: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    """Random but smooth, so that lossy formats stay close; taller than wide, so that turns show."""
    coarse = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)
    return np.array(Image.fromarray(coarse).resize((40, 60), Image.Resampling.BICUBIC))


# ---------------------------------------------------------------- what comes out is what was put in


@pytest.mark.parametrize("form", LOSSLESS)
def test_lossless_formats_give_the_exact_pixels(pixels, form):
    decoded = decode_rgb(encode(Image.fromarray(pixels), form, **LOSSLESS[form]))
    assert np.array_equal(decoded, pixels)
    assert decoded.dtype == np.uint8
    assert decoded.flags.c_contiguous
    assert decoded.flags.writeable


@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_gives_nearly_the_pixels(pixels, progressive):
    data = encode(Image.fromarray(pixels), "JPEG", quality=100, subsampling=0, progressive=progressive)
    assert np.abs(decode_rgb(data).astype(int) - pixels).max() <= 4


def test_gif_gives_its_first_frame():
    red, blue = (Image.new("RGB", (8, 6), colour) for colour in ("red", "blue"))
    data = encode(red, "GIF", save_all=True, append_images=[blue])
    assert np.array_equal(decode_rgb(data), np.array(red))


# ---------------------------------------------------------------- every mode becomes RGB


def test_grey_and_bilevel(pixels):
    grey = pixels[..., 0]
    assert np.array_equal(decode_rgb(encode(Image.fromarray(grey), "PNG")), np.stack([grey] * 3, -1))
    dark = Image.fromarray(grey > 127)
    assert dark.mode == "1"
    assert np.array_equal(decode_rgb(encode(dark, "PNG")), np.stack([(grey > 127) * np.uint8(255)] * 3, -1))


@pytest.mark.parametrize(("mode", "form"), [("LA", "PNG"), ("RGBA", "PNG"), ("RGBA", "WEBP")])
def test_transparency_lies_over_white(pixels, mode, form):
    alpha = np.linspace(0, 255, 60 * 40).reshape(60, 40, 1).round().astype(np.uint8)
    colour = pixels if mode == "RGBA" else pixels[..., :1]
    image = Image.fromarray(np.concatenate([colour, alpha], -1), mode=None)
    assert image.mode == mode
    expected = colour * (alpha / 255.0) + 255 * (1 - alpha / 255.0)
    decoded = decode_rgb(encode(image, form, **LOSSLESS[form])).astype(float)
    assert np.abs(decoded - expected).max() <= 1


def test_palettes_with_and_without_transparency(pixels):
    palette = Image.fromarray(pixels).quantize(16)
    plain = np.array(palette.convert("RGB"))
    for form in ("PNG", "GIF", "BMP"):
        assert np.array_equal(decode_rgb(encode(palette, form)), plain)
    expected = np.where((np.array(palette) == 3)[..., None], 255, plain)
    assert (expected != plain).any()
    for form in ("PNG", "GIF"):
        assert np.array_equal(decode_rgb(encode(palette, form, transparency=3)), expected)


def test_cmyk_jpeg_is_not_inverted(pixels):
    """Such files hold 255 - ink; what is light must stay light."""
    data = encode(Image.fromarray(pixels).convert("CMYK"), "JPEG", quality=95)
    assert Image.open(io.BytesIO(data)).mode == "CMYK"
    assert np.abs(decode_rgb(data).astype(int) - pixels).mean() < 3


def grey_of(data: bytes) -> np.ndarray:
    decoded = decode_rgb(data)
    assert np.array_equal(decoded[..., 0], decoded[..., 1])
    assert np.array_equal(decoded[..., 0], decoded[..., 2])
    return decoded[..., 0]


@pytest.mark.parametrize("top", [65535, 200])
@pytest.mark.parametrize("form", ["PNG", "TIFF"])
def test_16_bits_are_scaled_not_cut(top, form):
    values = np.linspace(0, top, 256).reshape(16, 16).astype(np.uint16)
    decoded = grey_of(encode(Image.fromarray(values), form))
    assert np.array_equal(decoded, np.rint(values / 257.0))


@pytest.mark.parametrize(("kind", "top", "white"), [
    (np.float32, 1.0, 1), (np.float32, 254.5, 255), (np.float32, 60000, 65535), (np.float32, 1e6, 1e6),
    (np.int32, 250, 255), (np.int32, 60000, 65535), (np.int32, 2**30, 2**30),
])  # fmt: skip
def test_32_bits_are_scaled_by_the_range_they_use(kind, top, white):
    values = np.linspace(0, top, 256).reshape(16, 16).astype(kind)
    decoded = grey_of(encode(Image.fromarray(values), "TIFF"))
    assert np.abs(decoded - values.astype(np.float64) * 255 / white).max() <= 0.5 + 1e-6


def test_no_number_is_black():
    values = np.array([[np.nan, np.inf], [-np.inf, 1.0]], dtype=np.float32)
    assert np.array_equal(grey_of(encode(Image.fromarray(values), "TIFF")), [[0, 0], [0, 255]])


# ---------------------------------------------------------------- orientation

STORED_AS = {  # how a camera that held the sensor so has stored the upright picture
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
    8: lambda a: np.rot90(a, -1),
}


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", STORED_AS)
def test_pictures_stand_upright(pixels, form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED_AS[orientation](pixels)))
    decoded = decode_rgb(encode(stored, form, exif=exif, **LOSSLESS.get(form, {"quality": 100, "subsampling": 0})))
    assert decoded.shape == pixels.shape
    assert np.abs(decoded.astype(int) - pixels).max() <= (4 if form == "JPEG" else 0)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
def test_damaged_metadata_do_not_cost_the_picture(pixels, exif):
    decoded = decode_rgb(encode(Image.fromarray(pixels), "JPEG", quality=95, exif=exif))
    assert np.abs(decoded.astype(int) - pixels).mean() < 3


# ---------------------------------------------------------------- bad files


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_a_cut_file_is_refused_or_whole(pixels, form):
    """Never a half-grey picture: what is missing is either beyond the pixels or fatal."""
    data = encode(Image.fromarray(pixels), form)
    whole = decode_rgb(data)
    refused = 0
    for kept in [*range(0, len(data) - 40, max(1, len(data) // 40)), *range(len(data) - 40, len(data))]:
        try:
            assert np.array_equal(decode_rgb(data[:kept]), whole)
        except BadImageError:
            refused += 1
    assert refused >= 40


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the damage
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_damage_raises_nothing_but_bad_image(data):
    form = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"]))
    source = encode(Image.linear_gradient("L").resize((16, 16)).convert("RGB"), form)
    damaged = bytearray(source)
    for _ in range(data.draw(st.integers(1, 8))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        decoded = decode_rgb(bytes(damaged))
    except BadImageError:
        return
    assert decoded.dtype == np.uint8
    assert decoded.shape[2] == 3


@pytest.mark.parametrize("data", [b"", b"no image", b"GIF89a", b"\xff\xd8\xff", b"%PDF-1.4", b"P6 1 1 255\n123"])
def test_what_is_no_image_is_refused_with_a_stable_reason(data):
    reasons = set()
    for _ in range(2):
        with pytest.raises(BadImageError) as bad:
            decode_rgb(data)
        reasons.add(bad.value.reason)
    assert len(reasons) == 1
    assert " at 0x" not in reasons.pop()


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    packed = zlib.compress(bytes(1000))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def test_bombs_are_refused_by_their_header(pixels, monkeypatch):
    with pytest.raises(BadImageError, match="pixels"):
        decode_rgb(png_claiming(60000, 60000))
    data = encode(Image.fromarray(pixels), "PNG")
    monkeypatch.setattr(decoding, "MAX_PIXELS", 60 * 40)
    assert decode_rgb(data).shape == (60, 40, 3)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 60 * 40 - 1)
    with pytest.raises(BadImageError, match="40 x 60 pixels"):
        decode_rgb(data)


def test_a_reason_survives_the_way_from_a_worker():
    assert pickle.loads(pickle.dumps(BadImageError("cut short"))).reason == "cut short"


@pytest.mark.realdata
def test_real_photos_decode_as_pillow_does(realdata_dir):
    from relicctl.data.datasets.open import open_dataset

    source = open_dataset(str(realdata_dir / "imagenette128-val.zip"))
    for index in range(0, len(source), 400):
        reference = Image.open(io.BytesIO(source.read(index))).convert("RGB")
        assert np.array_equal(source.load(index), np.asarray(reference))

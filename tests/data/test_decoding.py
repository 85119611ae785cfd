from __future__ import annotations

import io
import pickle
import struct
import zlib

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from relicctl.config.base import DecodingConfig
from relicctl.data import decoding
from relicctl.data.decoding import (
    BadImageError,
    BadImages,
    Decoder,
    decode_image,
    decode_rgb,
    read_upright_size,
    read_values,
)
from relicctl.errors import DataError

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


TWELVE_BITS = np.linspace(0, 4095, 256).reshape(16, 16).astype(np.uint16)


@pytest.mark.parametrize(
    ("kind", "form"), [(np.uint16, "PNG"), (np.uint16, "TIFF"), (np.int32, "TIFF"), (np.float32, "TIFF")]
)
def test_a_white_point_spreads_the_values_it_bounds_over_all_grey_levels(kind, form):
    data = encode(Image.fromarray(TWELVE_BITS.astype(kind)), form)
    decoded = decode_rgb(data, white_point=4095)
    assert np.array_equal(decoded, np.repeat(np.rint(TWELVE_BITS * (255 / 4095))[..., None], 3, -1))
    assert len(np.unique(decoded)) == 256
    assert decode_rgb(data, white_point=2047.5).max() == 255  # what is brighter is white
    grey = encode(Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)), "PNG")
    assert np.array_equal(decode_rgb(grey, white_point=4095), decode_rgb(grey))  # 8 bits have their own


@pytest.mark.parametrize("suffix", [".png", ".tif", "deflated.tif"])
@pytest.mark.parametrize("channels", [3, 4])
def test_a_white_point_holds_for_16_bits_per_colour(channels, suffix):
    values = np.random.default_rng(0).integers(0, 4096, (9, 7, channels), np.uint16)
    compression = [cv2.IMWRITE_TIFF_COMPRESSION, 8 if suffix.startswith("deflated") else 1]
    in_opencvs_order = values[..., [2, 1, 0, 3][:channels]]
    written, data = cv2.imencode(suffix[-4:], in_opencvs_order, compression if suffix.endswith("tif") else [])
    assert written
    decoded = decode_rgb(data.tobytes(), white_point=4095, keep_alpha=True)
    expected = np.rint(values[..., :3] * (255 / 4095))
    if channels == 4:
        alpha = (values[..., 3:] >> 8) / 255
        assert np.array_equal(decoded[..., 3], values[..., 3] >> 8)
        assert np.abs(decoded[..., :3] - (expected * alpha + 255 * (1 - alpha))).max() <= 1
    else:
        assert np.array_equal(decoded, expected)
        assert decode_rgb(data.tobytes()).max() < 16


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


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", STORED_AS)
def test_pictures_stand_upright(pixels, form, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(np.ascontiguousarray(STORED_AS[orientation](pixels)))
    data = encode(stored, form, exif=exif, **LOSSLESS.get(form, {"quality": 100, "subsampling": 0}))
    decoded = decode_rgb(data)
    assert decode_image(data, read_upright_size) == decoded.shape[:2] == pixels.shape[:2]
    assert np.array_equal(decode_image(data, read_values), decoded)
    assert np.abs(decoded.astype(int) - pixels).max() <= (4 if form == "JPEG" else 0)


@pytest.mark.parametrize("by_tag", [False, True])
def test_a_tiff_with_xmp_stands_upright_too(pixels, by_tag):
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    tags = {700: xmp} | ({0x0112: 6} if by_tag else {})
    data = encode(Image.fromarray(np.ascontiguousarray(STORED_AS[6](pixels))), "TIFF", tiffinfo=tags)
    assert np.array_equal(decode_rgb(data), pixels)
    assert decode_image(data, read_upright_size) == pixels.shape[:2]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("exif", [b"Exif\0\0garbage", b"Exif\0\0II*\0\x08\0\0\0\xff\xff"])
def test_damaged_metadata_do_not_cost_the_picture(pixels, exif):
    decoded = decode_rgb(encode(Image.fromarray(pixels), "JPEG", quality=95, exif=exif))
    assert np.abs(decoded.astype(int) - pixels).mean() < 3


def with_text(data: bytes, at_the_end: bool) -> bytes:
    """A PNG with a text that is longer than Pillow reads."""
    body = b"comment\0\0" + zlib.compress(bytes(3_000_000))
    text = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    at = data.rindex(b"IEND") - 4 if at_the_end else data.index(b"IDAT") - 4
    return data[:at] + text + data[at:]


@pytest.mark.parametrize("at_the_end", [False, True])
def test_a_long_text_does_not_cost_the_picture_nor_its_orientation(pixels, at_the_end):
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(np.ascontiguousarray(STORED_AS[6](pixels)))
    data = with_text(encode(stored, "PNG", exif=exif), at_the_end)
    with pytest.raises(ValueError, match="MAX_TEXT_CHUNK"):
        Image.open(io.BytesIO(data)).load()
    assert np.array_equal(decode_rgb(data), pixels)


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
    form = data.draw(st.sampled_from(["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000"]))
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


@pytest.mark.parametrize("data", [b"", b"no image", b"GIF89a", b"\xff\xd8\xff", b"%PDF-1.4", b"P6 1 1 255\n12"])
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


def test_bombs_are_refused_by_their_header(pixels):
    with pytest.raises(BadImageError, match="pixels"):
        decode_rgb(png_claiming(60000, 60000))
    data = encode(Image.fromarray(pixels), "PNG")
    assert decode_rgb(data, max_pixels=60 * 40).shape == (60, 40, 3)
    with pytest.raises(BadImageError, match=r"40 x 60 pixels.*data\.decoding\.max_pixels"):
        decode_rgb(data, max_pixels=60 * 40 - 1)


def test_a_raised_limit_of_pixels_is_pillows_too(pixels, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    data = encode(Image.fromarray(pixels), "PNG")
    with pytest.raises(BadImageError, match=r"data\.decoding\.max_pixels"):
        decode_rgb(data, max_pixels=200)
    assert np.array_equal(decode_rgb(data, max_pixels=60 * 40), pixels)


def test_the_settings_of_a_config_are_the_decoders():
    assert Decoder(**DecodingConfig().model_dump()) == Decoder()


def test_no_warning_of_pillow_is_shown(pixels, monkeypatch, recwarn):
    decoding._silence_pillow.cache_clear()  # the filter is set once in a process, and pytest removes it
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 60 * 40 - 1)
    large = encode(Image.fromarray(pixels), "PNG")
    damaged = encode(Image.fromarray(pixels), "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    with pytest.warns(Image.DecompressionBombWarning):
        Image.open(io.BytesIO(large))
    recwarn.clear()
    for data in (large, damaged):
        decode_rgb(data)
    assert not recwarn.list


def test_a_reason_survives_the_way_from_a_worker():
    assert pickle.loads(pickle.dumps(BadImageError("cut short"))).reason == "cut short"


@pytest.mark.realdata
def test_real_photos_decode_as_pillow_does(realdata_dir):
    from relicctl.data.datasets.open import open_dataset

    source = open_dataset(str(realdata_dir / "imagenette128-val.zip"))
    for index in range(0, len(source), 400):
        reference = Image.open(io.BytesIO(source.read(index))).convert("RGB")
        assert np.array_equal(source.load(index), np.asarray(reference))


@pytest.mark.parametrize(
    ("size", "limit", "allowed"), [(60, 0.01, 3), (1000, 0.01, 10), (1000, 0.0, 0), (60, 0.0, 0), (60, 0.5, 30)]
)
def test_a_few_bad_images_are_allowed_among_few_unless_none_are(size: int, limit: float, allowed: int) -> None:
    bad = BadImages(size, limit, listed_in="runs/x/bad_images.txt")
    for number in range(allowed):
        bad.add(f"{number}.jpg", "cut")
    with pytest.raises(DataError, match=f"{allowed + 1} of {size} images") as error:
        bad.add("one more.jpg", "cut")
    assert "runs/x/bad_images.txt" in error.value.fix
    enough = float(error.value.fix.rpartition("=")[2].rstrip("."))
    assert limit < enough <= 1
    BadImages(size, enough, seen=set(map(str, range(allowed)))).add("one more.jpg", "cut")  # what it says is enough

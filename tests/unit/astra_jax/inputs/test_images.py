"""Preprocessing: the numbers of transformers' own Pillow processors, and errors that name file and field."""

import contextlib
import dataclasses
import importlib
import io
import re
import zlib

import numpy as np
import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from astra_jax.errors import AstraError
from astra_jax.inputs import images
from astra_jax.inputs.images import ImageProcessor, decode_image

VIT = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
    "image_processor_type": "ViTImageProcessor",
    "resample": 2,
    "rescale_factor": 1 / 255,
    "size": {"height": 24, "width": 32},
}
CLIP = VIT | {
    "image_processor_type": "CLIPImageProcessor",
    "resample": 3,
    "size": {"shortest_edge": 25},
    "do_center_crop": True,
    "crop_size": {"height": 24, "width": 20},
}
DEIT = VIT | {
    "image_processor_type": "DeiTImageProcessor",
    "resample": 3,
    "size": {"height": 36, "width": 37},
    "do_center_crop": True,
    "crop_size": {"height": 32, "width": 30},
}


def noise(height: int, width: int, channels: int = 3) -> np.ndarray:
    return np.random.default_rng(height * width).integers(0, 256, (height, width, channels), dtype=np.uint8)


def pictures() -> dict[str, Image.Image]:
    """One picture of every mode that Pillow opens from an 8-bit file."""
    colour = Image.fromarray(noise(40, 50))
    palette = colour.quantize(16)
    transparent = palette.copy()
    transparent.info["transparency"] = 3
    rgba = Image.fromarray(noise(40, 50, 4))
    modes = {mode: colour.convert(mode) for mode in ("RGB", "L", "1", "CMYK", "YCbCr")}
    return modes | {"P": palette, "P transparent": transparent, "RGBA": rgba, "LA": rgba.convert("LA")}


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def reference(config: dict, images: list[Image.Image]) -> np.ndarray:
    """What transformers computes, as NHWC."""
    family = config["image_processor_type"].removesuffix("ImageProcessor")
    module = importlib.import_module(f"transformers.models.{family.lower()}.image_processing_pil_{family.lower()}")
    kind = getattr(module, f"{family}ImageProcessorPil")
    values = {key: value for key, value in config.items() if key != "image_processor_type"}
    processed = kind(**values | {"do_convert_rgb": True})(images, return_tensors="np")["pixel_values"]
    return processed.transpose(0, 2, 3, 1)


@pytest.mark.parametrize(
    "config",
    [VIT, DEIT]
    + [VIT | {"resample": resample} for resample in (0, 1, 3, 4, 5)]
    + [CLIP, CLIP | {"image_processor_type": "BitImageProcessor", "size": 24, "crop_size": 24}]
    + [VIT | {"image_processor_type": "SiglipImageProcessor", "resample": 3}]
    + [VIT | {"do_normalize": False}, VIT | {"size": {"height": 40, "width": 50}, "do_resize": False}],
    ids=lambda c: f"{c['image_processor_type']}-{c['resample']}-{c['do_normalize']}-{c['do_resize']}",
)
def test_same_numbers_as_transformers(config):
    images = list(pictures().values())
    result = ImageProcessor.from_hf(config)(images)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, reference(config, images), rtol=0, atol=1e-6)


def test_pixels_that_are_not_rescaled():
    config = VIT | {"do_rescale": False, "image_mean": [127.5, 110, 100], "image_std": [60, 61, 62]}
    images = [pictures()["RGB"]]
    np.testing.assert_allclose(ImageProcessor.from_hf(config)(images), reference(config, images), rtol=1e-6, atol=1e-6)


def test_arrays_are_read_like_pictures():
    processor = ImageProcessor(size=(16, 20))
    grey, colour, rgba = noise(30, 31, 1), noise(30, 31), noise(30, 31, 4)
    arrays = processor([grey, grey[:, :, 0], colour, rgba, colour[:, ::-1]])
    pillow = [Image.fromarray(a) for a in (grey[:, :, 0], grey[:, :, 0], colour, rgba, colour[:, ::-1].copy())]
    assert arrays.shape == (5, 16, 20, 3)
    np.testing.assert_array_equal(arrays, processor(pillow))


def test_one_channel_is_grey():
    processor = ImageProcessor(size=(8, 9), image_mean=(0.5,), image_std=(0.25,))
    image = Image.fromarray(noise(8, 9))
    expected = (np.asarray(image.convert("L"), np.float64) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(processor([image])[0, :, :, 0], expected, atol=1e-6)
    assert ImageProcessor.from_hf(processor.to_hf()) == processor


def test_no_images_is_an_empty_batch():
    assert ImageProcessor(size=(4, 6))([]).shape == (0, 4, 6, 3)


sides = st.integers(1, 48)


@given(
    source=st.tuples(sides, sides),
    target=st.tuples(sides, sides),
    resample=st.integers(0, 5),
    means=st.lists(st.floats(0, 1), min_size=3, max_size=3),
    stds=st.lists(st.floats(0.1, 1), min_size=3, max_size=3),
)
def test_any_size_and_statistics(source, target, resample, means, stds):
    processor = ImageProcessor(size=target, resample=resample, image_mean=tuple(means), image_std=tuple(stds))
    assert ImageProcessor.from_hf(processor.to_hf()) == processor
    image = Image.fromarray(noise(*source))
    resized = np.asarray(image.resize(target[::-1], resample), np.float64)
    np.testing.assert_allclose(processor([image])[0], (resized / 255 - means) / stds, rtol=1e-6, atol=2e-6)


def test_forms_of_a_size():
    assert ImageProcessor.from_hf({"size": 48}).size == (48, 48)
    assert ImageProcessor.from_hf({"size": [48, 32]}).size == (48, 32)
    assert ImageProcessor.from_hf({"size": {"height": 48, "width": 32, "shortest_edge": None}}).size == (48, 32)


def test_old_deit_file_crops_the_centre():
    # facebook/deit-*-patch16-224 as on the hub
    processor = ImageProcessor.from_hf(
        {"crop_size": 224, "do_center_crop": True, "feature_extractor_type": "DeiTFeatureExtractor", "size": 256}
    )
    assert (processor.size, processor.height, processor.width) == ((256, 256), 224, 224)
    assert ImageProcessor.from_hf(processor.to_hf()) == processor


def test_round_trip_and_fields_without_meaning():
    processor = ImageProcessor.from_hf(VIT | {"do_convert_rgb": None, "do_pad": False, "processor_class": None})
    assert processor.to_hf() == VIT | {"do_convert_rgb": True}


def test_the_shorter_side_of_high_and_wide_pictures():
    """And what CLIP's first files on the hub say; a strip would become too large."""
    processor = ImageProcessor.from_hf({"feature_extractor_type": "CLIPFeatureExtractor", "size": 24, "crop_size": 20})
    assert (processor.size, processor.crop_size, processor.resample) == (24, (20, 20), 3)
    assert ImageProcessor.from_hf(processor.to_hf()) == processor
    pictures = [Image.fromarray(noise(*sides)) for sides in ((31, 77), (77, 31), (24, 24), (20, 21))]
    expected = reference(CLIP | {"size": {"shortest_edge": 24}, "crop_size": 20}, pictures)
    same = dataclasses.replace(processor, image_mean=tuple(CLIP["image_mean"]), image_std=tuple(CLIP["image_std"]))
    np.testing.assert_allclose(same(pictures), expected, rtol=0, atol=1e-6)
    with pytest.raises(AstraError, match=r"an image is 1x200000 .* more than 89,478,485 pixels: cut it"):
        processor([Image.new("L", (200_000, 1))])


@pytest.mark.parametrize("family", ["ViT", "DeiT", "CLIP", "Bit", "Siglip"])
def test_defaults_are_those_of_transformers(family):
    ours = ImageProcessor.from_hf({"image_processor_type": f"{family}ImageProcessor"})
    theirs = getattr(transformers, f"{family}ImageProcessor")()
    assert ours == ImageProcessor.from_hf(theirs.to_dict())


@pytest.mark.parametrize(
    "field, value",
    [
        ("size", {"shortest_edge": 224}),
        ("size", {"height": 224}),
        ("size", 0),
        ("size", True),
        ("size", "224"),
        ("size", [224, 224, 3]),
        ("resample", 9),
        ("resample", "bicubic"),
        ("image_mean", [0.5, 0.5]),
        ("image_mean", [0.5]),
        ("image_mean", ["a", "b", "c"]),
        ("image_std", [0.5, 0.0, 0.5]),
        ("image_std", [0.5, float("nan"), 0.5]),
        ("rescale_factor", float("inf")),
        ("do_pad", True),
        ("do_flip_channel_order", True),
        ("do_resize", "yes"),
        ("size", {"shortest_edge": 224, "longest_edge": 300}),
        ("image_processor_type", "LevitImageProcessor"),
    ],
)
def test_error_names_file_and_field(field, value):
    with pytest.raises(AstraError) as error:
        ImageProcessor.from_hf(VIT | {field: value})
    message = str(error.value)
    assert message.startswith("preprocessor_config.json: ") and field in message and "\n" not in message


def test_crop_larger_than_the_picture():
    with pytest.raises(AstraError, match="crop_size .* is larger than size"):
        ImageProcessor.from_hf(DEIT | {"crop_size": 40})


@pytest.mark.parametrize(
    "image, message",
    [
        (np.zeros((4, 4, 3), np.float32), "array of float32"),
        (np.zeros((4, 4, 2), np.uint8), r"\(4, 4, 2\)"),
        (np.zeros((0, 4, 3), np.uint8), r"\(0, 4, 3\)"),
        (Image.new("I;16", (4, 4)), "more than 8 bits"),
        (Image.new("F", (4, 4)), "more than 8 bits"),
    ],
)
def test_what_is_not_an_image(image, message):
    with pytest.raises(AstraError, match=message):
        ImageProcessor()([image])


def test_other_sizes_without_resize():
    with pytest.raises(AstraError, match="an image is 5x4 .* size 4x5"):
        ImageProcessor(size=(4, 5), do_resize=False)([Image.new("RGB", (4, 5))])


def test_decode_paths_and_bytes(tmp_path):
    image = Image.fromarray(noise(5, 7))
    (tmp_path / "a.png").write_bytes(png(image))
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), png(image)):
        np.testing.assert_array_equal(np.asarray(decode_image(source)), np.asarray(image))


def test_decode_turns_upright():
    image, exif, file = Image.fromarray(noise(8, 16)), Image.Exif(), io.BytesIO()
    exif[0x0112] = 6  # the camera was turned by a quarter
    image.save(file, "PNG", exif=exif)
    np.testing.assert_array_equal(np.asarray(decode_image(file.getvalue())), np.rot90(np.asarray(image), -1))


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "not an image"),
        (b"<html>404</html>", "not an image"),
        (png(Image.fromarray(noise(40, 40)))[:900], "damaged"),
        (png(Image.new("I;16", (4, 4))), "more than 8 bits"),
    ],
)
def test_decode_errors_name_the_file(tmp_path, content, message):
    path = tmp_path / "cat.png"
    path.write_bytes(content)
    with pytest.raises(AstraError, match=f"^{re.escape(str(path))}: .*{message}") as error:
        decode_image(path)
    assert "\n" not in str(error.value)
    with pytest.raises(AstraError, match="^row 7: "):
        decode_image(content, "row 7")


def test_decode_missing_file_and_folder(tmp_path):
    for path in (tmp_path / "none.png", tmp_path):
        with pytest.raises(AstraError, match=re.escape(str(path))):
            decode_image(path)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "MPO"])
def test_formats_that_are_read(format):
    file = io.BytesIO()
    Image.new("RGB", (6, 5), "white").save(file, format)  # MPO: two pictures in a JPEG file, as telephones write
    assert decode_image(file.getvalue()).size == (6, 5)


@pytest.mark.parametrize("format", ["EPS", "ICNS", "TGA", "PCX", "SGI", "ICO", "JPEG2000"])
def test_formats_that_are_not_read(format, monkeypatch):
    """Least of all by another program: Pillow looks for Ghostscript where it meets EPS."""
    file = io.BytesIO()
    Image.new("RGB", (32, 32)).save(file, format)
    monkeypatch.setattr("subprocess.check_call", lambda *args, **options: pytest.fail("started a program"))
    with pytest.raises(AstraError, match="^row 7: not an image of a known format"):
        decode_image(file.getvalue(), "row 7")


def test_pictures_without_end(monkeypatch, tmp_path):
    monkeypatch.setattr(images, "MAX_BYTES", 2**20)
    with pytest.raises(AstraError, match="^/dev/zero: has more than 1,048,576 bytes"):
        decode_image("/dev/zero")
    with pytest.raises(AstraError, match="cannot be read"):
        decode_image("a\0b")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"size": 10**8}, "size is 100000000 x 100000000 .* at most 16,777,216 pixels"),
        ({"size": {"height": 1, "width": 10**8}}, "size is 1 x 100000000"),
        ({"size": {"height": 10**400, "width": 1}}, "pixels, such as 4096 x 4096"),
        ({"image_std": [1e-320] * 3}, "beyond float32"),
        ({"image_mean": [1e308] * 3}, "beyond float32"),
        ({"image_mean": [10**400] * 3}, "image_mean is .* finite numbers"),
        ({"rescale_factor": 0}, "rescale_factor is 0"),
        ({"rescale_factor": -1}, "rescale_factor is -1"),
        ({"resample": [2]}, r"resample is \[2\]"),
        ({"resample": True}, "resample is True"),
    ],
)
def test_numbers_without_sense(change, message):
    with pytest.raises(AstraError, match=f"^preprocessor_config.json: .*{message}") as error:
        ImageProcessor.from_hf(VIT | change)
    assert "\n" not in str(error.value)
    assert ImageProcessor.from_hf(VIT | {"size": 4096}).size == (4096, 4096)


def test_decompression_bomb(monkeypatch):
    # the header claims 30,000 x 30,000 pixels; the file has 1 kB
    header = png(Image.new("1", (1, 1)))
    bomb = header[:16] + (30_000).to_bytes(4, "big") * 2 + header[24:]
    bomb = bomb[:29] + zlib.crc32(bomb[12:29]).to_bytes(4, "big") + bomb[33:]
    with pytest.raises(AstraError, match="more than 89,478,485 pixels"):
        decode_image(bomb)
    monkeypatch.setattr(images, "MAX_PIXELS", 99)
    with pytest.raises(AstraError, match="more than 99 pixels"):
        decode_image(png(Image.new("RGB", (10, 10))))


@given(st.data())
def test_any_damage_is_an_astra_error_or_an_image(data):
    content = bytearray(png(Image.fromarray(noise(6, 6))))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))]
    with contextlib.suppress(AstraError):
        decode_image(bytes(content))

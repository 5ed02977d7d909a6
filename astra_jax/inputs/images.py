"""Pictures -> what a model reads: the numbers of Hugging Face's `preprocessor_config.json`, applied with Pillow."""

import dataclasses
import io
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from astra_jax.errors import AstraError

CONFIG_FILE = "preprocessor_config.json"
MAX_PIXELS = 89_478_485  # of a picture: Pillow's own threshold of suspicion, 256 MiB as RGB
MAX_BYTES = 2**30  # of a picture's file
CHUNK = 2**18  # bytes that are read at a time
MAX_INPUT_PIXELS = 2**24  # of what a model gets: 4,096 x 4,096, far more than any ViT takes
# Pillow's formats that are read. It knows forty: some start other programs (EPS), most hardly anybody uses or tests.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM")
# The endings of their files, in small letters.
SUFFIXES = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".dib", ".gif", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm"),
)

# What a file that leaves a field out means. A `size` that is one number is a square for the first two, and else the
# shorter side, in proportion to which the longer one changes; what has a `crop_size` then cuts out the middle.
_OF_OPENAI = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ViT": {"size": 224, "resample": Image.Resampling.BILINEAR, "do_center_crop": False},
    "DeiT": {"size": 256, "resample": Image.Resampling.BICUBIC, "do_center_crop": True},
    "CLIP": {"size": 224, "resample": Image.Resampling.BICUBIC, "do_center_crop": True, **_OF_OPENAI},
    "Siglip": {
        "size": {"height": 224, "width": 224},
        "resample": Image.Resampling.BICUBIC,
        "do_center_crop": False,
    },
}
_DEFAULTS["Bit"] = _DEFAULTS["CLIP"]
_SQUARE = ("ViT", "DeiT")
# What is read beside switches, and then what changes nothing: names, where arrays are, and how batches are made.
_KNOWN = frozenset(
    (
        *("size", "crop_size", "resample", "rescale_factor", "image_mean", "image_std", "default_to_square"),
        *("image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "transformers_version"),
        *("_name_or_path", "_processor_class", "_valid_processor_keys", "model_input_names"),
        *("data_format", "input_data_format", "device", "return_tensors", "disable_grouping", "image_seq_length"),
    )
)
_SWITCHES = ("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb")


def _check_steps(given: dict[str, Any]) -> None:
    """Raises AstraError where a `preprocessor_config.json` asks for a step that is not done here, or may do so."""
    for key, value in given.items():
        if key.startswith("do_") and value and key not in _SWITCHES:
            raise AstraError(f"{CONFIG_FILE}: {key} is {value!r}; this step is not supported: set it to false")
    unknown = [f"{k} {v!r}"[:80] for k, v in given.items() if not k.startswith("do_") and k not in _KNOWN]
    if unknown:
        raise AstraError(
            f"{CONFIG_FILE}: has {', '.join(unknown)}, which is not known here and might change the result: remove "
            "it if it does not"
        )
    for key in (*_SWITCHES, "default_to_square"):
        if not isinstance(given.get(key, False), bool):
            raise AstraError(f"{CONFIG_FILE}: {key} is {given[key]!r}; it must be true or false")


@dataclasses.dataclass(frozen=True)
class ImageProcessor:
    """Resize, crop the centre, rescale, normalise: each step as in Hugging Face's Pillow image processors.

    Attributes:
      size: (height, width) in pixels that images are resized to, without regard to their aspect ratio; or the length of
        their shorter side, to which the longer one stays in proportion. The latter needs a `crop_size`.
      crop_size: (height, width) of the centre that is kept after the resize; None keeps everything.
      do_resize: False takes only images that already have `size`.
      resample: Pillow's filter: 0 nearest, 1 Lanczos, 2 bilinear, 3 bicubic, 4 box, 5 Hamming.
      do_rescale, rescale_factor: whether pixels (0..255) are multiplied by a factor, and which.
      do_normalize, image_mean, image_std: whether (pixel - mean) / std follows, per channel. One channel: grey images.

    Raises:
      AstraError: a value is outside its range; the message names the field of `preprocessor_config.json`.
    """

    size: tuple[int, int] | int = (224, 224)
    crop_size: tuple[int, int] | None = None
    do_resize: bool = True
    resample: int = int(Image.Resampling.BILINEAR)
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)

    def __post_init__(self) -> None:
        for field, values in (("image_mean", self.image_mean), ("image_std", self.image_std)):
            if len(values) not in (1, 3) or len(values) != len(self.image_std):
                raise AstraError(
                    f"{CONFIG_FILE}: {field} has {len(values)} values; image_mean and image_std "
                    "must both have 3 (RGB) or both 1 (grey)"
                )
        self._check_numbers()
        self._check_sizes()

    def _check_numbers(self) -> None:
        if any(std <= 0 for std in self.image_std):
            raise AstraError(f"{CONFIG_FILE}: image_std is {list(self.image_std)}; every value must be above 0")
        if self.do_rescale and self.rescale_factor <= 0:
            raise AstraError(f"{CONFIG_FILE}: rescale_factor is {self.rescale_factor}; it must be above 0")
        if not np.isfinite(self._scale_and_shift()).all():
            raise AstraError(
                f"{CONFIG_FILE}: rescale_factor {self.rescale_factor}, image_mean {list(self.image_mean)} and "
                f"image_std {list(self.image_std)} make numbers beyond float32: correct them"
            )

    def _check_sizes(self) -> None:
        least = (self.size, self.size) if isinstance(self.size, int) else self.size
        for field, (height, width) in (("size", least), ("crop_size", self.crop_size or (1, 1))):
            if height * width > MAX_INPUT_PIXELS:
                raise AstraError(
                    f"{CONFIG_FILE}: {field} is {height} x {width} (height x width); at most {MAX_INPUT_PIXELS:,} "
                    "pixels, such as 4096 x 4096, are read: correct it"
                )
        if self.crop_size is not None and (self.crop_size[0] > least[0] or self.crop_size[1] > least[1]):
            raise AstraError(
                f"{CONFIG_FILE}: crop_size {list(self.crop_size)} is larger than size {list(least)} (height, width)"
            )
        if isinstance(self.size, int) and (self.crop_size is None or not self.do_resize):
            raise AstraError(
                f"{CONFIG_FILE}: size is the shorter side alone, {self.size}, which is supported with do_resize and "
                "do_center_crop: images would differ in size; give height and width"
            )

    @property
    def height(self) -> int:
        """Rows of the result, in pixels."""
        return self._shape[0]

    @property
    def width(self) -> int:
        """Columns of the result, in pixels."""
        return self._shape[1]

    @property
    def _shape(self) -> tuple[int, int]:
        assert not isinstance(self.size, int) or self.crop_size is not None
        return self.crop_size or self.size  # type: ignore[return-value]  # as checked

    @property
    def channels(self) -> int:
        """3 (RGB) or 1 (grey)."""
        return len(self.image_mean)

    @classmethod
    def from_hf(cls, values: dict[str, Any]) -> "ImageProcessor":
        """Reads the parsed `preprocessor_config.json` of one of the kinds that are known; `to_hf` is its inverse.

        Raises:
          AstraError: another kind of processor, a step that is not supported, or a value of the wrong form.
        """
        kind = values.get("image_processor_type") or values.get("feature_extractor_type") or "ViTImageProcessor"
        family = re.fullmatch(rf"({'|'.join(_DEFAULTS)})(ImageProcessor(Fast|Pil)?|FeatureExtractor)", str(kind))
        if family is None:
            known = ", ".join(f"{name}ImageProcessor" for name in _DEFAULTS)
            raise AstraError(f"{CONFIG_FILE}: image_processor_type is {kind!r}; known are {known}")
        given = _DEFAULTS[family[1]] | {key: value for key, value in values.items() if value is not None}
        _check_steps(given)
        if isinstance(given["resample"], bool) or given["resample"] not in list(Image.Resampling):
            allowed = ", ".join(f"{filter.value} ({filter.name.lower()})" for filter in sorted(Image.Resampling))
            raise AstraError(f"{CONFIG_FILE}: resample is {given['resample']!r}; it must be one of {allowed}")

        factor = given.get("rescale_factor", 1 / 255)
        if not _is_number(factor):
            raise AstraError(f"{CONFIG_FILE}: rescale_factor is {factor!r}; it must be a finite number")
        mean, std = (_numbers(given.get(key, 0.5), key) for key in ("image_mean", "image_std"))
        return cls(
            size=_size(given["size"], given.get("default_to_square", family[1] in _SQUARE)),
            crop_size=_pixels(given.get("crop_size", 224), "crop_size") if given["do_center_crop"] else None,
            do_resize=given.get("do_resize", True),
            resample=int(given["resample"]),
            do_rescale=given.get("do_rescale", True),
            rescale_factor=float(factor),
            do_normalize=given.get("do_normalize", True),
            image_mean=mean,
            image_std=std,
        )

    def to_hf(self) -> dict[str, Any]:
        """The content of a `preprocessor_config.json` with which transformers computes the same numbers."""
        crop, kind, size = {}, "DeiTImageProcessor", {}
        if isinstance(self.size, int):
            kind, size = "CLIPImageProcessor", {"shortest_edge": self.size}
        else:
            size = {"height": self.size[0], "width": self.size[1]}
        if self.crop_size is not None:
            crop = {"do_center_crop": True, "crop_size": {"height": self.height, "width": self.width}}
        return {
            # ViT's class in transformers 4 leaves the crop out without a word; DeiT's is the same with it.
            "image_processor_type": kind if crop else "ViTImageProcessor",
            "do_convert_rgb": self.channels == 3,
            "do_resize": self.do_resize,
            "size": size,
            "resample": self.resample,
            **crop,
            "do_rescale": self.do_rescale,
            "rescale_factor": self.rescale_factor,
            "do_normalize": self.do_normalize,
            "image_mean": list(self.image_mean),
            "image_std": list(self.image_std),
        }

    def __call__(self, images: Sequence[Image.Image | np.ndarray]) -> Float[np.ndarray, "B height width channels"]:
        """Images of any sizes (Pillow, or uint8 arrays [H,W] or [H,W,1|3|4]) -> float32 [B,height,width,channels].

        Raises:
          AstraError: an image has another type, more than 8 bits per channel, or a size that may not be changed.
        """
        return self.normalize(self.resize(images))

    def resize(self, images: Sequence[Image.Image | np.ndarray]) -> UInt8[np.ndarray, "B height width channels"]:
        """The first half of `__call__`: everything that works on 8-bit pixels, so that it can be done once and kept."""
        pixels = np.empty((len(images), self.height, self.width, self.channels), np.uint8)
        for row, image in zip(pixels, images, strict=True):
            image = _to_mode(_as_pillow(image), "RGB" if self.channels == 3 else "L")
            height, width = self._resized(image)
            if image.size != (width, height):
                if not self.do_resize:
                    raise AstraError(
                        f"an image is {image.height}x{image.width} (height x width), but {CONFIG_FILE} has do_resize "
                        f"false and size {height}x{width}: set do_resize to true, or give images of that size"
                    )
                image = image.resize((width, height), self.resample)
            top, left = (height - self.height) // 2, (width - self.width) // 2
            cut = np.asarray(image)[top : top + self.height, left : left + self.width]
            row[...] = cut.reshape(row.shape)
        return pixels

    def _resized(self, image: Image.Image) -> tuple[int, int]:
        """Height and width of an image after the resize. Raises AstraError where these are far too many pixels."""
        if not isinstance(self.size, int):
            return self.size
        shorter = min(image.size)
        width, height = (int(self.size * side / shorter) for side in image.size)
        if height * width > MAX_PIXELS:
            raise AstraError(
                f"an image is {image.height}x{image.width} (height x width): with a shorter side of {self.size} it has "
                f"more than {MAX_PIXELS:,} pixels: cut it"
            )
        return height, width

    def normalize(
        self, pixels: UInt8[np.ndarray, "B height width channels"]
    ) -> Float[np.ndarray, "B height width channels"]:
        """The second half of `__call__`: 0..255 -> float32 `(pixels * rescale_factor - mean) / std`."""
        scale, shift = self._scale_and_shift()
        # NumPy is ten times slower where the innermost axis has 3 elements: compute whole rows of pixels.
        width = pixels.shape[2]
        rows = pixels.reshape(-1, width * self.channels)
        result = np.multiply(rows, np.tile(scale, width), dtype=np.float32)
        result -= np.tile(shift, width)
        return result.reshape(pixels.shape)

    def _scale_and_shift(self) -> Float[np.ndarray, "2 channels"]:
        """What pixels are multiplied by, and what is then taken from them, in float32."""
        mean = np.asarray(self.image_mean if self.do_normalize else [0.0] * self.channels)
        std = np.asarray(self.image_std if self.do_normalize else [1.0] * self.channels)
        with np.errstate(all="ignore"):
            scale, shift = (self.rescale_factor if self.do_rescale else 1.0) / std, mean / std
            return np.stack([scale, shift]).astype(np.float32)


def decode_image(source: str | os.PathLike[str] | bytes, name: str | None = None) -> Image.Image:
    """Reads an image file, or its bytes, completely, turned upright as its EXIF data say.

    Args:
      source: path, or the content of a file.
      name: what error messages call it; the path by default.

    Raises:
      AstraError: missing, not an image in one of `FORMATS`, truncated, corrupt, too large, or more than 8 bits per
        channel.
    """
    if name is None:
        name = "image" if isinstance(source, bytes) else os.fspath(source)
    data = source if isinstance(source, bytes) else _content(source, name)
    if len(data) > MAX_BYTES:
        raise AstraError(f"{name}: has more than {MAX_BYTES:,} bytes: make the picture smaller")
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:  # the header alone: a small file can claim to be enormous
            raise Image.DecompressionBombError
        image.load()
        image = ImageOps.exif_transpose(image)
    except Image.DecompressionBombError as error:
        raise AstraError(f"{name}: has more than {MAX_PIXELS:,} pixels: make the picture smaller") from error
    except UnidentifiedImageError as error:
        raise AstraError(
            f"{name}: not an image of a known format ({', '.join(FORMATS)}): replace or remove it"
        ) from error
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError, struct.error, IndexError, ...
        raise AstraError(f"{name}: a damaged image ({_first_line(error)}): replace or remove it") from error
    _check_depth(image, name)
    return image


def _content(path: str | os.PathLike[str], name: str) -> bytes:
    """A file's bytes, of which hardly more are read than a picture may have: a device has no end."""
    data = bytearray()
    try:
        with Path(path).open("rb") as file:
            while len(data) <= MAX_BYTES and (part := file.read(CHUNK)):
                data += part
            return bytes(data)
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or _first_line(error)
        raise AstraError(f"{name}: cannot be read ({reason}): check the path") from error


def _as_pillow(image: Image.Image | np.ndarray) -> Image.Image:
    if isinstance(image, Image.Image):
        return image
    if image.dtype != np.uint8:
        raise AstraError(f"an image is an array of {image.dtype}; it must be uint8 (0..255)")
    if 0 in image.shape or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise AstraError(f"an image array has shape {image.shape}; it must be [H,W] or [H,W,C] with 1, 3 or 4 channels")
    return Image.fromarray(image[:, :, 0] if image.shape[2:] == (1,) else image)


def _to_mode(image: Image.Image, mode: str) -> Image.Image:
    """Transparent parts become white, as in transformers; without that their colour would be accidental."""
    _check_depth(image, "an image")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == mode else image.convert(mode)


def _check_depth(image: Image.Image, name: str) -> None:
    # Pillow would clip these to 0..255, which makes most of a 16-bit picture white.
    if image.mode.startswith(("I", "F")):
        raise AstraError(f"{name}: has more than 8 bits per channel (mode {image.mode}): convert it to 8 bits")


def _size(value: Any, square: bool) -> tuple[int, int] | int:
    """(height, width), or the shorter side: `shortest_edge`, or one number where that does not mean a square."""
    sides = {key: side for key, side in value.items() if side is not None} if isinstance(value, dict) else {}
    if set(sides) == {"shortest_edge"} or (isinstance(value, int) and not square):
        return _pixels(sides.get("shortest_edge", value), "size")[0]
    return _pixels(value, "size")


def _pixels(value: Any, field: str) -> tuple[int, int]:
    """The forms of a size -> (height, width)."""
    sides = value
    if isinstance(value, dict):
        sides = {key: side for key, side in value.items() if side is not None}
        if set(sides) != {"height", "width"}:
            raise AstraError(f"{CONFIG_FILE}: {field} is {value!r}; it must be a number or have height and width alone")
        sides = (sides["height"], sides["width"])
    elif not isinstance(value, (list, tuple)):
        sides = (value, value)
    if len(sides) != 2 or any(isinstance(side, bool) or not isinstance(side, int) or side < 1 for side in sides):
        raise AstraError(f"{CONFIG_FILE}: {field} is {value!r}; height and width must be whole numbers of at least 1")
    return tuple(sides)


def _numbers(value: Any, field: str) -> tuple[float, ...]:
    """A list of numbers, or one number for all three channels."""
    values = tuple(value) if isinstance(value, (list, tuple)) else (value,) * 3
    if not all(map(_is_number, values)):
        raise AstraError(f"{CONFIG_FILE}: {field} is {value!r}; it must be made of finite numbers")
    return tuple(map(float, values))


def _is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that a float can be: whole numbers there have no largest one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return abs(value) <= sys.float_info.max  # false for NaN, too


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]

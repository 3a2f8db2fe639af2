"""Image files to RGB pixels, and the published crops (ADM's centre crop, LlamaGen's ten-crop).

Shapes: an image is (height, width, 3) uint8; views are (n, size, size, 3) uint8.
"""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MOST_PIXELS = 100_000_000  # larger ones are refused as decompression bombs
VIEW_COUNTS = {"adm_center_flip": 2, "ten_crop_1.1": 10, "ten_crop_1.05": 10, "ten_crop_both": 20}


# What Pillow's plug-ins raise on damaged files.
DAMAGE = (OSError, SyntaxError, ValueError, EOFError, MemoryError, OverflowError, LookupError, TypeError)


class BadImage(ValueError):
    """A file that holds no usable image; the message says why in a few words."""


def decode_image(content: bytes) -> np.ndarray:
    """Decode a file to RGB: EXIF rotation applied, other colour modes converted, alpha laid over white, 16 bits cut to 8.

    Returns (height, width, 3) uint8. Raises BadImage for anything that is not a whole image of at most 100 megapixels.
    """
    if not content:
        raise BadImage("the file is empty")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(content)) as image:
                if image.width * image.height > MOST_PIXELS:
                    raise BadImage(f"{image.width} x {image.height} pixels are more than {MOST_PIXELS:,}")
                image.load()
                return np.array(_to_rgb(ImageOps.exif_transpose(image)))
    except BadImage:
        raise
    except UnidentifiedImageError:
        raise BadImage(f"not an image (begins with {content[:8]!r})") from None
    except DAMAGE as error:
        raise BadImage(f"damaged: {' '.join(str(error).split()) or type(error).__name__}") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(f"too large: {error}") from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I;16", "I;16B", "I;16L", "I;16N", "I", "F"):
        values = np.asarray(image).astype(np.float64)
        scale = 255.0 if image.mode == "F" and values.size and values.max() <= 1.0 else 1.0
        divisor = 257.0 if image.mode != "F" else 1.0
        image = Image.fromarray((values * scale / divisor).round().clip(0, 255).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def center_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Crop as ADM does: halve with BOX while the short side is at least twice `size`, BICUBIC to size, cut the centre.

    image: (height, width, 3) uint8. Returns (size, size, 3) uint8.
    """
    picture = Image.fromarray(image)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), resample=Image.Resampling.BOX)
    scale = size / min(picture.size)
    shape = (round(picture.width * scale), round(picture.height * scale))
    array = np.asarray(picture.resize(shape, resample=Image.Resampling.BICUBIC))
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


def ten_crop(image: np.ndarray, size: int, ratio: float) -> np.ndarray:
    """Return four corners and centre of the centre crop of side int(ratio * size), then their mirrors (10, ...)."""
    large = int(ratio * size)
    square = center_crop(image, large)
    rest, middle = large - size, round((large - size) / 2)
    corners = [(0, 0), (0, rest), (rest, 0), (rest, rest), (middle, middle)]
    crops = np.stack([square[top : top + size, left : left + size] for top, left in corners])
    return np.concatenate([crops, crops[:, :, ::-1]])


def views(image: np.ndarray, size: int, name: str) -> np.ndarray:
    """Return the views of an image that a run is trained on: (VIEW_COUNTS[name], size, size, 3) uint8.

    name: "adm_center_flip" (centre crop and its mirror), "ten_crop_1.1", "ten_crop_1.05", or "ten_crop_both".
    Raises ValueError for another name.
    """
    if name == "adm_center_flip":
        crop = center_crop(image, size)
        return np.stack([crop, crop[:, ::-1]])
    if name == "ten_crop_both":
        return np.concatenate([ten_crop(image, size, 1.1), ten_crop(image, size, 1.05)])
    if name in VIEW_COUNTS:
        return ten_crop(image, size, float(name.removeprefix("ten_crop_")))
    raise ValueError(f"views must be one of {', '.join(VIEW_COUNTS)}; got {name!r}")

"""Writes images to files: as one grid, or as one file per image."""

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from nabla_gfn_jax.errors import UserError

PICTURES = (".png", ".jpg", ".jpeg", ".webp")  # the endings of image files that can be written


def levels(images: Float[np.ndarray, "*batch"]) -> UInt8[np.ndarray, "*batch"]:
    """Clips images to [0, 1] and rounds them to the 256 levels of a file."""
    return np.round(np.clip(images, 0.0, 1.0) * 255.0).astype(np.uint8)


def save_grid(
    file: Path,
    images: Float[np.ndarray, "count height width 3"] | UInt8[np.ndarray, "count height width 3"],
    columns: int,
    margin: int = 4,
    zoom: int = 1,
) -> None:
    """Writes images in [0, 1] or in uint8 as a grid on white, row by row.

    Args:
        file: the file to write; its ending chooses the format.
        images: (count, height, width, 3).
        columns: images per row.
        margin: space between images, in pixels before zooming.
        zoom: enlargement factor of each pixel.

    Raises:
        UserError: the file cannot be written.
    """
    count, height, width, _ = images.shape
    rows = -(-count // columns)
    canvas = np.full((rows * (height + margin) + margin, columns * (width + margin) + margin, 3), 255, np.uint8)
    for i, image in enumerate(images if images.dtype == np.uint8 else levels(images)):
        top, left = (margin + n * (size + margin) for n, size in zip(divmod(i, columns), (height, width), strict=True))
        canvas[top : top + height, left : left + width] = image
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(canvas.repeat(zoom, 0).repeat(zoom, 1)).save(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be written ({error}); choose another --out or --workdir") from error


def save_each(
    folder: Path, images: UInt8[np.ndarray, "count height width 3"], texts: Iterable[Mapping[str, str]], first: int = 0
) -> None:
    """Writes the images as `folder`/0000.png, 0001.png, …, from number `first` on.

    `texts` has the text fields of each PNG by keyword.

    Raises `UserError` if a file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for number, (image, text) in enumerate(zip(images, texts, strict=True), first):
            info = PngInfo()
            for keyword, value in text.items():
                info.add_itxt(keyword, value)
            Image.fromarray(image).save(folder / f"{number:04d}.png", pnginfo=info)
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error}); choose another folder") from error

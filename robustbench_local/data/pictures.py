"""Decoding a folder of image files into arrays, and keeping the arrays for the next start."""

import os
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from robustbench_local.data.source import one_line
from robustbench_local.errors import UserError

_SUFFIXES = frozenset(
    {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm"}
)
_GREY = frozenset({"1", "L", "LA"})
_COLOUR = frozenset({"RGB", "RGBA", "P", "CMYK", "YCbCr"})
_LAYOUT = "train/<class>/* and test/<class>/*"

_Pixels: TypeAlias = NDArray[np.uint8]


@dataclass(frozen=True)
class Pictures:
    """Decoded images: `x_*` uint8 (N, H, W, C) with C 1 or 3, `y_*` int64 (N,)."""

    x_train: _Pixels
    y_train: NDArray[np.int64]
    x_test: _Pixels
    y_test: NDArray[np.int64]
    class_names: tuple[str, ...]


def decode(folder: Path) -> Pictures:
    """Decode `train/<class>/*` and `test/<class>/*`, possibly below a single top-level folder.

    Classes and files are taken in the order of their names. Raises `UserError` that names the
    first class or file that doesn't fit.
    """
    root = _root(folder)
    train, test = _files(root / "train"), _files(root / "test")
    unknown = sorted(set(test) - set(train))
    if unknown:
        raise UserError(
            f"{root / 'test' / unknown[0]} is a class without a folder in {root / 'train'} and "
            "only classes to be learnt were expected: add its training images or remove it"
        )
    names = tuple(sorted(train))
    pixels = _decode_all(
        [file for part in (train, test) for k in names for file in part.get(k, [])]
    )
    y_train, y_test = (
        np.repeat(np.arange(len(names)), [len(part.get(name, [])) for name in names])
        for part in (train, test)
    )
    return Pictures(pixels[: len(y_train)], y_train, pixels[len(y_train) :], y_test, names)


def read_cache(path: Path) -> Pictures | None:
    """Read decoded images back; None where there are none or where they are damaged."""
    try:
        # Every member of a zip file carries a checksum that reading it whole compares.
        with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
            return Pictures(
                stored["x_train"],
                stored["y_train"],
                stored["x_test"],
                stored["y_test"],
                tuple(stored["class_names"].tolist()),
            )
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        return None


def write_cache(path: Path, pictures: Pictures) -> None:
    """Store decoded images, whole or not at all; the caller holds a lock."""
    staging = path.with_name(f".{path.name}.partial")
    try:
        with staging.open("wb") as file:
            np.savez(
                file,
                x_train=pictures.x_train,
                y_train=pictures.y_train,
                x_test=pictures.x_test,
                y_test=pictures.y_test,
                class_names=np.array(pictures.class_names, dtype=np.str_),
            )
        os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)


def _root(folder: Path) -> Path:
    inner = [entry for entry in folder.iterdir() if entry.is_dir() and not _hidden(entry)]
    for root in (folder, *(inner if len(inner) == 1 else [])):
        if (root / "train").is_dir() and (root / "test").is_dir():
            return root
    found = ", ".join(sorted(entry.name for entry in inner)[:5]) or "no folders"
    raise UserError(
        f"{folder} holds {found} and {_LAYOUT} was expected: arrange the images that way and type "
        "dataset.path=DIR_OR_ARCHIVE again"
    )


def _files(part: Path) -> dict[str, list[Path]]:
    """List the image files of each class, sorted; a class without images is left out."""
    classes: dict[str, list[Path]] = {}
    for entry in part.iterdir():
        if not entry.is_dir() or _hidden(entry):
            continue
        files = sorted((file for file in entry.iterdir() if not _hidden(file)), key=_by_name)
        for file in files:
            # Passing over it in silence would make a set of another size than the user thinks.
            if file.suffix.lower() not in _SUFFIXES or not file.is_file():
                raise UserError(
                    f"{file} is no image file and only {', '.join(sorted(_SUFFIXES))} were "
                    f"expected in {_LAYOUT}: convert or remove it"
                )
        if files:
            classes[entry.name] = files
    if not classes:
        raise UserError(
            f"{part} holds no images and {_LAYOUT} was expected: arrange the images that way and "
            "type dataset.path=DIR_OR_ARCHIVE again"
        )
    return classes


def _hidden(path: Path) -> bool:
    # What file managers leave behind on other systems.
    return path.name.startswith((".", "__MACOSX")) or path.name in {"Thumbs.db", "desktop.ini"}


def _by_name(path: Path) -> str:
    return path.name


def _decode_all(files: list[Path]) -> _Pixels:
    """Decode to (N, H, W, C): one channel where every image is grey, else three."""
    images: list[_Pixels] = []
    for file in files:
        image = _decode(file)
        if images and image.shape[:2] != images[0].shape[:2]:
            size, first = image.shape[1::-1], images[0].shape[1::-1]
            raise UserError(
                f"{file} is {size[0]}x{size[1]} pixels, {files[0]} is {first[0]}x{first[1]}, and "
                "one size was expected: resize the images to one size"
            )
        images.append(image)
    channels = max(image.shape[2] for image in images)
    pixels = np.empty((len(images), *images[0].shape[:2], channels), dtype=np.uint8)
    for index, image in enumerate(images):
        pixels[index] = image  # grey is repeated where others have colour
    return pixels


def _decode(file: Path) -> _Pixels:
    from PIL import Image

    try:
        with Image.open(file) as image:
            if image.mode in _GREY:
                return np.asarray(image.convert("L"))[:, :, None]
            if image.mode in _COLOUR:
                # Via RGBA, because a palette with transparency is converted with a warning.
                whole = image.convert("RGBA") if image.mode == "P" else image
                return np.asarray(whole.convert("RGB"))
            mode = image.mode
    # A broken PNG is a SyntaxError to Pillow.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{file} can't be decoded ({one_line(error)}) and a whole image was expected: replace "
            "or remove it"
        ) from error
    raise UserError(
        f"{file} has pixels of mode {mode} and 8 bits per channel were expected: convert it to "
        "grey or RGB with 8 bits"
    )

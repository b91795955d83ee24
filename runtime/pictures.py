"""Pictures in every form that data has them -> RGB, upright; and what names one in a checksum."""

import base64
import binascii
import io
import os
import re
import zlib
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from runtime.sources import FETCH, LFS, one_line

# PNG, JPEG, GIF, WebP, BMP and TIFF by their first bytes
BASE64 = re.compile(r"(iVBOR|/9j/|R0lGOD|UklGR|Qk|SUkq|TU0A)[A-Za-z0-9+/\s]{40,}={0,2}\s*")


def to_image(image: object, folders: list[Path]) -> Image.Image:
    """A PIL picture, bytes, {"bytes", "path"}, a path, a data: URI or base64 -> RGB, upright.

    Paths are relative to the first of `folders` in which they exist. Transparency is laid on white,
    16 bits become 8, an animation gives its first frame. A 32-bit picture is refused, because its
    range is unknown. Raises ValueError, which names the picture and the cause.
    """
    name = ""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path")
    if isinstance(image, str):
        name, image = named(image, folders)
    elif not isinstance(image, bytes | Image.Image):
        kind = type(image).__name__
        raise ValueError(f"unreadable image: needs a path, bytes or {{bytes, path}}, got {kind}")
    try:
        return in_rgb(image)
    except Exception as error:  # a decoder raises errors of any kind for a broken file
        raise ValueError(f"unreadable image{name}: {cause(error, image)}") from error


def in_rgb(image: bytes | Image.Image) -> Image.Image:
    if not isinstance(image, Image.Image):
        image = Image.open(io.BytesIO(image))
    if min(image.size) == 0:
        raise ValueError("it has zero size")
    if image.mode in ("I", "F"):
        raise ValueError(f"it has 32-bit pixels (mode {image.mode}): save it with 8 or 16 bits")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def named(text: str, folders: list[Path]) -> tuple[str, bytes]:
    """What a text stands for: (how a message names it, the bytes)."""
    if text.startswith("data:"):
        return " (data: URI)", from_base64(text.partition(",")[2])
    if re.match(r"(https?|ftp|s3|gs)://", text):
        raise ValueError(
            f"unreadable image: pictures are not downloaded: {text:.100}; save it and name the file"
        )
    if BASE64.fullmatch(text):
        return " (base64)", from_base64(text)
    path = find(text.removeprefix("file://"), folders)
    try:
        return f" {text:.100}", path.read_bytes()
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(f"unreadable image {text:.100}: {reason} ({path!s:.200})") from error


def find(name: str, folders: list[Path]) -> Path:
    """The first existing folder/name, also for a name written with backslashes."""
    candidates = []
    for folder in folders:
        candidates += [folder / name, folder / name.replace("\\", "/")]
    for path in candidates:
        try:
            if os.path.exists(path):
                return path
        except ValueError:  # a null character
            break
    places = list(dict.fromkeys(str(folder.absolute()) for folder in folders))
    where = "" if os.path.isabs(name) else f" in {' or '.join(places)}"
    raise ValueError(f"unreadable image: there is no {one_line(name, 100)}{where}")


def from_base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except binascii.Error as error:
        raise ValueError(f"unreadable image: no valid base64 ({error}): {text:.20}...") from error


def cause(error: Exception, image: bytes | Image.Image) -> str:
    """Why a picture cannot be read, without the addresses of objects that PIL names."""
    if isinstance(image, bytes):
        if not image:
            return "it is empty (0 bytes)"
        if image.startswith(LFS):
            return f"it {FETCH}"
        if isinstance(error, Image.UnidentifiedImageError):
            return (
                "cannot identify its format: no picture, broken, or a format that PIL cannot read"
            )
    return one_line(error)


def picture_id(image: object, folder: Path) -> str:
    """A path as text, or the length and checksum of bytes.

    The loader's absolute paths become relative to the data's folder, or file names outside of it:
    the same on another machine.
    """
    if isinstance(image, str):
        return image if len(image) <= 255 else checksum(image.encode())
    if isinstance(image, bytes):
        return checksum(image)
    if not isinstance(image, dict) or not (image.get("bytes") or image.get("path")):
        return "none"
    if image.get("bytes"):
        return checksum(image["bytes"])
    folder = folder.absolute()
    path = folder / image["path"]
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else path.name


def checksum(content: bytes) -> str:
    return f"{len(content)} {zlib.crc32(content):08x}"

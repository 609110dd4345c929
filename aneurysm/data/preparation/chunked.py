"""Several arrays and what is known about them in one file, read by boxes: blosc2 frames behind a JSON header.

Layout: `MAGIC`, the length of the header (8 bytes, little endian), the header (JSON), the frames. The header
is read without decompressing anything, a box of an array by decompressing only the blocks that it touches.
Compression runs on one thread: with several, the order of the blocks in a frame is the order in which they
happen to be finished, and equal arrays would give unequal files.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np

from aneurysm.data.errors import ReadError
from aneurysm.data.files import replacing

MAGIC = b"aneurysm chunked arrays 1\n"
# A patch of 96 voxels touches few chunks, and little of what it does not need is decompressed with it.
_CHUNK, _BLOCK = 96, 32  # voxels per side
_LINE_CHUNK, _LINE_BLOCK = 65536, 8192  # entries of a list
# Shuffling parts the noisy low bytes, which do not compress, from the high ones, which do.
_COMPRESSION = {
    "codec": blosc2.Codec.LZ4,
    "clevel": 5,
    "filters": [blosc2.Filter.SHUFFLE],
    "nthreads": 1,
}


@dataclass(frozen=True)
class Frame:
    """Where an array lies in a file."""

    offset: int  # bytes from the beginning of the file
    length: int  # bytes
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class ArrayFile:
    """An opened file: the header is in memory, voxels are read when they are asked for."""

    path: Path
    header: dict[str, Any]
    frames: dict[str, Frame]

    def read(self, name: str, window: tuple[slice, ...] | None = None) -> np.ndarray:
        """An array, or a box of it; only the blocks that the box touches are decompressed.

        Raises:
            ReadError: the file has changed since it was opened, or its frame is damaged.
        """
        frame = self.frames[name]
        try:
            array: Any = blosc2.open(str(self.path), mode="r", offset=frame.offset, dparams={"nthreads": 1})
            if tuple(array.shape) != frame.shape:
                raise RuntimeError(f"shape {tuple(array.shape)} where the header says {frame.shape}")
            return np.asarray(array[window if window is not None else ...])
        except (RuntimeError, ValueError, OSError) as error:
            raise ReadError(f"{self.path}: {name} cannot be read ({error}). Delete the file.") from error


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], header: Mapping[str, Any]) -> None:
    """Write arrays with a header; equal input gives equal bytes, and the file is whole or absent.

    Args:
        arrays: of any shape; three axes are cut for patches, one for single entries.
        header: what JSON can hold.
    """
    stored = {name: _compress(array) for name, array in arrays.items()}
    described, offset = {}, 0
    for name, data in stored.items():
        array = arrays[name]
        described[name] = {
            "offset": offset,
            "length": len(data),
            "shape": array.shape,
            "dtype": array.dtype.str,
        }
        offset += len(data)
    text = json.dumps({"arrays": described, "header": dict(header)}, sort_keys=True).encode()
    with replacing(path) as part, part.open("wb") as file:
        file.write(MAGIC + len(text).to_bytes(8, "little") + text)
        for data in stored.values():
            file.write(data)


def open_arrays(path: Path) -> ArrayFile:
    """Read the header of a file.

    Raises:
        ReadError: no such file, another kind of file, or one that is cut short.
    """
    try:
        with path.open("rb") as file:
            start = file.read(len(MAGIC) + 8)
            length = int.from_bytes(start[len(MAGIC) :], "little")
            size = path.stat().st_size
            if not start.startswith(MAGIC) or length > size:
                raise ReadError(f"{path}: not a file of chunked arrays. Delete it and make it again.")
            described = json.loads(file.read(length))
        frames = {
            name: Frame(len(start) + length + one["offset"], one["length"], tuple(one["shape"]), one["dtype"])
            for name, one in described["arrays"].items()
        }
    except FileNotFoundError as error:
        raise ReadError(f"{path}: no such file.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, ReadError):
            raise
        raise ReadError(f"{path}: the header is damaged ({error}). Delete it and make it again.") from error
    end = max((frame.offset + frame.length for frame in frames.values()), default=len(start) + length)
    if end != size:
        raise ReadError(f"{path}: {size} bytes where the header says {end}. Delete it and make it again.")
    return ArrayFile(path, described["header"], frames)


def _compress(array: np.ndarray) -> bytes:
    if array.ndim == 1:
        chunks, blocks = (min(_LINE_CHUNK, max(len(array), 1)),), (min(_LINE_BLOCK, max(len(array), 1)),)
    else:
        chunks = tuple(min(_CHUNK, math.ceil(n / _BLOCK) * _BLOCK) for n in array.shape)
        chunks = tuple(min(c, n) for c, n in zip(chunks, array.shape, strict=True))
        blocks = tuple(min(_BLOCK, c) for c in chunks)
    whole: Any = np.ascontiguousarray(array)
    compressed: Any = blosc2.asarray(
        whole,
        chunks=chunks,
        blocks=blocks,
        cparams=blosc2.CParams(**_COMPRESSION),
        dparams=blosc2.DParams(nthreads=1),
    )
    return compressed.to_cframe()

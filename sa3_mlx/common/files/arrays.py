"""Read arrays as numpy saves them, from anybody, and write them so."""

from __future__ import annotations

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sa3_mlx.common.files.atomic import write_bytes


def map_array(path: Path, words: str) -> NDArray[Any]:
    """Map the array of a .npy file into memory, read-only, once its header and the size of the file fit.

    Raises FileNotFoundError, and ValueError with ``words`` for anything but numbers, both in one line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing")
    try:
        with warnings.catch_warnings(action="ignore"):  # of numpy, about headers of old versions
            array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.memmap) or array.offset + array.nbytes != path.stat().st_size:
            raise ValueError("its header does not fit its size")
    except Exception as error:  # numpy raises many kinds for a damaged header
        raise ValueError(f"{path}: {words}") from error
    return array


def save_array(path: Path, array: NDArray[Any]) -> None:
    """Write a .npy file as a whole, by way of memory: to a full disk numpy writes a part, without an error.

    Raises WriteError where the disk refuses.
    """
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    write_bytes(path, buffer.getvalue())

"""ADM's `.npz` files: reference statistics (`mu`, `sigma`, `mu_s`, `sigma_s`), and images (`arr_0`, uint8
`[N, H, W, C]`).
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..data.datasets import ImageDataset
from ..errors import EdgeDiTError
from ..files import aside_of, explain_write_errors, fsync_path

Gaussian = tuple[np.ndarray, np.ndarray]
"""Mean `[D]` and covariance `[D, D]`, float64."""


class AdmFile(NamedTuple):
    """What an `.npz` file holds.

    Args:
        pooled: statistics of Inception's pooled features. spatial: of its spatial ones. images: as a data set.
    """

    pooled: Gaussian | None
    spatial: Gaussian | None
    images: ImageDataset | None


def read_npz(path: str | Path, channels: int | None = None) -> AdmFile:
    """Read a file of ADM's: nothing in it is unpickled. Memory: the file, unpacked.

    Args:
        channels: 1: images whose three channels are equal, which is how grey ones are written, are grey ones again.

    Raises:
        EdgeDiTError: it cannot be read, holds neither, or arrays of other shapes, types or with NaN.
    """
    path = Path(path)
    if not path.is_file():
        raise EdgeDiTError(f"{path} does not exist; give ADM's .npz, or a folder of images.")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("mu", "sigma", "mu_s", "sigma_s", "arr_0") if name in file.files}
    except Exception as error:  # zipfile, zlib and numpy each have their own; one for sizes that no memory holds
        raise EdgeDiTError(
            f"{path} cannot be read as ADM's .npz ({' '.join(str(error).split())[:200]}); get it again."
        ) from error
    if foreign := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
        raise EdgeDiTError(f"{path}: {foreign[0]!r} is no array of NumPy's; get it again.")
    found = AdmFile(
        _gaussian(path, arrays, "mu", "sigma"),
        _gaussian(path, arrays, "mu_s", "sigma_s"),
        _images(path, arrays["arr_0"], channels) if "arr_0" in arrays else None,
    )
    if found.pooled is None and found.images is None:
        raise EdgeDiTError(
            f"{path} holds neither statistics (mu, sigma) nor images (arr_0); give a reference or sample file of ADM's."
        )
    return found


def _gaussian(path: Path, arrays: dict[str, np.ndarray], mean_name: str, covariance_name: str) -> Gaussian | None:
    if mean_name not in arrays and covariance_name not in arrays:
        return None
    if missing := {mean_name, covariance_name} - set(arrays):
        raise EdgeDiTError(f"{path} has no {missing.pop()!r} beside its other statistics; get it again.")
    mean, covariance = arrays[mean_name], arrays[covariance_name]
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise EdgeDiTError(
            f"{path}: {mean_name!r} has shape {mean.shape} and {covariance_name!r} {covariance.shape}; expected [D] "
            "and [D, D]."
        )
    for name, array in ((mean_name, mean), (covariance_name, covariance)):
        if array.dtype.kind != "f" or not np.isfinite(array).all():
            raise EdgeDiTError(
                f"{path}: {name!r} ({array.dtype}) must hold finite floating-point numbers; get it again."
            )
    return mean.astype(np.float64), covariance.astype(np.float64)


def _images(path: Path, array: np.ndarray, channels: int | None) -> ImageDataset:
    if array.ndim != 4 or array.dtype != np.uint8 or array.shape[-1] not in (1, 3) or not array.size:
        raise EdgeDiTError(
            f"{path}: 'arr_0' has shape {array.shape} and type {array.dtype}; expected images, uint8 [N, H, W, 3]: "
            "bytes from 0 to 255, with the channels last."
        )
    if channels == 1 and all(np.array_equal(array[..., 0], array[..., other]) for other in range(1, array.shape[-1])):
        array = array[..., :1]
    return ImageDataset(array.transpose(0, 3, 1, 2), name=path.stem)


def write_npz(path: str | Path, count: int, parts: Iterable[np.ndarray]) -> None:
    """Write images as ADM's evaluator reads them. Memory: one part.

    Args:
        count: images. parts: uint8 `[n, C, H, W]`, together so many; grey ones are repeated to three channels.
    """
    path = Path(path)
    aside = aside_of(path)
    with explain_write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with zipfile.ZipFile(aside, "w") as whole, whole.open("arr_0.npy", "w", force_zip64=True) as file:
                for number, part in enumerate(parts):
                    pixels = np.broadcast_to(part, (len(part), 3, *part.shape[2:])).transpose(0, 2, 3, 1)
                    if number == 0:
                        header = {"descr": "|u1", "fortran_order": False, "shape": (count, *pixels.shape[1:])}
                        np.lib.format.write_array_header_1_0(file, header)
                    file.write(np.ascontiguousarray(pixels).tobytes())
            fsync_path(aside)
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)

"""Images, or statistics of their features, in an .npz: as cm-sample, OpenAI's and EDM's tools write them."""

import hashlib
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.files import may_pass, patiently, regular, unreadable
from ..core.settings import excerpt
from .gaussian import Gaussian

_MOST_PACKED = 100  # times smaller than its array a file may be: images don't shrink so far, and zeros do
_ALLOWED = "uint8 images [N, H, W, C] as the first array, or float arrays mu [D] and sigma [D, D]"


def read_npz(path: Path) -> Tensor | Gaussian:
    """uint8 images [N, C, S, S], C 1 or 3, or statistics. Nothing in the file is run.

    Raises:
        InputError: it holds neither, or is damaged.
    """
    try:
        return patiently(lambda: _read(path))
    except InputError:
        raise
    except MemoryError:
        raise InputError(f"{path} is larger than the memory that is free", fix="fewer images") from None
    except Exception as error:  # what is no zip makes its reader raise nearly anything
        if may_pass(error):
            raise unreadable(path, error) from None
        reason = excerpt(error) or type(error).__name__
        raise InputError(f"{path} can't be read", reason, _ALLOWED) from None


def sha256_of_file(path: Path) -> str:
    """In hex. Raises InputError where it can't be read now."""
    try:
        with open(path, "rb", opener=regular) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(path, error) from None


def _read(path: Path) -> Tensor | Gaussian:
    with open(path, "rb", opener=regular) as file:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                if member.file_size > _MOST_PACKED * max(member.compress_size, 1 << 10):
                    raise ValueError(f"{member.filename} would unpack to {member.file_size:,} bytes")
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            if {"mu", "sigma"} <= set(arrays.files):
                return _statistics(arrays["mu"], arrays["sigma"])
            if not arrays.files:
                raise ValueError("no arrays")
            return _images(arrays[arrays.files[0]])


def _images(array: Any) -> Tensor:
    if array.dtype == np.uint8 and array.ndim == 3:
        array = array[..., None]  # grey
    good = array.dtype == np.uint8 and array.ndim == 4 and len(array) and array.shape[3] in (1, 3)
    if not good or array.shape[1] != array.shape[2]:
        raise ValueError(f"its first array is {array.dtype} {list(array.shape)}")
    return torch.from_numpy(array).permute(0, 3, 1, 2)


def _statistics(mu: Any, sigma: Any) -> Gaussian:
    is_float = mu.dtype.kind == sigma.dtype.kind == "f"
    if not is_float or mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise ValueError(f"mu is {mu.dtype} {list(mu.shape)}, sigma {sigma.dtype} {list(sigma.shape)}")
    mean, cov = (torch.from_numpy(np.asarray(a, np.float64)) for a in (mu, sigma))
    if not (mean.isfinite().all() and cov.isfinite().all()):
        raise ValueError("its statistics are not finite")
    return Gaussian(mean, (cov + cov.T) / 2, None)

"""What was computed once from content, kept in the user's cache under that content's hash."""

import os
import secrets
from collections.abc import Callable
from contextlib import suppress

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..core.user_cache import cache_folder

Tensors = dict[str, Tensor]


def kept(part: str, known: str, make: Callable[[], Tensors]) -> Tensors:
    """The tensors under `known`, a hash in hex of all that they are made of; made where they are not there, or broken.

    Args:
        part: of the cache, a folder's name.
    """
    path = cache_folder(part) / f"{known}.safetensors"
    with suppress(OSError, SafetensorError):
        return load_file(path)
    tensors = make()
    part_path = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with suppress(OSError, SafetensorError):  # it is no more than a shortcut
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part_path)
            os.replace(part_path, path)
        finally:
            part_path.unlink(missing_ok=True)
    return tensors

"""Named weights of a checkpoint: the file that holds them, whether they fit a network, and loading them into it."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...core.errors import InputError
from ...core.files import may_pass, unreadable
from ...core.settings import shown
from .manifest import DamagedCheckpoint, Manifest

_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}  # safetensors' names


def stem_of(folder: Path, manifest: Manifest, weights: str) -> str:
    """The file stem of named weights: "ema", "raw" or "ema_<decay>". Raises InputError where there are none."""
    stems = {name.removesuffix(".safetensors") for name in manifest.files if name.endswith(".safetensors")}
    stem = {"raw": "denoiser", "ema": manifest.ema}.get(weights, weights)
    if stem not in stems:
        known = ["ema", "raw", *sorted(s for s in stems if s.startswith("ema_"))]
        raise InputError(f"checkpoint {folder} has no such weights", weights, ", ".join(known))
    return stem


class WeightsFile:
    """A safetensors file, opened at once: what is open can be read to its end, whoever removes the checkpoint.

    Raises:
        DamagedCheckpoint: it is no such file.
        InputError: it can't be read now.
    """

    def __init__(self, file: Path):
        self.file = file
        try:
            self._stored = safe_open(file, "pt")
        except (SafetensorError, OSError) as error:
            raise self._trouble(error) from None

    def check_fits(self, module: nn.Module) -> None:
        """Compare the header with a network, which may be on the meta device; no tensor is read.

        Raises:
            InputError: naming the first tensor that one of both lacks, or whose shape or type differs.
        """
        own = module.state_dict()
        try:
            names = set(self._stored.keys())
            headers = {name: self._stored.get_slice(name) for name in own if name in names}
            types = {name: (header.get_dtype(), header.get_shape()) for name, header in headers.items()}
        except (SafetensorError, OSError) as error:
            raise self._trouble(error) from None
        for name in [*own, *sorted(names)]:
            if name not in names or name not in own:
                where = "network" if name in own else "checkpoint"
                raise InputError(f"{self.file} does not fit the network: only the {where} has {shown(name)}")
            (dtype, shape), wanted = types[name], list(own[name].shape)
            if shape != wanted or dtype != _DTYPES.get(own[name].dtype):
                raise InputError(
                    f"{self.file} does not fit the network: {name}",
                    f"{dtype} {shape}",
                    f"{_DTYPES.get(own[name].dtype, own[name].dtype)} {wanted}",
                )

    def tensor(self, name: str) -> Tensor:
        """One of its tensors, on the CPU."""
        tensor: Tensor = self._stored.get_tensor(name)
        return tensor

    def load_into(self, module: nn.Module) -> None:
        """Load all of it into `module`, in place. Raises InputError where it does not fit."""
        self.check_fits(module)
        with torch.no_grad():
            for name, value in module.state_dict().items():
                value.copy_(self.tensor(name))

    def _trouble(self, error: Exception) -> InputError:
        if may_pass(error):
            return unreadable(self.file, error)
        return DamagedCheckpoint(f"{self.file} can't be read: {error}")


def open_weights(folder: Path, manifest: Manifest, weights: str) -> WeightsFile:
    """The file of named weights, see `stem_of`. Raises InputError."""
    return WeightsFile(folder / f"{stem_of(folder, manifest, weights)}.safetensors")

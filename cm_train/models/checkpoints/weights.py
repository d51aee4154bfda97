"""Named weights of a checkpoint: the file that holds them, whether they fit a network, and loading them into it."""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...core.errors import InputError
from ...core.files import may_pass, unreadable
from ...core.settings import excerpt
from ..averages import MAX_WIDTH
from .manifest import DamagedCheckpoint, Manifest

POWER = "power_"  # ahead of its width, what a power-function average is called
_DTYPES = {torch.float32: "F32", torch.float64: "F64", torch.int64: "I64"}  # safetensors' names


def stem_of(folder: Path, manifest: Manifest, weights: str) -> str:
    """The file stem of named weights. Raises InputError where there are none."""
    stem = _stem(manifest, weights)
    if f"{stem}.safetensors" not in manifest.files:
        known = stored_weights(manifest)
        # None: of a run that takes none, and has no such average either, or of before a checkpoint listed them.
        if manifest.snapshots != [] and any(name.startswith(POWER) for name in known):
            known.append(f"{POWER}<width> of any width up to {MAX_WIDTH}, made of snapshots")
        raise InputError(f"checkpoint {folder} has no such weights", excerpt(weights), ", ".join(known))
    return stem


def stored_weights(manifest: Manifest) -> list[str]:
    """What `weights=` may say of a checkpoint: all that it holds, by their names."""
    stems = [name.removesuffix(".safetensors") for name in sorted(manifest.files) if name.endswith(".safetensors")]
    return ["ema", "raw", *(stem for stem in stems if stem != _stem(manifest, "raw"))]


def sha256_of_weights(manifest: Manifest, weights: str) -> str:
    """Of the weights' file; where they are made of snapshots, of the averaged ones', which only this checkpoint has."""
    files, averaged = manifest.files, _stem(manifest, "ema")
    return (files.get(f"{_stem(manifest, weights)}.safetensors") or files[f"{averaged}.safetensors"]).sha256


def _stem(manifest: Manifest, weights: str) -> str:
    return {"raw": "denoiser", "ema": manifest.ema}.get(weights, weights)


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
                raise InputError(f"{self.file} does not fit the network: only the {where} has {excerpt(name)}")
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

"""A denoiser called by hand: plain numbers where training has tensors, and one line on what does not fit.

A hook of what `load_denoiser` returns. The networks that train have none: their calls are made by us, and are many.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.errors import InputError
from ..core.settings import excerpt
from .denoiser import Denoiser, DenoiserConfig


def callable_by_hand(denoiser: Denoiser) -> Denoiser:
    """`denoiser`, which from here on takes numbers and lists too, and says what is wrong with its inputs."""
    denoiser.register_forward_pre_hook(_as_forward_takes_them, with_kwargs=True)
    return denoiser


def _as_forward_takes_them(denoiser: Denoiser, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
    """A forward pre-hook: the arguments `x, sigma, labels` as `Denoiser.forward` takes them."""
    names = ("x", "sigma", "labels", "dropout_keys")
    inputs = dict(zip(names, args, strict=False)) | given
    if torch.compiler.is_compiling() or len(args) > len(names) or not {"x", "sigma"} <= inputs.keys():
        return None  # Python says what is missing
    config, weight = denoiser.config, next(denoiser.parameters(), None)
    x = inputs["x"]
    _check_images(x, config, x if weight is None else weight)
    inputs["sigma"] = _sigma(inputs["sigma"], x)
    inputs["labels"] = _labels(inputs.get("labels"), x, config)
    return (), inputs


def _check_images(x: Any, config: DenoiserConfig, weight: Tensor) -> None:
    shape = config.image_shape
    allowed = f"a float tensor [N, {', '.join(map(str, shape))}]"
    if not isinstance(x, Tensor):
        raise InputError("x is no tensor", type(x).__name__, allowed, "torch.as_tensor(x)")
    if not x.is_floating_point():
        raise InputError("x has to be images in [-1, 1] plus noise", f"{x.dtype}", allowed, "x / 127.5 - 1")
    if x.ndim != 4 or x.shape[1:] != shape:
        fix = "x[None] for a single image" if x.shape == shape else None
        raise InputError("x is not of this model's images", f"shape {list(x.shape)}", allowed, fix)
    if x.device != weight.device:
        raise InputError("x and the model are on two devices", f"{x.device}", f"{weight.device}", "x.to(...)")
    if x.dtype == torch.float64 != weight.dtype:  # as NumPy makes them
        raise InputError("x is more exact than the model", f"{x.dtype}", f"{weight.dtype}", "x.float()")


def _sigma(sigma: Any, x: Tensor) -> Tensor:
    """The noise level of each image [B], on their device."""
    what, allowed = "sigma is the noise level", "a number above 0, or one for each image"
    if not isinstance(sigma, Tensor):
        try:
            sigma = torch.as_tensor(sigma, dtype=x.dtype)
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise InputError(what, excerpt(sigma), allowed) from None
        if not bool((sigma > 0).all()) or not bool(sigma.isfinite().all()):  # the network is told its logarithm
            raise InputError(what, excerpt(sigma.tolist()), allowed)
    if sigma.shape not in ((), (1,), (x.shape[0],)):
        raise InputError(what, f"shape {list(sigma.shape)} for {x.shape[0]} images", allowed)
    return sigma.to(x.device)


def _labels(labels: Any, x: Tensor, config: DenoiserConfig) -> Tensor | None:
    """The class of each image, int64 [B], on their device; None for a model without classes."""
    count, highest = config.num_classes, config.num_classes - 1 + config.null_label
    allowed = f"0 to {highest}{' (no class)' if config.null_label else ''}, or one for each image"
    if not count:
        if labels is not None:
            raise InputError("this model has no classes", f"labels {excerpt(labels)}", fix="drop labels")
        return None
    if labels is None:
        raise InputError("this model wants the class of each image", "no labels", allowed, "model(x, sigma, 0)")
    if not isinstance(labels, Tensor):
        labels = _plain_labels(labels, config, allowed)
    if labels.dtype not in (torch.int64, torch.int32):
        raise InputError("labels are whole numbers", f"{labels.dtype}", allowed, "labels.long()")
    if labels.shape not in ((), (1,), (x.shape[0],)):
        raise InputError("labels are one an image", f"shape {list(labels.shape)} for {x.shape[0]} images", allowed)
    return labels.to(x.device).expand(x.shape[0])


def _plain_labels(labels: Any, config: DenoiserConfig, allowed: str) -> Tensor:
    for label in [labels] if isinstance(labels, str) or not isinstance(labels, Sequence) else labels:
        if isinstance(label, str):
            known = label in config.class_names
            fix = f"labels={config.class_names.index(label)}, or generate(), which takes names" if known else None
            raise InputError("labels are numbers here", label, allowed, fix)
    try:
        numbers = torch.as_tensor(labels)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise InputError("labels are numbers", excerpt(labels), allowed) from None
    if not bool(((numbers >= 0) & (numbers < config.num_classes + config.null_label)).all()):
        raise InputError("no such class", excerpt(labels), allowed)
    return numbers

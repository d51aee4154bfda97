"""When networks are compiled, and how all ranks come to do the same."""

from collections.abc import Callable
from typing import Literal

import torch

from ..core.errors import InputError
from ..core.terminal import say
from ..core.world import World
from ..models.backbones.base import BackboneConfig
from ..models.compiling import CompiledBlocks, CompileError, cache_folder, num_kinds
from ..models.denoiser import Denoiser, forward_flops

Compile = Literal["auto", "true", "false"]

# What `auto` reckons with, measured on one H200: a network of 61 M parameters at 32x32 trains 2.03 times faster with
# compiled blocks, at 120 TFLOP/s before; compiling took 154 s for its 24 graphs, beside other work.
_EAGER_FLOPS = 120e12  # a second
_SAVED = 0.5  # of the time
_GRAPH_S = 6.0  # to compile one
_PASSES = 4  # forward passes that a step costs at least: three for the student with its gradient, one for its goal
_MARGIN = 2.0  # by how much compiling must repay


def pays(flops: float, images: int, num_graphs: int) -> bool:
    """Whether compiling is worth its time on a GPU; a function of the run alone, so that a resume decides the same.

    Args:
        flops: of the network's forward pass of one image.
        images: that the whole run trains on.
        num_graphs: distinct blocks, with and without gradient.
    """
    return _SAVED * _PASSES * flops * images / _EAGER_FLOPS > _MARGIN * _GRAPH_S * num_graphs


def compiles(
    setting: Compile, device: torch.device, denoiser: Denoiser, backbone: BackboneConfig, images: int
) -> tuple[bool, str]:
    """Whether `setting` means that the blocks of `denoiser` are compiled for a run of so many images, and why."""
    if setting != "auto":
        return setting == "true", f"{'compiled' if setting == 'true' else 'not compiled'}, as compile={setting} says"
    if device.type != "cuda":
        return False, "not compiled, which does not pay on a CPU"
    num_graphs = 2 * num_kinds(denoiser)
    if pays(forward_flops(denoiser.config, backbone), images, num_graphs):
        return True, f"compiled, which the run is long enough to repay ({num_graphs} graphs or so)"
    return False, f"not compiled, which the run is too short to repay ({num_graphs} graphs or so)"


def compile_alike(
    blocks: CompiledBlocks,
    try_out: Callable[[], object],
    setting: Compile,
    world: World,
    should_stop: Callable[[], bool],
) -> bool:
    """Compile what `try_out` calls, on every rank or on none. Called by all of them.

    Returns:
        False where `should_stop` ended it early on some rank.

    Raises:
        InputError: it can't be done, and `setting` demands it. Elsewhere the blocks are called as written, which is
            said.
    """
    num = blocks.meet(try_out)
    if world.is_main:
        say(f"compiling {num} graphs, kept in {cache_folder()} for the next start")
    done, trouble = False, ""
    try:
        done = blocks.compile(should_stop)
    except CompileError as error:
        trouble = str(error)
    stopped, failed = world.any_rank(not done and not trouble, bool(trouble))
    if failed:  # none does it then: ranks would round differently
        reason = world.first_message(trouble)
        if setting == "true":
            fix = "install gcc and Python's headers (build-essential, python3-dev), or set compile=false"
            raise InputError(f"compile=true, and this machine can't compile: {reason}", fix=fix)
        if world.is_main:
            say(f"note: the networks could not be compiled, and train uncompiled: {reason}")
        blocks.release()
    return not stopped

"""Compiled networks: each distinct block once, before the first step, and never in the middle of training."""

import contextlib
import copy
import logging
import os
import tempfile
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core import user_cache
from ..core.memory import needed_memory
from ..core.progress import progress
from .backbones.base import Block


class CompileError(Exception):
    """The compiler is missing, or could not compile a block; the message says why in one line."""


def num_kinds(network: nn.Module) -> int:
    """How many distinct blocks `network` has."""
    return len({kind_of(m) for m in network.modules() if isinstance(m, Block)})


def cache_folder() -> Path:
    """Where compiled graphs are kept for the next start: TORCHINDUCTOR_CACHE_DIR, or cm-train's own cache folder."""
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR")
    # Torch names its own choice there, a temporary folder, as soon as anything asks for it, and ranks inherit that.
    of_torch = given is None or given.startswith(os.path.join(tempfile.gettempdir(), "torchinductor_"))
    if given and not of_torch:
        return Path(given)
    return user_cache.cache_folder("inductor")


@dataclass(frozen=True)
class _Input:
    """All that a graph knows of a tensor before it sees one."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "_Input":
        return cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad)

    def zeros(self, device: torch.device) -> Tensor:
        tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)
        return tensor.zero_().requires_grad_(self.requires_grad)


@dataclass(frozen=True)
class _Key:
    """What decides which graph serves a call: blocks of one kind share theirs."""

    kind: int  # blocks with the same settings and the same shapes of weights
    inputs: tuple[_Input | None, ...]
    autocast: torch.dtype | None
    grad: bool
    trained: bool  # whether its weights ask for a gradient, where there is one
    arithmetic: tuple[str, bool]  # what float32 means, and whether bits must be equal each time; see `arithmetic`


def _block(block: Block, *inputs: Tensor | None) -> Tensor:
    return block.forward(*inputs)


class CompiledBlocks:
    """The blocks of some networks, called compiled wherever a graph was made for such a call; as written elsewhere.

    One graph serves all blocks of one kind, in every network: the student without gradient, the target and the teacher
    share theirs. Nothing is compiled but in `compile`.

    Args:
        networks: on their device, with their weights where they stay: in-place changes are seen, moves are not.
    """

    def __init__(self, *networks: nn.Module):
        blocks = {m: None for network in networks for m in network.modules() if isinstance(m, Block)}
        kinds: dict[Any, int] = {}
        self._kinds = {block: kinds.setdefault(kind_of(block), len(kinds)) for block in blocks}
        self._trained = {block for block in blocks if any(p.requires_grad for p in block.parameters())}
        # Where no gradient is wanted a trained block is called by a frozen twin that sees the same weights: the
        # compiler tells tensors that require a gradient from those that don't, and would make every graph twice.
        self._frozen = {block: _frozen_twin(block) if block in self._trained else block for block in blocks}
        self._graphs: dict[_Key, Callable[..., Tensor]] = {}
        self._wanted: dict[_Key, Block] = {}  # the calls without a graph that `meet` has seen, each with a block
        self._meeting = False
        for block in blocks:
            block.compiled = self._call

    @property
    def num_graphs(self) -> int:
        """How many distinct graphs there are."""
        return len(self._graphs)

    def release(self) -> None:
        """Have every block called as written again."""
        for block in self._kinds:
            block.compiled = None

    def meet(self, run: Callable[[], object]) -> int:
        """Note the calls in `run` that have no graph yet, and make them as written; returns how many kinds there are.

        What a backward pass would need is thrown away, so that a network fits here that only fits compiled.
        """
        self._wanted, self._meeting = {}, True
        try:
            with torch.autograd.graph.saved_tensors_hooks(lambda tensor: None, lambda nothing: nothing):
                run()
        finally:
            self._meeting = False
        return len(self._wanted)

    def compile(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Compile what `meet` has noted. Returns False where `should_stop`, asked between two graphs, ended it early.

        Raises:
            CompileError: it can't be done here.
        """
        with _quietly(), progress(len(self._wanted), "compiling blocks") as bar:
            for key, block in self._wanted.items():
                assert key.arithmetic == _arithmetic(), "compiled as it was met"
                if should_stop():
                    return False
                try:
                    self._graphs[key] = self._compiled(key, block)
                except Exception as error:
                    if needed_memory(error) is not None:
                        raise
                    raise CompileError(_reason(error)) from error
                bar.advance()
        return True

    def _call(self, block: Block, *inputs: Tensor | None) -> Tensor:
        grad = torch.is_grad_enabled()
        known = tuple(None if t is None else _Input.of(t) for t in inputs)
        trained, arithmetic = grad and block in self._trained, _arithmetic()
        key = _Key(self._kinds[block], known, _autocast(inputs), grad, trained, arithmetic)
        graph = self._graphs.get(key)
        if graph is not None:
            return graph(block if grad else self._frozen[block], *inputs)
        if self._meeting:
            self._wanted.setdefault(key, block)
        return block.forward(*inputs)

    def _compiled(self, key: _Key, block: Block) -> Callable[..., Tensor]:
        """A graph for `key`, compiled by calling it once on zeros, and its backward graph with it."""
        # Code of its own: the compiler keeps the graphs of one code object in one list and searches that at each call.
        code = _block.__code__.replace(co_name=f"block_{len(self._graphs)}")
        function = types.FunctionType(code, _block.__globals__)
        graph = torch.compile(function, dynamic=False, fullgraph=True)
        device = next(block.parameters()).device
        inputs = [None if i is None else i.zeros(device) for i in key.inputs]
        half = key.autocast is not None
        with torch.set_grad_enabled(key.grad), torch.autocast(device.type, dtype=key.autocast, enabled=half):
            output = graph(block if key.grad else self._frozen[block], *inputs)
        trained = [t for t in [*block.parameters(), *inputs] if t is not None and t.requires_grad]
        if key.grad and trained:
            # Not `backward`: that would add to the gradients, and tell the data-parallel wrapper of them.
            torch.autograd.grad(output, trained, torch.zeros_like(output), allow_unused=True)
        return graph


def kind_of(block: Block) -> Any:
    """Equal for blocks that compute the same function of inputs, weights and buffers."""
    modules = [(name, type(m), m.extra_repr(), _plain_attributes(m)) for name, m in block.named_modules()]
    tensors = [*block.named_parameters(), *block.named_buffers()]
    # Alignment too: on a GPU a graph reads its weights sixteen bytes at once where those of its first block allow it.
    shapes = [(name, tuple(t.shape), t.stride(), t.dtype, _misaligned(t)) for name, t in tensors]
    return tuple(modules), tuple(shapes)


def _misaligned(tensor: Tensor) -> int:
    return 0 if tensor.is_meta else tensor.data_ptr() % 16


def _plain_attributes(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """What a module's `forward` may branch on, but for its mode: no block of ours asks whether it trains."""
    plain = [(name, value) for name, value in vars(module).items() if isinstance(value, int | float | str | None)]
    return tuple((name, value) for name, value in plain if name not in ("training", "recomputed"))


def _frozen_twin(block: Block) -> Block:
    """A copy of `block` in evaluation mode that sees its very weights and buffers, and asks no gradient of them."""
    seen: dict[int, Any] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in block.parameters()}
    seen |= {id(b): b for b in block.buffers()}
    return copy.deepcopy(block, seen).eval()


def _arithmetic() -> tuple[str, bool]:
    return torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()


def _autocast(inputs: tuple[Tensor | None, ...]) -> torch.dtype | None:
    kind = next(t for t in inputs if t is not None).device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """The compiler without its advice, and with its cache where `cache_folder` says."""
    folder = cache_folder()
    with contextlib.suppress(OSError):  # nowhere to keep it: torch takes the temporary folder
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    logger = logging.getLogger("torch.utils.cpp_extension")  # of a CUDA that isn't there
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "TensorFloat32 tensor cores")  # precision=tf32 is the user's to choose
            yield
    finally:
        logger.setLevel(level)


def _reason(error: BaseException) -> str:
    """The first line that says something, without the compiler's stack of wrappers."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__

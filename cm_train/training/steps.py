"""A run's training steps, one at a time: batch, loss, backward, step, averages."""

import contextlib
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..core.errors import OutOfMemory
from ..core.memory import needed_memory, shortage_explained
from ..core.world import World
from ..data.loader import Loader
from ..data.pixels import to_unit_range
from ..models.checkpoints.manifest import Manifest
from ..models.compiling import CompiledBlocks
from ..objectives.base import Batch, Objective
from .compile_policy import compile_alike
from .config import RunConfig
from .state import TrainState


class MicroBatch(NamedTuple):
    """A part of a step's images, as the data set has them."""

    rows: range  # their positions in the global batch
    images: Tensor  # uint8 [B, C, H, W]
    labels: Tensor | None  # int64 [B]


class Steps:
    """Optimizer steps of `objective` on what `loader` gives; see `Trainer` for the arguments."""

    def __init__(
        self,
        config: RunConfig,
        objective: Objective,
        loader: Loader,
        device: torch.device,
        autocast: torch.dtype | None,
        compiled: bool,
        world: World,
    ):
        self.config, self.objective, self.loader, self.device = config, objective, loader, device
        self.autocast, self.world = autocast, world
        self.rows = world.share(config.batch_size)
        whole, given = len(self.rows), config.micro_batch
        self.micro_batch = given if isinstance(given, int) else whole
        self.state = TrainState(config, objective, device, autocast)
        # After the weights have moved: blocks and wrapper remember where they are.
        self.blocks = CompiledBlocks(objective, self.state.averages[0].denoiser) if compiled else None
        self._is_prepared = False
        self.model: Any = objective
        if world.size > 1:
            ids = [world.local_rank] if device.type == "cuda" else None
            with warnings.catch_warnings(), world.waiting():  # the name that torch 2.11 knows is deprecated in 2.14
                warnings.simplefilter("ignore", FutureWarning)
                self.model = DistributedDataParallel(self.model, device_ids=ids, broadcast_buffers=False)

    @property
    def step(self) -> int:
        """Steps done."""
        return self.state.step

    def resume(self, folder: Path, manifest: Manifest) -> None:
        """Go on from a verified checkpoint exactly as if the run had never stopped.

        Raises:
            InputError: the checkpoint does not fit this run.
        """
        self.state.load(folder, manifest, self.world)

    def fetch(self) -> list[MicroBatch]:
        """This rank's micro-batches of the coming step.

        Raises:
            InputError: an image can't be read.
        """
        starts = range(self.rows.start, self.rows.stop, self.micro_batch)
        shares = [range(start, start + self.micro_batch) for start in starts]
        return [MicroBatch(rows, *self.loader.batch_at(self.step, rows)) for rows in shares]

    def train_step(self, data: list[MicroBatch]) -> None:
        """One optimizer step on what `fetch` gave; nothing in it waits for the device."""
        self.state.gradient.zero_()
        reported = []
        for part in data:
            batch = self.objective.draw(to_unit_range(part.images), part.labels, self.step, part.rows)
            reported.append((self._backward(batch, last=part is data[-1]), batch.levels["sigma"]))
        # Only now: a step that ran out of memory in its second half is made again, whole.
        for values, sigma in reported:
            self.state.window.add(values, sigma)
        self.state.advance()

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def _backward(self, batch: Batch, last: bool) -> dict[str, Tensor]:
        """Add a micro-batch's share to the gradient; the last one of a step averages it over the ranks."""
        with contextlib.nullcontext() if last or self.world.size == 1 else self.model.no_sync():
            with self._autocast(), self.world.waiting():  # DDP may agree on its buckets in there
                loss, metrics = self.model(batch)
            total = loss.sum()
            # An infinite loss may have a finite gradient; this one tells every rank to skip the step.
            total = total * torch.where(torch.isfinite(total), 1.0, torch.nan)
            # Ranks average their gradients, so each counts its share `size` times.
            share = self.state.loss_scale.factor * self.world.size / self.config.batch_size
            with self.world.waiting():  # DDP sums gradients in there
                (total * share).backward()
        return {"loss": loss.detach(), **metrics}

    def prepare(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """What comes before the first step of every start: the blocks are compiled where that is wanted. Done once.

        Returns:
            False where `should_stop` ended it early.

        Raises:
            InputError: compile=true can't be had here.
            OutOfMemory: a micro-batch does not fit.
        """
        if self._is_prepared or self.step >= self.config.steps:
            return True
        with shortage_explained(f"in step {self.step + 1}", self._for_less_memory()):
            if self.blocks is not None:
                setting = self.config.compile
                if not compile_alike(self.blocks, self.try_out, setting, self.world, should_stop):
                    return False
            self._lay_out_buckets()
        self._is_prepared = True
        return True

    def try_out(self) -> None:
        """The forward pass of a step, on a batch that counts for nothing."""
        with self._autocast():
            self.objective(self._black_batch())

    def _lay_out_buckets(self) -> None:
        """Let DDP lay out its buckets before the first step of every start, on a batch that counts for nothing.

        It does so once, after the first backward pass, and with the layout the order of summation changes: a resumed
        run would add three ranks' gradients in another order than the uninterrupted one.
        """
        if self.world.size > 1:
            self._backward(self._black_batch(), last=True)

    def _black_batch(self) -> Batch:
        """A micro-batch of black images, drawn as the coming step's."""
        config = self.objective.denoiser.config
        rows = range(self.rows.start, self.rows.start + self.micro_batch)
        black = torch.zeros(len(rows), *config.image_shape, device=self.device)
        labels = torch.zeros(len(rows), dtype=torch.int64, device=self.device) if config.num_classes else None
        return self.objective.draw(black, labels, self.step, rows)

    def _try_step(self, data: list[MicroBatch]) -> str | None:
        """One step; what was needed where memory ran out. A rank among others can't go on without them, and raises."""
        try:
            self.train_step(data)
        except Exception as error:
            needed = needed_memory(error)
            if needed is None:
                raise
            if self.world.size > 1:
                raise self._out_of_memory(needed) from error
            return needed
        return None

    def _out_of_memory(self, needed: str) -> OutOfMemory:
        return OutOfMemory(f"in step {self.step + 1}", needed, self._for_less_memory())

    def _for_less_memory(self) -> str:
        smaller = [m for m in range(1, self.micro_batch // 2 + 1) if len(self.rows) % m == 0]
        batch = f"micro_batch={smaller[-1]} (now {self.micro_batch}), or " if smaller else ""
        again = "" if self.config.activation_checkpointing else "activation_checkpointing=true, or "
        return f"{batch}{again}a smaller backbone= or batch_size="

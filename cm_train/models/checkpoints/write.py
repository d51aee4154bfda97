"""Writing checkpoints: copied in one go, written beside training, seen whole or not at all."""

import contextlib
import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ...core.errors import InputError
from ...core.run_layout import CHECKPOINTS, STATE, step_of
from ...core.terminal import complain
from .host_memory import HostMemory
from .manifest import FORMAT, MANIFEST, FileEntry, Manifest, signed
from .needed import is_needed
from .read import folders
from .verify import sha256_of

_NO_RENAMING = (errno.EPERM, errno.EACCES, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EXDEV)


class CantAppear(OSError):
    """A checkpoint is written, and its folder can't get its name: on this file system none ever will."""


def write(
    folder: Path, weights: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any] | None, **manifest: Any
) -> None:
    """Write a checkpoint as `folder`; nothing is seen under that name until all of it is on the disk.

    Args:
        weights: file stem -> tensors by name: "denoiser" and one "ema_<decay>" a decay.
        state: tensors and plain values that resuming needs; None for a snapshot, which nothing resumes from.
        manifest: the fields of `Manifest` beside `format` and `files`.

    Raises:
        OSError: the disk is full or not writable; a checkpoint that existed before is untouched.
    """
    beside = folder.with_name(f".{folder.name}.writing")
    remove_unfinished(folder.parent)
    beside.mkdir(parents=True)
    try:
        for stem, tensors in weights.items():
            # safetensors stores plain row-major tensors that share no memory.
            plain = {
                name: value.detach().cpu().clone(memory_format=torch.contiguous_format)
                for name, value in tensors.items()
            }
            save_file(plain, beside / f"{stem}.safetensors")
        if state is not None:
            torch.save(_whole(state), beside / STATE)
        files = {}
        for path in sorted(beside.iterdir()):
            _fsync(path)
            files[path.name] = FileEntry(sha256=sha256_of(path), size=path.stat().st_size)
        values = Manifest(format=FORMAT, files=files, **manifest).model_dump(mode="json")
        (beside / MANIFEST).write_text(signed(values))
        for name in files:  # safetensors lets nobody else read its own, whatever the umask says
            os.chmod(beside / name, (beside / MANIFEST).stat().st_mode)
        _fsync(beside / MANIFEST)
        _fsync(beside)
        if folder.exists():  # a damaged leftover: a good one is never written twice
            shutil.rmtree(folder)
        try:
            os.replace(beside, folder)
        except OSError as error:
            if error.errno not in _NO_RENAMING:
                raise
            raise CantAppear(error.errno, f"this file system can't rename folders ({error.strerror})") from error
        _fsync(folder.parent)
    except (SafetensorError, RuntimeError) as error:  # what the two writers make of a full disk
        raise OSError(errno.EIO, str(error).splitlines()[0]) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def remove_unfinished(home: Path) -> None:
    """Remove what a killed run has left half written or half deleted among the checkpoints in `home`."""
    for left in home.glob(".step_*.writing"):
        with contextlib.suppress(OSError):
            left.unlink() if left.is_symlink() else shutil.rmtree(left)


def _whole(tree: Any) -> Any:
    """`tree` with a storage of its own for each tensor: with a view, `torch.save` writes all that it is a view of."""
    if isinstance(tree, Mapping):
        return {key: _whole(value) for key, value in tree.items()}
    is_view = isinstance(tree, Tensor) and tree.untyped_storage().nbytes() > tree.nbytes
    return tree.clone() if is_view else tree


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def prune(run: Path, keep: int, spared: int | None = None) -> None:
    """Delete the oldest checkpoints of a run, leaving the newest `keep`; what can't be deleted stays for now.

    Args:
        spared: the step of one that stays too.
    """
    old: list[Path] = []
    with contextlib.suppress(InputError):  # they can't be seen now
        old = [f for f in folders(run)[keep:] if not is_needed(f) and (spared is None or step_of(f.name) != spared)]
    for folder in old:
        with contextlib.suppress(OSError):  # under another name first: half a checkpoint must not look like one
            os.replace(folder, folder.with_name(f".{folder.name}.writing"))
    if old:
        remove_unfinished(run / CHECKPOINTS)


class Saver:
    """Saves checkpoints: at leisure beside training, or at once. One write at a time.

    Args:
        before: called with the step ahead of each write: what it syncs is on the disk before the checkpoint appears,
            and what it returns is in its manifest too.
        after: called with the step once the checkpoint is there.
        saved_step: of the newest checkpoint that there is.
        expected_s: what a write may take, before one has been seen.

    Attributes:
        num_refused: how many writes in a row ended because the file system can't rename folders.
    """

    def __init__(
        self,
        before: Callable[[int], Mapping[str, Any]] = lambda step: {},
        after: Callable[[int], None] = lambda step: None,
        saved_step: int = 0,
        expected_s: float = 0.0,
    ):
        self._before, self._after, self.num_refused = before, after, 0
        self._memory = HostMemory()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None  # why the last write failed
        self._saved_step = saved_step
        self.longest_s = expected_s  # what a write takes at most, as far as is known

    def prepare(self, weights: Any, state: Any) -> None:
        """Make the first save as quick as the later ones, beside training; `weights` and `state` as it will get."""
        self._memory.reserve({"weights": weights, "state": state})

    def start(self, folder: Path, weights: Any, state: Any, **manifest: Any) -> None:
        """Copy everything now and write it beside training; a failure is said, and left to the next save."""
        self.wait()
        try:
            copies = self._memory.copy({"weights": weights, "state": state})
        except RuntimeError as error:
            complain(f"could not save step {manifest['step']}: {error}; trying again at the next save")
            return
        self._begin(folder, copies["weights"], copies["state"], manifest, complaining=True)

    def now(self, folder: Path, weights: Any, state: Any, **manifest: Any) -> None:
        """Write at once, unless this step is saved already. Raises OSError, and whatever else went wrong."""
        self.wait()
        if manifest["step"] == self._saved_step:
            return
        # Without memory for a copy the tensors serve themselves: who needs the checkpoint now waits for it.
        with contextlib.suppress(RuntimeError):
            copies = self._memory.copy({"weights": weights, "state": state})
            weights, state = copies["weights"], copies["state"]
        self._begin(folder, weights, state, manifest, complaining=False)
        self.wait()
        if self._error is not None:
            raise self._error

    def settle(self) -> None:
        """Return when nothing is being written; from any thread."""
        thread = self._thread
        if thread is not None:
            thread.join()

    def wait(self) -> None:
        """`settle`, from the thread that starts writes."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def close(self) -> None:
        """Wait, and give back what saving has held."""
        self.wait()
        self._memory.release()

    def _begin(self, folder: Path, weights: Any, state: Any, manifest: dict[str, Any], complaining: bool) -> None:
        def work() -> None:
            self._error = None
            try:
                self._write(folder, weights, state, manifest)
            except BaseException as error:  # whatever it is, who waits for this save hears of it
                self._error = error
                self.num_refused = self.num_refused + 1 if isinstance(error, CantAppear) else 0
                if complaining:
                    reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
                    complain(f"could not save step {manifest['step']}: {reason}; trying again at the next save")

        thread = threading.Thread(target=work, name="save", daemon=True)  # `wait` is how to end in good order
        thread.start()
        self._thread = thread  # only now: `settle` may be asked by another thread, and waits for none that is to start

    def _write(self, folder: Path, weights: Any, state: Any, manifest: dict[str, Any]) -> None:
        began, step = time.monotonic(), manifest["step"]
        write(folder, weights, state, **manifest, **self._before(step))
        self.longest_s = max(self.longest_s, time.monotonic() - began)
        self._saved_step, self.num_refused = step, 0
        self._after(step)

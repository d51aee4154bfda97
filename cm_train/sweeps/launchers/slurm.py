"""Sweeps through submitit: what hydra/launcher=submitit_* means here, on top of Hydra's own plugin.

Other than the plugin it can show the script instead of submitting it (hydra.launcher.dry=true), reports jobs as they
start and end, goes on when one of them fails, and leaves the queue in order when the sweep is stopped.
"""

import contextlib
import io
import math
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, filter_overrides
from hydra_plugins.hydra_submitit_launcher.submitit_launcher import BaseSubmititLauncher

from ...core.errors import InputError

_RESULT_PATIENCE_S = 15.0  # a shared disk may show a job's result this long after the job has ended


@dataclass
class _Submitted:
    """One job of the sweep, from its overrides to what it returned."""

    number: int
    overrides: list[str]
    handle: Any = None  # submitit's
    started: bool = False
    ended_at: float | None = None  # gone without a result so far
    result: JobReturn | None = None

    @property
    def label(self) -> str:
        return f"job {self.number} ({' '.join(filter_overrides(self.overrides))})"

    @property
    def first(self) -> Any:
        """Its task on the first node, which speaks for all."""
        return self.handle.task(0)

    def look(self) -> None:
        """See whether it has started or ended."""
        from ...core.terminal import say

        log = self.first.paths.stdout
        if not self.started and log.exists():
            self.started, self.ended_at = True, None
            say(f"{self.label} runs as {self.first.job_id}, log {log}")
        if self.first.paths.result_pickle.exists():
            self._take_result()
        elif self.ended_at is None and self.first.done():
            self.ended_at = time.monotonic()
        elif self.ended_at is not None and time.monotonic() > self.ended_at + _RESULT_PATIENCE_S:
            if self.started:
                self.fail(f"failed without a result ({self.first.state}), log {log}")
            else:
                self.fail("did not start")

    def _take_result(self) -> None:
        from ...core.terminal import say

        log = self.first.paths.stdout
        try:
            returned = self.first.result()
        except Exception as error:  # raised by the job, or its result can't be read
            lines = [line for line in str(error).splitlines() if "Error" in line or "Exception" in line]
            self.fail(f"failed: {lines[-1].strip() if lines else type(error).__name__}, log {log}")
            return
        if returned.status != JobStatus.COMPLETED:
            self.fail(f"failed: {returned._return_value!r}, log {log}")
            return
        self.result = returned
        say(f"{self.label} ended")

    def fail(self, how: str) -> None:
        """Give it the result of a failed job: None, for which no sweeper ends the sweep."""
        from ...core.terminal import say

        say(f"{self.label} {how}")
        self.result = JobReturn(self.overrides, status=JobStatus.COMPLETED)
        self.result.return_value = None


class _SubmititLauncher(BaseSubmititLauncher):
    """What is the same on a cluster and on one machine."""

    _POLL_S = 1.0
    _NOT_PARAMETERS = frozenset({"submitit_folder", "max_num_timeout"})

    def __init__(self, dry: bool, **params: Any) -> None:
        super().__init__(**params)
        self._dry = dry
        self._parameters = {k: v for k, v in self.params.items() if k not in self._NOT_PARAMETERS and v is not None}

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run every job to its end; None is the result of those that failed or were not started any more.

        Raises:
            InputError: there is no Slurm, or it refuses the jobs.
            SystemExit: with dry=true, after printing what would be submitted.
        """
        jobs = [_Submitted(initial_job_idx + i, list(overrides)) for i, overrides in enumerate(job_overrides)]
        executor = self._executor()
        if self._dry:
            print(self._preview(executor, len(jobs)), *(f"# {job.label}" for job in jobs), sep="\n", flush=True)
            raise SystemExit(0)
        assert self.config is not None
        folder = Path(str(self.config.hydra.sweep.dir))
        folder.mkdir(parents=True, exist_ok=True)
        is_stopping = False
        try:
            while left := [job for job in jobs if job.result is None]:
                if not is_stopping and (folder / "stop").exists():
                    is_stopping = True
                    self._cancel_waiting(left)
                if not is_stopping:
                    self._submit_some(executor, left)
                self._refresh(left, is_stopping)
                for job in left:
                    if job.handle is not None:
                        job.look()
                time.sleep(self._POLL_S)
        except KeyboardInterrupt:  # nobody waits for the end, but it shall come
            (folder / "stop").touch()
            if not is_stopping:
                self._cancel_waiting(left)
            raise
        return [job.result for job in jobs if job.result is not None]

    def _arguments(self, job: _Submitted) -> tuple[Any, ...]:
        """What the plugin's __call__ takes."""
        return job.overrides, "hydra.sweep.dir", job.number, f"job_id_for_{job.number}", Singleton.get_state()


class SlurmLauncher(_SubmititLauncher):
    """One Slurm array a batch of jobs."""

    _EXECUTOR = "slurm"
    _refreshed = -math.inf

    def _executor(self) -> Any:
        import submitit

        anywhere = self._dry

        class Executor(submitit.SlurmExecutor):
            @classmethod
            def affinity(cls) -> int:
                return 2 if anywhere else super().affinity()  # a script can be shown without a cluster

        if not anywhere and (shutil.which("sbatch") is None or shutil.which("srun") is None):
            fix = "run it on the cluster's login node; hydra.launcher.dry=true shows the script here"
            raise InputError("hydra/launcher=submitit_slurm needs Slurm, and this machine has no sbatch", fix=fix)
        executor = Executor(self.params["submitit_folder"], max_num_timeout=self.params["max_num_timeout"])
        parameters = {"wckey": None, **self._parameters}  # else submitit's own name, which some clusters refuse
        if "cpus_per_task" in parameters:  # from 22.05 on srun does not take it over from sbatch
            parameters["srun_args"] = [f"--cpus-per-task={parameters['cpus_per_task']}"]
        executor.update_parameters(**executor._convert_parameters(parameters))
        return executor

    def _preview(self, executor: Any, num: int) -> str:
        if num > 1:
            executor.parameters["map_count"] = num
        return str(executor._make_submission_file_text(executor._submitit_command_str, ""))

    def _submit_some(self, executor: Any, left: list[_Submitted]) -> None:
        from submitit.core.utils import FailedJobError

        from ...core.terminal import say

        if left[0].handle is not None:
            return  # all at once, as one array
        arguments = zip(*map(self._arguments, left), strict=True)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # submitit prints sbatch's words, and raises them too
                handles = executor.map_array(self, *arguments)
        except FailedJobError as error:
            message = " ".join(str(error).split()) or "sbatch failed"
            raise InputError("Slurm refused the jobs", message, fix="hydra.launcher.dry=true shows them") from error
        for job, handle in zip(left, handles, strict=True):
            job.handle = handle
        say(f"{len(left)} jobs submitted, from {handles[0].job_id} to {handles[-1].job_id}")

    def _cancel_waiting(self, left: list[_Submitted]) -> None:
        """Take out of the queue what waits there, those that were put back into it included."""
        from ...core.terminal import say

        waiting = [job for job in left if not job.started]
        say(f"stopping: {len(waiting)} jobs are taken back, {len(left) - len(waiting)} save and end")
        ids = [job.handle.job_id for job in left if job.handle is not None]
        if ids:
            subprocess.run(["scancel", "--state=PENDING", *ids], check=False)
        for job in waiting:
            if job.handle is None:
                job.fail("did not start")
            else:
                job.ended_at = time.monotonic()  # unless it turns out to have started in this moment

    def _refresh(self, left: list[_Submitted], is_stopping: bool) -> None:
        """Ask Slurm about all jobs at once, now and then; by itself submitit waits up to ten minutes."""
        if time.monotonic() > self._refreshed + (5.0 if is_stopping else 60.0):
            handle = next((job.handle for job in left if job.handle is not None), None)
            if handle is not None:
                handle.watcher.update()
            self._refreshed = time.monotonic()


class LocalLauncher(_SubmititLauncher):
    """Jobs as processes of this machine, `array_parallelism` at a time."""

    _EXECUTOR = "local"
    _POLL_S = 0.3
    _NOT_PARAMETERS = _SubmititLauncher._NOT_PARAMETERS | {"array_parallelism"}

    def _executor(self) -> Any:
        import submitit

        executor = submitit.LocalExecutor(
            self.params["submitit_folder"], max_num_timeout=self.params["max_num_timeout"]
        )
        executor.update_parameters(**self._parameters)
        return executor

    def _preview(self, executor: Any, num: int) -> str:
        return f"# processes of this machine, {self.params['array_parallelism']} at a time"

    def _submit_some(self, executor: Any, left: list[_Submitted]) -> None:
        waiting = [job for job in left if job.handle is None]
        for job in waiting[: max(0, self.params["array_parallelism"] - (len(left) - len(waiting)))]:
            # Ctrl-C reaches the whole terminal, and submitit's controller would kill its job a second later.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            try:
                job.handle = executor.submit(self, *self._arguments(job))
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _cancel_waiting(self, left: list[_Submitted]) -> None:
        for job in left:
            if job.handle is None:
                job.fail("did not start")

    def _refresh(self, left: list[_Submitted], is_stopping: bool) -> None:
        pass

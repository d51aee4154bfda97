"""hydra/launcher=joblib: Hydra's plugin, whose workers hear of signals from their leader alone."""

import signal
from collections.abc import Sequence
from multiprocessing import resource_tracker

from hydra.core.utils import JobReturn
from hydra_plugins.hydra_joblib_launcher.joblib_launcher import JoblibLauncher as Plugin

from ...core.signals import CAUGHT


class JoblibLauncher(Plugin):
    """A signal to a whole terminal would end workers that have no job yet or no more, and joblib then ends them all."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        # Its start lets signals in, and would otherwise come just before the workers inherit what is blocked.
        resource_tracker.ensure_running()
        # Blocked for this thread and the processes that it starts; the sweep's other thread still takes signals, and a
        # job's StopFlag lets them in.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, CAUGHT)
        try:
            returns: Sequence[JobReturn] = super().launch(job_overrides, initial_job_idx)
            return returns
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

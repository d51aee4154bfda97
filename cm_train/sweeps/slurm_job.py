"""Inside a job that submitit started: which nodes it has, and being put back into the queue when its time is over."""

import os
import signal

from ..core.signals import StopFlag
from ..core.terminal import say
from ..runs.launch import Nodes

_FIRST_PORT, _NUM_PORTS = 20000, 12000  # below what Linux gives to outgoing connections


def in_job() -> bool:
    """Whether submitit started this process, on Slurm or locally."""
    return "SUBMITIT_EXECUTOR" in os.environ


def nodes() -> Nodes | None:
    """The nodes of this job; None where it has only one, or where this is no job."""
    if not in_job():
        return None
    from submitit import JobEnvironment

    job = JobEnvironment()
    if job.num_nodes == 1:
        return None
    # Alone on its node a job could take any port; those of other jobs have other numbers.
    port = _FIRST_PORT + int(job.raw_job_id) % _NUM_PORTS
    return Nodes(job.num_nodes, job.node, job.hostnames[0], port)


def requeue_if_asked(stop: StopFlag) -> None:
    """Put this job back into the queue, and end the process, where `stop` ended the run because the time is over.

    To be called once the run has saved and the context of `stop` has ended, which brings submitit's own handler of the
    signal back. Returns where the run stopped for another reason (another signal, the sweep's stop file) or where
    the job was put back as often as hydra.launcher.max_num_timeout allows.
    """
    if not in_job() or (stop.file is not None and stop.file.exists()):
        return
    from submitit import JobEnvironment

    number = JobEnvironment()._usr_sig()
    if number not in stop.caught:
        return
    requeue = signal.getsignal(number)
    assert callable(requeue) and requeue != stop._catch, "the context of `stop` is still open"
    try:
        requeue(number, None)  # on other nodes than the first it returns: one of them speaks for the job
    except Exception as error:
        say(f"out of time. {error} The same sweep goes on")

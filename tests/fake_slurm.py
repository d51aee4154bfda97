"""A Slurm of this machine for tests: called as sbatch, srun, sacct, scancel or scontrol, with its state in $FAKE_SLURM.

A job runs as its script does; each of its nodes is a process here. A job of an array starts when fewer than the array's
%limit run. Files: JOB.state (PENDING ...), JOB.script, JOB.pids of its tasks, JOB.shell, JOB.requeue, and
`calls`.
"""

import fcntl
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(os.environ.get("FAKE_SLURM", "."))
EMPTY = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SUBMITIT_"))}


def main() -> None:
    name, *arguments = sys.argv[1:]
    if name == "run-job":
        return run_job(*arguments)
    with open(HOME / "calls", "a") as calls:
        print(name, *arguments, file=calls)
    {"sbatch": sbatch, "srun": srun, "sacct": sacct, "scancel": scancel, "scontrol": scontrol}[name](*arguments)


def install(folder: Path) -> None:
    """Put the five commands into `folder`, for PATH."""
    folder.mkdir()
    for name in ("sbatch", "srun", "sacct", "scancel", "scontrol"):
        (folder / name).write_text(f'#!/bin/sh\nexec {sys.executable} {__file__} {name} "$@"\n')
        (folder / name).chmod(0o755)


def state(job: str, new: str | None = None) -> str:
    if new is not None:
        (HOME / f"{job}.state").write_text(new)
    return (HOME / f"{job}.state").read_text()


def option(script: str, name: str, default: str) -> str:
    found = re.search(rf"^#SBATCH --{name}=(\S+)$", script, re.M)
    return found.group(1) if found else default


def sbatch(path: str) -> None:
    script = Path(path).read_text()
    if option(script, "partition", "") == "none":
        sys.exit("sbatch: error: invalid partition specified: none")
    number = str(100 + len(list(HOME.glob("*.script"))))
    (HOME / f"{number}.script").write_text(script)
    last = re.fullmatch(r"0-(\d+)%(\d+)", option(script, "array", ""))
    jobs = [f"{number}_{i}" for i in range(int(last.group(1)) + 1)] if last else [number]
    for job in jobs:
        state(job, "PENDING")
    for job in jobs:
        argv = [sys.executable, __file__, "run-job", number, job, last.group(2) if last else "1"]
        log = open(HOME / f"{job}.log", "w")  # noqa: SIM115
        subprocess.Popen(argv, env=EMPTY, start_new_session=True, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    print(f"Submitted batch job {number}")


def run_job(number: str, job: str, limit: str) -> None:
    environment = {**EMPTY, "SLURM_JOB_ID": str(int(number) * 1000 + os.getpid() % 1000)}
    if "_" in job:
        environment |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": job.split("_")[1]}
    else:
        environment["SLURM_JOB_ID"] = number
    environment |= {"FAKE_JOB": job, "FAKE_NODES": option((HOME / f"{number}.script").read_text(), "nodes", "1")}
    again = HOME / f"{job}.requeue"
    while True:
        while not start(number, job, int(limit)):
            if state(job) != "PENDING":
                return
            time.sleep(0.1)
        shell = subprocess.Popen(["bash", str(HOME / f"{number}.script")], env=environment)
        (HOME / f"{job}.shell").write_text(str(shell.pid))
        code = shell.wait()
        if not again.exists():
            break
        again.unlink()
        state(job, "PENDING")
    state(job, "COMPLETED" if code == 0 else "FAILED")


def start(number: str, job: str, limit: int) -> bool:
    with open(HOME / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        running = [p for p in HOME.glob(f"{number}*.state") if p.read_text() == "RUNNING"]
        index = int(job.partition("_")[2] or 0)
        earlier = [HOME / f"{number}_{i}.state" for i in range(index)]  # those of an array start in their order
        if len(running) >= limit or state(job) != "PENDING" or any(p.read_text() == "PENDING" for p in earlier):
            return False
        state(job, "RUNNING")
        return True


def srun(*arguments: str) -> None:
    job, nodes = os.environ["FAKE_JOB"], int(os.environ["FAKE_NODES"])
    output = arguments[arguments.index("--output") + 1] if "--output" in arguments else str(HOME / "%j_%t.log")
    command = arguments[next(i for i, a in enumerate(arguments) if a.startswith("/") and "python" in a) :]
    array, _, task = job.partition("_")
    tasks = []
    for node in range(nodes):
        environment = os.environ | {f"SLURM_{k}": str(nodes) for k in ("NTASKS", "JOB_NUM_NODES")}
        environment |= {"SLURM_NODEID": str(node), "SLURM_PROCID": str(node), "SLURM_LOCALID": "0"}
        environment["SLURM_JOB_NODELIST"] = ",".join(["localhost"] * nodes)
        path = output
        for short, value in (("%A", array), ("%a", task), ("%j", job), ("%t", str(node))):
            path = path.replace(short, value)
        log = open(path, "a")  # noqa: SIM115
        tasks.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log))
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM):  # srun passes on what it is sent
        signal.signal(number, lambda number, frame: [task.send_signal(number) for task in tasks])
    (HOME / f"{job}.pids").write_text(" ".join(str(task.pid) for task in tasks))
    sys.exit(max(abs(task.wait()) for task in tasks))


def sacct(*_: str) -> None:
    print("JobID|State|NodeList")
    for path in HOME.glob("*.state"):
        print(f"{path.stem}|{path.read_text()}|localhost")


def scancel(*arguments: str) -> None:
    assert arguments[0] == "--state=PENDING"
    with open(HOME / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for job in arguments[1:]:
            if state(job) == "PENDING":
                state(job, "CANCELLED by 0")


def scontrol(*arguments: str) -> None:
    assert arguments[0] == "requeue"
    (HOME / f"{arguments[1]}.requeue").touch()


if __name__ == "__main__":
    main()

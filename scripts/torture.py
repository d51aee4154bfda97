"""Harm training runs on purpose, at random moments, and count what is lost.

    python scripts/torture.py                    50 kills and the rest, about half an hour on two cores
    python scripts/torture.py --kills 4 --rest 1 a short one

Every run trains a small network on digits to its end in spite of what is done to it, always by the same command. It
survives if that end is the one of a run that nothing was done to, on as many processes: the same bytes of weights and
averages, and the same metrics, no step twice and none missing. It also has to behave on the way: exit code 3 within
30 seconds of a signal, no process left behind, never back behind a checkpoint that was good.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from cm_train.training.tracking.names import group

STEPS, SAVE_EVERY, LOG_EVERY = 300, 10, 5
SMALL = ["tracking=none", f"steps={STEPS}", f"save_every={SAVE_EVERY}", f"log_every={LOG_EVERY}", "keep=2"]
SMALL += ["preview_every=100", "batch_size=12", "dataset.hflip=true", "ema.extra=[0.5]", "backbone.dropout=0.2"]
BACKBONE = ["backbone.channels=8", "backbone.head_channels=8", "backbone.attention_resolutions=[]"]
MODES = {
    "edm": BACKBONE,
    "cd": ["teacher=teacher", "objective.target_decay=0.9"],
    "ct": [*BACKBONE, "objective.target_decay=0.9"],
    "ict": BACKBONE,
}
PATIENCE_S = 180.0  # for anything: a run that takes longer hangs
HANGING_S = 10.0  # what the ranks of these runs take for one that hangs
SIGNAL_S = 30.0


class Lost(Exception):
    """What a run lost, or how it misbehaved."""


@dataclass
class Row:
    """One line of the table: what was done, how often, and what became of it."""

    tried: int = 0
    lost: int = 0
    losses: list[str] = field(default_factory=list)


Harm = Callable[["Run", random.Random], bool]


@dataclass
class Run:
    """One training run in `home`, and its command."""

    home: Path
    mode: str
    ranks: int
    name: str

    @property
    def folder(self) -> Path:
        return self.home / "runs" / self.name

    def start(self) -> subprocess.Popen:
        """The command, in a process group of its own."""
        options = [*SMALL, *MODES[self.mode], f"name={self.name}", f"devices={self.ranks}"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HYDRA_FULL_ERROR": "0"}
        environment["CM_TRAIN_PATIENCE_S"] = str(HANGING_S)
        argv = [sys.executable, "-m", "cm_train.commands.train", f"mode={self.mode}", *options]
        log = open(self.home / f"{self.name}.log", "ab")  # noqa: SIM115 - the process owns it
        return subprocess.Popen(argv, cwd=self.home, env=environment, stderr=log, stdout=log, start_new_session=True)

    def steps_saved(self) -> list[int]:
        found = (self.folder / "checkpoints").glob("step_*/manifest.json")
        return sorted(int(path.parent.name.removeprefix("step_")) for path in found)

    def wait_for_a_moment(self, process: subprocess.Popen, moment: random.Random, latest: int = STEPS - 4) -> None:
        """Return at a random moment between the start of the process and the step `latest`."""
        if moment.random() < 0.2:  # while it starts, resumes or launches its ranks
            time.sleep(moment.uniform(0, 6))
            return
        after, log = moment.randrange(latest), self.folder / "metrics.jsonl"
        deadline = time.monotonic() + PATIENCE_S
        while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") * LOG_EVERY < after):
            if time.monotonic() > deadline:
                process.kill()
                raise Lost("hangs")
            time.sleep(0.01)
        time.sleep(moment.uniform(0, 0.2))

    def finish(self, expect: int = 0) -> None:
        """Run the command to its end. Raises Lost for another exit code."""
        code = wait(self.start())
        if code != expect:
            raise Lost(f"exit code {code} instead of {expect}: {self.last_words()}")

    def last_words(self) -> str:
        lines = (self.home / f"{self.name}.log").read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else ""

    def result(self) -> tuple[dict[str, bytes], list[dict]]:
        """The final weights and averages, and the metrics without what depends on time."""
        folder = self.folder / "checkpoints" / f"step_{STEPS:08d}"
        weights = {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return weights, [{k: v for k, v in json.loads(r).items() if group(k) != "perf"} for r in lines]


def wait(process: subprocess.Popen, seconds: float = PATIENCE_S) -> int:
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise Lost(f"still running after {seconds:.0f} s") from None


def ranks_of(process: subprocess.Popen) -> list[int]:
    """The processes of the ranks that a command has started."""
    out = subprocess.run(["ps", "-eo", "pid=,ppid=,args="], capture_output=True, text=True).stdout
    rows = [line.split(None, 2) for line in out.splitlines()]
    return [int(pid) for pid, parent, args in rows if int(parent) == process.pid and "cm_train.runs.worker" in args]


def catches(pid: int, number: signal.Signals) -> bool:
    """Whether a process has a handler for a signal, as Linux tells."""
    status = Path(f"/proc/{pid}/status").read_text()
    caught = int(status.split("SigCgt:")[1].split()[0], 16)
    return bool(caught >> (number - 1) & 1)


def gone(pids: list[int]) -> bool:
    out = subprocess.run(["ps", "-o", "stat=", *map(str, pids)], capture_output=True, text=True).stdout if pids else ""
    return all(state.startswith("Z") for state in out.split())


# ------------------------------------------------------------------------------------------------------- what is done


# Each returns whether it came to pass: a run that ended before the moment came was not harmed.


def kill_command(run: Run, moment: random.Random) -> bool:
    """kill -9 on the command; its ranks must follow."""
    process = run.start()
    run.wait_for_a_moment(process, moment)
    ranks, harmed = ranks_of(process), process.poll() is None
    process.kill()
    process.wait()
    deadline = time.monotonic() + SIGNAL_S
    while not gone(ranks):
        if time.monotonic() > deadline:
            raise Lost("ranks outlive their command")
        time.sleep(0.05)
    return harmed


def kill_rank(run: Run, moment: random.Random) -> bool:
    """kill -9 on one rank; the command must end by itself, with a code that says so."""
    process = run.start()
    run.wait_for_a_moment(process, moment)
    ranks = ranks_of(process)
    if not ranks or process.poll() is not None:
        process.kill()
        process.wait()
        return False
    os.kill(moment.choice(ranks), signal.SIGKILL)
    code = wait(process, 60)
    if code not in (1, 0) or (code == 0 and run.steps_saved()[-1:] != [STEPS]):
        raise Lost(f"exit code {code} after a rank died")
    if not gone(ranks):
        raise Lost("ranks outlive their command")
    return True


def send(number: signal.Signals) -> Harm:
    def harm(run: Run, moment: random.Random) -> bool:
        process = run.start()
        while process.poll() is None and not catches(process.pid, number):  # until then Python itself is starting
            time.sleep(0.01)
        run.wait_for_a_moment(process, moment)
        process.send_signal(number)
        code = wait(process, SIGNAL_S)
        if code not in (3, 0) or (code == 0 and run.steps_saved()[-1:] != [STEPS]):
            raise Lost(f"exit code {code} after {number.name}: {run.last_words()}")
        return code == 3

    return harm


def send_two(run: Run, moment: random.Random) -> bool:
    """SIGTERM and SIGINT at once, as wrappers and terminals send them: that is one wish to stop."""
    process = run.start()
    while process.poll() is None and not catches(process.pid, signal.SIGINT):
        time.sleep(0.01)
    run.wait_for_a_moment(process, moment)
    for number in (signal.SIGTERM, signal.SIGINT):
        process.send_signal(number)
    code = wait(process, SIGNAL_S)
    if code not in (3, 0) or (code == 0 and run.steps_saved()[-1:] != [STEPS]):
        raise Lost(f"exit code {code} after two signals: {run.last_words()}")
    return code == 3


def suspend(run: Run, moment: random.Random) -> bool:
    """Stop every process for longer than ranks wait for each other, then let them go on: nothing may end."""
    process = run.start()
    run.wait_for_a_moment(process, moment)
    everyone = [process.pid, *ranks_of(process)]
    try:
        for pid in everyone:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(1.5 * HANGING_S)
        for pid in reversed(everyone):
            os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:  # it had just ended
        wait(process)
        return False
    if code := wait(process):
        raise Lost(f"exit code {code} after it was suspended: {run.last_words()}")
    return True


def hide_checkpoints(run: Run, moment: random.Random) -> bool:
    """Kill, put the checkpoints out of sight, and start: that is refused and empties nothing; then bring them back."""
    process = run.start()
    while process.poll() is None and len(run.steps_saved()) < 2:
        time.sleep(0.01)
    process.kill()
    process.wait()
    time.sleep(0.5)
    home, away, log = run.folder / "checkpoints", run.home / f"{run.name}-away", run.folder / "metrics.jsonl"
    os.rename(home, away)
    how = moment.choice(["empty", "gone", "a link to nothing"])
    if how == "empty":
        home.mkdir()
    elif how == "a link to nothing":
        home.symlink_to(run.home / "nowhere")
    before = log.read_bytes()
    code = wait(run.start())
    if code != 2 or log.read_bytes() != before:
        raise Lost(f"exit code {code} where the checkpoints were {how}: {run.last_words()}")
    if home.is_symlink():
        home.unlink()
    elif home.exists():
        home.rmdir()
    os.rename(away, home)
    return True


def flip_bit(run: Run, moment: random.Random) -> bool:
    """Kill, then change one bit of the newest checkpoint; the one before must take its place."""
    process = run.start()
    while process.poll() is None and len(run.steps_saved()) < 2:
        time.sleep(0.01)
    process.kill()
    process.wait()
    time.sleep(0.5)
    before, newest = run.steps_saved()[-2:]
    file = moment.choice(sorted((run.folder / "checkpoints" / f"step_{newest:08d}").iterdir()))
    content = bytearray(file.read_bytes())
    content[moment.randrange(len(content))] ^= 1 << moment.randrange(8)
    file.write_bytes(content)
    code = wait(run.start())
    if code or f"resuming at step {before}" not in (run.home / f"{run.name}.log").read_text():
        raise Lost(f"did not go on from step {before} after a flipped bit in {file.name}: {run.last_words()}")
    return True


def fill_disk(run: Run, moment: random.Random) -> bool:
    """A disk that is full for some saves, then has room again: the run goes on, and its end is whole."""
    folder = run.home / "small-disk" / run.name
    folder.mkdir(parents=True)
    filler = folder / "filler"
    run.folder.parent.mkdir(exist_ok=True)
    run.folder.symlink_to(folder)
    process = run.start()
    while process.poll() is None and not run.steps_saved():
        time.sleep(0.01)
    with open(filler, "wb", buffering=0) as file:  # until nothing fits
        while True:
            try:
                if not file.write(bytes(4096)):
                    break
            except OSError:
                break
    time.sleep(moment.uniform(0.5, 2.0))
    filler.unlink()
    code, words = wait(process), (run.home / f"{run.name}.log").read_text()
    if code and not (code == 1 and "could not be written" in words):
        raise Lost(f"exit code {code} on a full disk: {run.last_words()}")
    return "could not save" in words or "could not be written" in words


HARMS: dict[str, tuple[Harm, tuple[int, ...]]] = {
    "kill -9 the command": (kill_command, (1, 2, 3)),
    "kill -9 one rank": (kill_rank, (2, 3)),
    "SIGTERM": (send(signal.SIGTERM), (1, 2)),
    "SIGINT": (send(signal.SIGINT), (1, 2)),
    "SIGUSR1": (send(signal.SIGUSR1), (1, 2)),
    "SIGHUP": (send(signal.SIGHUP), (1, 2)),
    "SIGXCPU": (send(signal.SIGXCPU), (1, 2)),
    "SIGTERM and SIGINT at once": (send_two, (1, 2)),
    "every process suspended for a while": (suspend, (2, 3)),
    "checkpoints out of sight": (hide_checkpoints, (1, 2)),
    "a bit flipped in the newest checkpoint": (flip_bit, (1, 2)),
    "the disk full for a while": (fill_disk, (1, 2)),
}


def check(run: Run, reference: Run) -> None:
    weights, metrics = run.result()
    expected, expected_metrics = reference.result()
    if weights != expected:
        raise Lost(f"other weights: {', '.join(n for n in expected if weights.get(n) != expected[n])}")
    if metrics != expected_metrics:
        raise Lost("other metrics")


def torture(run: Run, reference: Run, harm: Harm, times: int, row: Row, dice: random.Random) -> None:
    """Do `harm` to the run again and again, never letting it fall back, then let it finish and compare."""
    harmed = 0
    try:
        while harmed < times:
            before = run.steps_saved()
            if before[-1:] == [STEPS]:
                break
            harmed += harm(run, dice)
            after = run.steps_saved()
            if before and (not after or after[-1] < before[-1]):
                raise Lost(f"fell back from step {before[-1]} to {after[-1:] or 'nothing'}")
        run.finish()
        check(run, reference)
    except Lost as loss:
        harmed = max(harmed, 1)
        row.lost += harmed
        row.losses.append(f"{run.name}: {loss}")
    row.tried += harmed
    if run.folder.is_symlink() and not row.losses:
        shutil.rmtree(run.folder.resolve())  # the small disk has room for one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="kill -9, over all modes and numbers of ranks")
    parser.add_argument("--rest", type=int, default=6, help="how often each other harm is done")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments")
    parser.add_argument("--modes", default="edm,cd,ct,ict", help="which modes to train")
    parser.add_argument("--only", default="", help="harms whose name has this in it, such as disk")
    parser.add_argument("--keep", action="store_true", help="leave the runs and their logs, and say where")
    args = parser.parse_args()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the runs shall heed it, even where this script runs under nohup

    dice, modes = random.Random(args.seed), args.modes.split(",")
    home = Path(tempfile.mkdtemp(prefix="cm-train-torture-"))
    console = Console(width=110)
    rows: dict[str, Row] = {name: Row() for name in HARMS if args.only in name}
    references: dict[tuple[str, int], Run] = {}
    started = time.monotonic()
    mounted = mount_small_disk(home)

    def reference(mode: str, ranks: int) -> Run:
        if (mode, ranks) not in references:
            references[mode, ranks] = Run(home, mode, ranks, f"reference-{mode}-{ranks}")
            references[mode, ranks].finish()
        return references[mode, ranks]

    # Runs of several kills each, until so many have come to pass; one run for each of the other harms.
    wanted = {name: args.kills // 2 if name.startswith("kill") else args.rest for name in rows}
    if not mounted and "the disk full for a while" in rows:
        wanted["the disk full for a while"] = 0
    try:
        if "cd" in modes:
            Run(home, "edm", 1, "teacher").finish()
            shutil.copytree(home / "runs" / "teacher", home / "teacher")
        with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task("torture", total=sum(wanted.values()))
            turn = 0
            for name, row in rows.items():
                (harm, counts), attempts = HARMS[name], 0
                while row.tried < wanted[name] and attempts < 3 * wanted[name]:
                    mode, ranks = modes[turn % len(modes)], counts[attempts % len(counts)]
                    times = min(4, wanted[name] - row.tried) if name.startswith("kill") else 1
                    run = Run(home, mode, ranks, f"run-{turn}-{mode}-{ranks}")
                    torture(run, reference(mode, ranks), harm, times, row, dice)
                    turn, attempts = turn + 1, attempts + 1
                    progress.update(task, completed=sum(r.tried for r in rows.values()))
    finally:
        if mounted:
            subprocess.run(["umount", str(home / "small-disk")], check=False)

    table = Table("harm", "tried", "survived", "lost")
    for name, row in rows.items():
        note = "" if row.tried else " (needs the right to mount a small disk)"
        table.add_row(name + note, str(row.tried), str(row.tried - row.lost), str(row.lost))
    console.print(table)
    minutes = (time.monotonic() - started) / 60
    print(f"modes {', '.join(modes)}; 1 to 3 processes; {turn} runs of {STEPS} steps in {minutes:.0f} min")
    losses = [loss for row in rows.values() for loss in row.losses]
    for loss in losses:
        print(f"LOST {loss}")
    if args.keep or losses:
        print(f"the runs and their logs: {home}")
    else:
        shutil.rmtree(home)
    sys.exit(1 if losses else 0)


def mount_small_disk(home: Path) -> bool:
    """A disk of 8 MB in memory at home/small-disk, where this user may mount one."""
    folder = home / "small-disk"
    folder.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)]
    return subprocess.run(argv, capture_output=True, check=False).returncode == 0


if __name__ == "__main__":
    main()

"""What a sweep's end looks like: nothing cut on any terminal, and no table where it would not fit."""

import fcntl
import os
import pty
import struct
import sys
import termios
from pathlib import Path

import pytest

from cm_train.sweeps import table as sweep_table
from cm_train.sweeps.records import Job
from conftest import ENVIRONMENT

LONG = "objective.distance=lpips ema.decay=0.9999 optimizer.lr=0.00031622776601683795 'dataset.root=/data/große Bilder'"
JOBS = [
    Job(0, "seed=0", state="finished", folder="runs/a", step=100, metric=("loss", 0.52), took_s=18),
    Job(1, LONG, state="failed", folder=f"/scratch/me/{'deep/' * 30}run", step=7, metric=("agreement_rms", 0.25)),
    Job(12, "seed=1", state="not started"),
]
PROGRAM = "from pathlib import Path; from test_sweep_table import *; sweep_table.show(JOBS[:{}], Path('runs/s'), 60.0)"


def on_terminal(warm, columns: int, num: int) -> str:
    """What a terminal of that width receives."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 25, columns, 0, 0))
    environment = {k: v for k, v in ENVIRONMENT.items() if k not in ("COLUMNS", "NO_COLOR")}
    environment |= {"TERM": "xterm", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = warm.popen(["-c", PROGRAM.format(num)], env=environment, stdin=theirs, stderr=theirs)
    os.close(theirs)
    shown = b""
    try:
        while piece := os.read(ours, 65536):
            shown += piece
    except OSError:  # the last one has closed the terminal
        pass
    os.close(ours)
    assert done.wait(timeout=60) == 0, shown.decode()
    return shown.decode()


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_nothing_is_cut_where_the_table_does_not_fit(warm, columns):
    """Longer lines are broken between words, and a folder or a value stands whole on one, wherever that ends."""
    shown = on_terminal(warm, columns, 3)
    expected = [
        "job 0  finished  step 100  loss 0.52  0.3 min",
        "  seed=0",
        "  runs/a",
        "job 1  failed  step 7  agreement_rms 0.25  0.0 min",
        f"  {LONG}",
        f"  {JOBS[1].folder}",
        "job 12  not started  0.0 min",
    ]
    assert shown.split()[: len(" ".join(expected).split())] == " ".join(expected).split()
    assert JOBS[1].folder in [line.strip() for line in shown.splitlines()]
    if columns == 200:
        assert shown.splitlines()[:7] == expected


def test_a_table_that_fits_is_one(warm):
    narrow, wide = on_terminal(warm, 40, 1), on_terminal(warm, 80, 1)
    assert narrow.startswith("job 0  finished") and "┃" not in narrow
    assert "┃" in wide and all(word in wide for word in ("runs/a", "seed=0", "0.52"))


def test_table_is_measured_in_cells_and_shows_the_metrics_name_beside_another(capsys, monkeypatch):
    """Where stderr is no terminal, COLUMNS is heeded; a letter of two cells counts as two."""
    both = [JOBS[0], Job(2, "name=" + "漢" * 30, state="finished", metric=("agreement_rms", 0.25), folder="runs/b")]
    widths = {}
    for columns in range(60, 160):
        monkeypatch.setenv("COLUMNS", str(columns))
        sweep_table.show(both, Path("runs/s"), 60.0)
        shown = capsys.readouterr().err
        assert "漢" * 30 in shown and "agreement_rms 0.25" in shown
        if "┃" in shown:
            rows = [line for line in shown.splitlines() if line.startswith("│")]
            assert len(rows) == 2, "no row is wrapped"
            widths[columns] = max(len(row) + row.count("漢") for row in rows)
    assert widths and min(widths) == max(widths.values()), "a table as soon as there is room"

"""scripts/gpu_check.py, small and on a CPU: it will meet its GPU once, and has to work then."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "gpu_check.py"
FIELDS = {"part", "name", "ok", "seconds"}


def gpu_check(out, *options):
    argv = [sys.executable, str(SCRIPT), "--out", str(out), *options]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=900)
    table = json.loads((out / "gpu_check.json").read_text())
    assert all(row.keys() >= FIELDS for row in table["rows"])
    return done, {row["name"]: row for row in table["rows"]}


@pytest.mark.long
@pytest.mark.command
def test_every_part_works_on_a_cpu(tmp_path):
    done, rows = gpu_check(tmp_path, "--cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    skipped = {name for name, row in rows.items() if not row["ok"]}
    assert all(rows[name]["skipped"] for name in skipped)
    assert skipped == {"a step waits for nothing", "memory stays flat"} | {n for n in rows if "compiled" in n}
    assert {row["part"] for row in rows.values()} == {"correct", "bench", "quality"}
    assert rows["cut and resumed"]["weights_that_differ"] == 0
    assert rows["cd, 0.1 M, 8x8, eager"]["step_over_floor"] > 0.5
    assert (tmp_path / "gpu_check.png").stat().st_size > 0


@pytest.mark.long
@pytest.mark.command
def test_a_deadline_leaves_a_whole_table(tmp_path):
    done, rows = gpu_check(tmp_path, "--cpu", "--part", "correct", "--seconds", "1.5")
    assert done.returncode == 0, done.stdout + done.stderr
    cut = [row for row in rows.values() if row.get("skipped", "").startswith(("cut by the deadline", "no time left"))]
    assert len(cut) > 5
    assert not any(row["ok"] for row in cut)
    assert len(rows) > 10


@pytest.mark.long
@pytest.mark.command
def test_a_row_that_fails_is_told_and_ends_in_exit_code_1(tmp_path):
    """A tolerance that nothing meets; the rows after it are made all the same."""
    impossible = f"import sys; sys.path.insert(0, {str(SCRIPT.parent)!r}); import gpu_checks.correct as c; "
    impossible += "c.GRADIENT = dict.fromkeys(c.GRADIENT, 0.0); import gpu_check; gpu_check.main()"
    argv = [sys.executable, "-c", impossible, "--cpu", "--part", "correct", "--only", "*eager", "--out", str(tmp_path)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    rows = json.loads((tmp_path / "gpu_check.json").read_text())["rows"]
    assert len(rows) == 2
    assert all("the gradient is off by" in row["error"] and not row["ok"] for row in rows)


@pytest.mark.command
@pytest.mark.long
def test_every_part_works_on_a_cpu_with_the_compiler(tmp_path):
    done, rows = gpu_check(tmp_path, "--cpu", "--compile", "--full")
    assert done.returncode == 0, done.stdout + done.stderr
    compiled = {name: row for name, row in rows.items() if "compiled" in name}
    assert len(compiled) == 10
    assert all(row["ok"] for row in compiled.values())
    assert rows["cd, 0.1 M, 8x8, compiled"]["start_warm_s"] < rows["cd, 0.1 M, 8x8, compiled"]["start_s"]


@pytest.mark.gpu
def test_this_machines_gpu_passes(tmp_path):
    done, _ = gpu_check(tmp_path, "--part", "correct", "--seconds", "600")
    assert done.returncode == 0, done.stdout + done.stderr

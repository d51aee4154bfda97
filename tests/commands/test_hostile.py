"""Run folders made to do harm: each command ends with a result or with one line, in bounded time and memory."""

import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ENVIRONMENT, TINY


@pytest.mark.command
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="has /dev/zero and limits of memory")
@pytest.mark.parametrize("share", [pytest.param(n, marks=pytest.mark.long) for n in (41, 1)])
def test_hostile_run_folders_end_in_a_result_or_one_line(share, command, tmp_path):
    assert command("train", "mode=ict", *TINY).returncode == 0
    (tmp_path / "runs" / "digits-ict").rename(tmp_path / "good")
    argv = [sys.executable, str(Path(__file__).parents[1] / "hostile.py"), str(tmp_path), str(share)]
    done = subprocess.run(argv, env=ENVIRONMENT, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stdout + done.stderr
    *bad, tried = done.stdout.splitlines()
    assert not bad, "\n".join(bad)
    assert int(tried.split()[0]) > 900 // share

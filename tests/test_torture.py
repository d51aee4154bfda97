"""The torture script, small: every harm once."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "torture.py"


@pytest.mark.long
@pytest.mark.command
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for processes as Linux's ps lists them")
def test_torture_loses_nothing():
    argv = [sys.executable, str(SCRIPT), "--kills", "2", "--rest", "1", "--modes", "ict"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    counts = re.findall(r"│ (\d+) +│ (\d+) +│ (\d+) +│", done.stdout)
    assert len(counts) == 12
    assert all(survived == tried and lost == "0" for tried, survived, lost in counts)
    assert sum(int(tried) for tried, _, _ in counts) >= 11, (
        "the full disk needs the right to mount one, the rest nothing"
    )

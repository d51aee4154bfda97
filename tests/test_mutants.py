"""The planted mistakes: each can still be planted, and (long) each is noticed."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from draw_rooms import ROOMS

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "mutants.py"

_spec = importlib.util.spec_from_file_location("mutants", SCRIPT)
mutants = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(mutants)


def test_mutants_can_be_planted():
    for mutant in mutants.MUTANTS:
        source = (ROOT / mutant.file).read_text()
        assert source.count(mutant.old) == 1 and mutant.new != mutant.old, mutant.name
        compile(source.replace(mutant.old, mutant.new), mutant.file, "exec")
        for test in mutant.tests.split():
            path, _, name = test.partition("::")
            assert not name or re.search(rf"^def {name}\(", (ROOT / path).read_text(), re.MULTILINE), test
            assert (ROOT / path).is_file()


def test_mutants_have_names_of_their_own_and_are_in_every_room():
    names = [mutant.name for mutant in mutants.MUTANTS]
    assert len(set(names)) == len(names)
    assert {mutant.file.split("/")[1] for mutant in mutants.MUTANTS} == set(ROOMS)


@pytest.mark.long
@pytest.mark.command
def test_a_mutant_that_nobody_notices_survives(monkeypatch):
    """A comment changes nothing, and no test may be said to have caught it."""
    harmless = mutants.Mutant(
        "harmless", "cm_train/data/pixels.py", "# neither the black", "# not the black", "tests/data/test_pixels.py", ""
    )
    caught, _ = mutants.judge(harmless)
    assert caught == ""
    broken = harmless._replace(old="import math", new="import nothing_of_this_name")
    assert mutants.judge(broken)[0] == "", "a copy that can't be imported proves nothing"


@pytest.mark.long
def test_every_mutant_is_noticed():
    done = subprocess.run(
        [sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=60 * len(mutants.MUTANTS)
    )
    assert done.returncode == 0, done.stdout + done.stderr

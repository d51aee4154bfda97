"""One run, from a composed config to a trained folder: what is looked at on the way, and how often."""

import shutil

from conftest import TINY

COUNTED = """
import sys
from cm_train.models.checkpoints import read
verify, seen = read.verify, []
def counting(folder):
    seen.append(folder.parent.parent.name)
    return verify(folder)
read.verify = counting
from cm_train.commands.train import main
try:
    main()
finally:
    print(" ".join(seen))
"""


def test_what_a_run_starts_from_is_hashed_once(command, warm, tmp_path):
    """A foreign checkpoint may be gigabytes: neither the command nor each of its steps reads it again."""
    assert command("train", "mode=edm", *TINY).returncode == 0
    for words in (["mode=ict", "init=runs/digits-edm"], ["mode=cd", "teacher=runs/digits-edm"]):
        done = warm.run(["-c", COUNTED, *words, *TINY, "run_dir=runs/new"], cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split().count("digits-edm") == 1, done.stdout
        shutil.rmtree(tmp_path / "runs" / "new")


def test_a_word_that_names_another_key_of_its_group_is_resolved_where_it_belongs(command):
    assert command("train", "mode=edm", *TINY, "noise.sigma_data=${.sigma_min}").returncode == 0

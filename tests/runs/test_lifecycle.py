"""One run, from a composed config to a trained folder: what is looked at on the way, and how often."""

import json
import subprocess
import sys

from conftest import ENVIRONMENT, TINY

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


def test_what_a_run_starts_from_is_hashed_once(command, tmp_path):
    """A foreign checkpoint may be gigabytes: neither the command nor each of its steps reads it again."""
    assert command("train", "mode=edm", *TINY).returncode == 0
    for words in (["mode=ict", "init=runs/digits-edm"], ["mode=cd", "teacher=runs/digits-edm"]):
        argv = [sys.executable, "-c", COUNTED, *words, *TINY, "run_dir=runs/new"]
        done = subprocess.run(argv, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.split().count("digits-edm") == 1, done.stdout
        subprocess.run(["rm", "-r", str(tmp_path / "runs" / "new")], check=True)


def test_another_network_than_that_of_the_first_weights_is_refused_before_anything_trains(command, tmp_path):
    assert command("train", "mode=edm", *TINY).returncode == 0
    done = command("train", "mode=ict", *TINY, "init=runs/digits-edm", "backbone.channels=64")
    assert done.returncode == 2 and "a student has the backbone that it starts from" in done.stderr
    assert not (tmp_path / "runs" / "digits-ict" / "metrics.jsonl").exists()
    done = command("train", "mode=ict", *TINY, "init=runs/digits-edm", "backbone.dropout=0.1")
    assert done.returncode == 0, done.stderr  # is how it is trained, not what it is
    manifest = json.loads((tmp_path / "runs/digits-ict/checkpoints/step_00000006/manifest.json").read_text())
    assert manifest["backbone"]["dropout"] == 0.1


def test_first_weights_that_are_damaged_are_found_before_a_teacher_trains(command, tmp_path):
    assert command("train", "mode=edm", *TINY, "run_dir=runs/start").returncode == 0
    for file in (tmp_path / "runs" / "start" / "checkpoints").glob("*/*.safetensors"):
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    done = command("train", "mode=cd", *TINY, "init=runs/start", "run_dir=new/s")
    assert done.returncode == 2 and "is damaged" in done.stderr
    assert not (tmp_path / "new" / "digits-edm").exists()


def test_a_word_that_names_another_key_of_its_group_is_resolved_where_it_belongs(command):
    assert command("train", "mode=edm", *TINY, "noise.sigma_data=${.sigma_min}").returncode == 0

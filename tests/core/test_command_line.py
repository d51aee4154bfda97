"""What users type, as Hydra then reads it: parsed again here by Hydra's own parser."""

import os
import shlex
import signal
import subprocess
import sys
import time

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import example, given
from hypothesis import strategies as st

from cm_train.core import configs
from cm_train.core.command_line import tidy
from cm_train.core.errors import InputError
from cm_train.core.keys import Keys
from cm_train.core.override import TEXT, quoted
from conftest import ENVIRONMENT, TINY

GROUPS = configs.groups("train")


def typed(line):
    return tidy(shlex.split(line), GROUPS)


def as_hydra_reads(override):
    return OverridesParser.create().parse_override(override).value()


PATHS = [
    "~/p",
    "José",
    "a=b",
    "#",
    "(",
    "it's",
    'a "b"',
    "a,b",
    "[a]",
    "{a: b}",
    " x ",
    "123",
    "007",
    "1e3",
    "true",
    "a\\",
]


@pytest.mark.parametrize("key", sorted(TEXT))
@pytest.mark.parametrize("path", PATHS)
def test_text_is_taken_as_typed(key, path):
    (override,) = tidy([f"{key}={path}"], GROUPS)
    assert override.startswith(f"{key}=")
    assert as_hydra_reads(override) == path


@given(st.text(st.characters(exclude_characters="\0"), min_size=1).filter(lambda text: "$" not in text))
@example("\\'")
@example("'\\")
@example("\\\\")
def test_quoted_text_is_read_back(text):
    assert as_hydra_reads(f"name={quoted(text)}") == text


@pytest.mark.parametrize(
    ("line", "tidied"),
    [
        ("mode=ict -m seed=0,1", ["--multirun", "mode=ict", "seed=0,1"]),
        ("--info mode=cd", ["--info=all", "mode=cd"]),
        ("mode=cd --cfg job --run", ["--cfg=job", "mode=cd"]),
        ("teacher=null experiment=null recipe=null", ["teacher=null", "~experiment", "recipe=none"]),
        ("--why steps mode=cd optimizer.lr", ["--why=steps", "--why=optimizer.lr", "mode=cd"]),
        ("steps mode=cd --why --config-dir x", ["--why=steps", "--config-dir=x", "mode=cd"]),
        ("--why=steps ~noise.rho --why name", ["--why=steps", "--why=name", "~noise.rho"]),
        ("--help --why steps mode=cd", ["--help", "mode=cd"]),
        ("ema.decay=0.9 mode=cd", ["ema.decay=0.9", "mode=cd", "++ema.half_life_images=null"]),
        ("-m ema.half_life_images=1e5,1e6", ["--multirun", "ema.half_life_images=1e5,1e6", "++ema.decay=null"]),
        ("++ema.decay=0.9 ema.half_life_images=null", None),
        ("ema.decay=0.9 ++ema.half_life_images=null", None),
        ("ema.decay=null", None),
        ("~experiment ~experiment=null", None),
        ("-m recipe=none,auto max_hours=null,1", ["--multirun", "recipe=none,auto", "max_hours=null,1"]),
        ("'run_dir=runs/x-${seed}'", ["run_dir=runs/x-${seed}"]),
        ("-m name=1,2 dataset.root=~/a,~/b", ["--multirun", "name='1','2'", "dataset.root='~/a','~/b'"]),
        ("-m 'seed=range(3)' 'mode=glob(c*)'", ["--multirun", "seed=range(3)", "mode=glob(c*)"]),
        ("tracking.tags=[a,b] labels=[0,1] sampling.points={1:[80.0]}", None),
        ("tracking.tags=[José,b] labels=[a#,1]", ["tracking.tags=['José',b]", "labels=['a#',1]"]),
        ("labels=cat,dog labels=1,cat", ["labels=[cat,dog]", "labels=[1,cat]"]),
        ("\"labels='a,b','c'\"", ["labels=['a,b','c']"]),
        (
            "labels=José,b 'labels=house mouse,b' \"labels='a,b'\"",
            ["labels=['José',b]", "labels=[house mouse,b]", "labels='a,b'"],
        ),
        ("labels=1_000 labels=true labels=nan", ["labels='1_000'", "labels='true'", "labels='nan'"]),
        ("labels=3 labels=null 'mode=cd '", ["labels=3", "labels=null", "mode=cd"]),
    ],
)
def test_flags_may_stand_anywhere_and_what_hydra_reads_right_is_left_alone(line, tidied):
    assert typed(line) == (shlex.split(line) if tidied is None else tidied)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("mod", "this is no setting; got 'mod'; allowed: key=value; fix: mode=..."),
        ("=3", "this is no setting; got '=3'"),
        ("'a b=1'", "can't make sense of an argument; got 'a b=1'"),
        ("mode=cd,ct", "mode has several values; got 'cd,ct'; allowed: one; fix: -m for a run of each"),
        ("sigmas=80,1", "sigmas=[80,1] for a list"),
        ("'name=x ${'", "a ${ without its key; got 'name=x ${'"),
        ("~tracking", "a run can't be without its tracking"),
        ("--why mode=cd", "--why needs a key; fix: --why steps"),
        ("--why=", "--why needs a key"),
        ("-m --why steps seed=0,1", "--why and --multirun are two commands"),
        ("--why steps --cfg job", "--why and --cfg are two commands"),
        ("--nonsense", "unrecognized arguments: --nonsense"),
        ("-c", "expected one argument"),
        ("--config-path x", "--config-path does not work with this command; fix: --config-dir"),
        ("--config-name x", "--config-name does not work with this command; fix: make it experiment/"),
        ("--experimental-rerun x", "--experimental-rerun does not work with this command"),
        ("--package x", "--package does not work with this command"),
        ("hydra.job.chdir=true", "hydra.job.chdir is Hydra's own"),
        ("hydra.run.dir=x", "fix: run_dir=..."),
        ("hydra.sweep.subdir=x", "fix: name=..."),
        ("hydra.mode=MULTIRUN", "fix: -m makes a sweep"),
        ("hydra.verbose=true", "HYDRA_FULL_ERROR=1"),
        ("hydra.output_subdir=x", "hydra.output_subdir is Hydra's own"),
        ("hydra/job_logging=x", "hydra/job_logging is Hydra's own"),
    ],
)
def test_what_can_not_be_had_is_refused(line, words):
    with pytest.raises(InputError) as caught:
        typed(line)
    assert words in str(caught.value)


def by_keys(line, command="train"):
    """What `line` is refused with by the command that knows its keys."""
    keys = Keys(command, ["steps", "mode", "optimizer.lr", "precision", "ckpt", "num"])
    with pytest.raises(InputError) as caught:
        tidy(shlex.split(line), GROUPS, None if command == "train" else "ckpt", keys.meant_by)
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ("--steps 100", "steps=100"),
        ("mode=cd --steps=1e5", "steps=1e5"),
        ("--mode cd", "mode=cd"),
        ("-mode cd", "mode=cd"),
        ("-lr 1e-3", "optimizer.lr=1e-3"),
        ("--learning-rate=3 -m", "optimizer.lr=3"),
        ("--max_steps", "steps=..."),
        ("--steps mode=cd", "steps=..."),
        ("--fp16 -m", "precision=fp16"),
        ("--mode 'a b'", "mode='a b'"),
    ],
)
def test_keys_written_as_flags_are_named_as_they_are_set(line, fix):
    assert by_keys(line).endswith(f" is no flag; settings are written key=value; fix: {fix}")


def test_flags_are_hydras_still_and_what_is_no_key_is_as_unknown_as_ever():
    assert by_keys("--ckpt runs/x", "sample").endswith("fix: ckpt=runs/x")
    for line in ("--nonsense 3", "--stpes=3", "--3"):
        assert by_keys(line).startswith(f"unrecognized arguments: {line.split()[0]}")
    keys = Keys("train", ["multirun", "cfg", "m", "info", "steps", "mult"])
    assert tidy(["--cfg", "job", "-m", "steps=-1", "--info"], GROUPS, None, keys.meant_by) == [
        *("--cfg=job", "--multirun", "--info=all", "steps=-1"),
    ]
    assert tidy(["--mult"], GROUPS, None, keys.meant_by) == ["--multirun"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tracking=null"], "no such option tracking=null; allowed: none, tensorboard, wandb"),
        (["dataset=null"], "no such option dataset=null; allowed: cifar10"),
        (["mode=1"], "no such option mode=1; allowed: cd"),
        (["ema=[1]"], "no such option ema=[1]"),
        (["name=null"], "name: input should be a valid string"),
        (["mode=CD"], "no such option mode=CD; allowed: cd, ct, ect, edm, ict, scd, sct; fix: mode=cd"),
        (["dataset.rot=1"], "unknown key dataset.rot; did you mean dataset.root?"),
        (["lr=1e-3"], "unknown key lr; did you mean optimizer.lr?"),
        (["dataset=mnist", "data=x"], "unknown key data; did you mean dataset or dataset.root?"),
        (["--steps", "100"], "--steps is no flag; settings are written key=value; fix: steps=100"),
        (["hydra.searchpath=[file:///nowhere]"], "/nowhere"),
        (["recipe=digits_cd"], "no such option recipe=digits_cd; allowed: auto, none"),
        (["recipe=non"], "; fix: recipe=none"),
        (
            ["dataset=cifar10", "recipe=cifar10-cd"],
            "no such option recipe=cifar10-cd",
        ),  # auto may miss it
        (["-m", "recipe=auto,nonsense"], "no such option recipe=nonsense"),
        (["experiment=null"], "steps: input should be greater"),
        (["run_dir="], "run_dir: it is empty, as a shell variable leaves it that is not set"),
        (["--config-dir", "nowhere"], "not found"),
        (["-m", "--cfg", "job", "seed=1,2"], ""),
    ],
)
def test_one_line_for_what_people_type_every_day(command, tmp_path, arguments, words):
    done = command("train", *arguments, "steps=0")
    assert done.returncode in (1, 2) and words in done.stderr and "Traceback" not in done.stderr, done.stderr
    if words:
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert not any(tmp_path.iterdir())


def test_names_as_people_have_them(command, tmp_path):
    """Trained, and then sampled by the line that the command prints, as a shell reads it."""
    name = "José's (1) #2=3"
    done = command("train", "mode=ict", *TINY, "-m", "seed=5", f"run_dir=my runs/{name}")
    assert done.returncode == 0, done.stderr
    done = command("train", "mode=ict", *TINY, "--run", "seed=5", f"run_dir=my runs/{name}", "steps=8")
    assert done.returncode == 0, done.stderr
    pasted = shlex.split(done.stderr.split("Next: ")[1].splitlines()[0])
    assert pasted == ["cm-sample", f"ckpt=my runs/{name}"]
    done = command("sample", *pasted[1:], "num=2")
    assert done.returncode == 0, done.stderr
    done = command("train", "mode=ict", *TINY, "name=123")
    assert done.returncode == 0 and (tmp_path / "runs" / "123" / "checkpoints").is_dir(), done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["--info"], ["--cfg", "job"]])
def test_answers_that_nobody_can_take_end_in_one_line(arguments):
    with open("/dev/full", "w") as full:
        argv = [sys.executable, "-m", "cm_train.commands.train", *arguments]
        done = subprocess.run(argv, stdout=full, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert done.returncode == 1 and len(done.stderr.splitlines()) == 1, done.stderr


@pytest.mark.parametrize("name", ["train", "sample"])
def test_current_folder_that_is_gone_is_one_line(tmp_path, name):
    command = f'mkdir gone; cd gone; rmdir ../gone; "{sys.executable}" -m cm_train.commands.{name} --help'
    done = subprocess.run(["sh", "-c", command], cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 2 and "the current folder is not there any more" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["train", "sample"])
@pytest.mark.parametrize("flag", ["--help", "--version"])
def test_help_is_there_before_torch_is(name, flag):
    code = f"import sys; sys.argv = ['cm-{name}', '{flag}']\nfrom cm_train.commands.{name} import main\n"
    code += "try: main()\nfinally: print([m for m in ('torch', 'wandb', 'numpy') if m in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0 and done.stderr.strip() == "[]", done.stderr
    lines = done.stdout.splitlines()
    assert f"cm-{name}" in done.stdout and len(lines) <= 45 and max(map(len, lines)) <= 80


@pytest.mark.long
@pytest.mark.parametrize("after_s", [1.0, *(pytest.param(s, marks=pytest.mark.long) for s in (0.3, 3.0))])
def test_signal_in_the_first_seconds_ends_the_command_in_good_order(start_cold, tmp_path, after_s):
    """Whatever it is just importing or reading then; the first moments are Python's own, before any line of ours."""
    process = start_cold("train", "mode=ict", *TINY[:1], "preview_every=0")
    time.sleep(after_s)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 3 and "Traceback" not in err, err
    assert "the same command" in err
    assert os.path.exists(tmp_path / "runs" / "digits-ict" / "config.yaml")

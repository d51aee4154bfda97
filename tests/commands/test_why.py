"""--why: what it says is what Hydra did."""

import subprocess
import sys

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf

from cm_train.commands.why import Composition
from cm_train.core import configs
from cm_train.core.keys import all_keys
from conftest import ENVIRONMENT

CONF = configs.conf_dir()
GROUPS = configs.groups("train")
WORDS = [
    f"{group}={path.stem}" for group in ("mode", "experiment", "dataset") for path in (CONF / group).glob("*.yaml")
]


def composed(word):
    """Hydra's composition with `word`, the values of it that are not resolved yet, and the options of groups."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(CONF), version_base=None):
        cfg = hydra.compose("train", overrides=[word], return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        choices = OmegaConf.to_container(cfg.hydra.runtime.choices)
        cfg = OmegaConf.masked_copy(cfg, [key for key in cfg if key != "hydra"])
        return Composition(cfg), OmegaConf.to_container(cfg), choices


def at(values, key):
    for part in key.split("."):
        values = {str(name): value for name, value in values.items()}[part]
    return values


def what_counts(lines):
    assert [line for line in lines if "<- counts" in line] == lines[-1:]
    return lines[-1].split("<- counts")[0].split("yaml", 1)[-1].strip()


@pytest.mark.parametrize("word", sorted(WORDS))
def test_what_counts_is_what_hydra_composed(word):
    composition, values, choices = composed(word)
    for group in {*GROUPS} - {"metrics"}:  # of which several are chosen
        *lines, read = composition.lines(group)
        chosen = choices[group] or "null"
        assert lines[0] == f"{group} = {chosen}"
        assert what_counts(lines) in (f"{group}: {chosen}", f"override /{group}: {chosen}", f"command line: {word}")
        assert choices[group] is None or f"conf/{group}/{chosen}.yaml" in read
    keys = [leaf for key in all_keys(values) if key not in GROUPS for leaf in composition.parts(key)]
    assert len(keys) > 70
    for key in keys:
        *_, last = composition._settings(key)
        assert last.value == what_counts(composition.lines(key))
        assert OmegaConf.to_container(OmegaConf.create(f"x: {last.value}"))["x"] == at(values, key), key


FILES = {
    "experiment/mine": "# @package _global_\ndefaults: [override /noise: wide, override /recipe: none]\nseed: 7\n",
    "noise/wide": "defaults: [lognormal]\nproposal: {std: 9}\n",
}
ANSWER = """\
seed = 7
  conf/train.yaml          0
  my/experiment/mine.yaml  7  <- counts

noise.proposal.name = lognormal
  conf/noise/lognormal.yaml  lognormal  <- counts  (by override /noise in my/experiment/mine.yaml)

noise.proposal.mean = -1.2
  conf/noise/lognormal.yaml  -1.2  <- counts  (by override /noise in my/experiment/mine.yaml)

noise.proposal.std = 9
  conf/noise/lognormal.yaml  1.2             (by override /noise in my/experiment/mine.yaml)
  my/noise/wide.yaml         9    <- counts  (by override /noise in my/experiment/mine.yaml)

run_dir = runs/digits-edm
  conf/train.yaml  runs/${name}  <- counts

noise = wide
  conf/train.yaml          noise: uniform
  conf/mode/edm.yaml       override /noise: lognormal
  my/experiment/mine.yaml  override /noise: wide       <- counts
  read: conf/noise/lognormal.yaml, my/noise/wide.yaml

mode = edm
  conf/train.yaml         mode: cd
  command line: mode=edm            <- counts
  read: conf/mode/edm.yaml

recipe = none
  conf/train.yaml          recipe: auto
  my/experiment/mine.yaml  override /recipe: none  <- counts
  read: conf/recipe/none.yaml

ema.half_life_images = null
  conf/ema/warmup.yaml                       null
  conf/mode/edm.yaml                         auto
  command line: ++ema.half_life_images=null        <- counts  (since ema.decay is set)
"""


def test_why_answers_with_files_of_the_users_and_words_of_the_command_line(command, tmp_path):
    for name, text in FILES.items():
        path = tmp_path / "my" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    keys = ["seed", "noise.proposal", "run_dir", "noise", "mode", "recipe", "ema.half_life_images"]
    for place in (["--config-dir", "my"], [f"hydra.searchpath=[file://{tmp_path}/my]"]):
        done = command("train", *place, "--why", *keys, "mode=edm", "experiment=mine", "ema.decay=0.5")
        assert done.returncode == 0 and done.stderr == "", done.stderr
        assert done.stdout == ANSWER


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["stepz"], "unknown key stepz; fix: did you mean steps?"),
        (["seed", "lr"], "unknown key lr; fix: did you mean optimizer.lr?"),
        (["nonsense.at.all"], "unknown key nonsense.at.all; fix: --cfg job shows all keys"),
        (["noise.curriculum.s0", "mode=ect"], "unknown key noise.curriculum.s0; fix: did you mean noise.curriculum?"),
        (["hydra"], "unknown key hydra; fix: --cfg job"),
        (["seed", "mode=xx"], "no such option mode=xx"),
    ],
)
def test_why_of_what_there_is_not_is_one_line(arguments, words, command):
    done = command("train", "--why", *arguments)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1, done.stderr
    assert words in done.stderr


def test_why_of_a_value_that_can_not_be_resolved_shows_it(command):
    done = command("train", "--why", "seed", "seed=${nope}")
    assert done.returncode == 0 and "seed = ${nope} (Interpolation key 'nope' not found)\n" in done.stdout, done.stderr


def test_why_answers_before_torch_is_there():
    code = "import sys; sys.argv = ['cm-train', '--why', 'name']\nfrom cm_train.commands.train import main\n"
    code += "try: main()\nfinally: print([m for m in ('torch', 'wandb', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    first, *_, last = done.stdout.splitlines()
    assert first == "name = digits-cd" and last == "[]"


def test_of_a_group_of_which_several_are_chosen_all_are_named():
    composition, values, _ = composed("metrics=[fd,kid]")
    lines = composition.lines("metrics")
    assert lines[0] == "metrics = [fd, kid]" and lines[-1] == "  read: conf/metrics/fd.yaml, conf/metrics/kid.yaml"
    assert " ".join(lines[2].split()) == "command line: metrics=[fd,kid] <- counts"
    assert set(values["metrics"]) == {"fd", "kid"}

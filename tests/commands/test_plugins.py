"""Other people's parts: a package beside the project brings a loss or a network and its YAML; a user allows it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cm_train.core import plugins
from cm_train.core.errors import InputError
from conftest import TINY

EXAMPLE = Path(__file__).parents[2] / "docs" / "example-plugin"
NETWORK = """
from typing import Literal
from torch import nn
from cm_train.core.registry import register
from cm_train.models.backbones.base import BackboneConfig

print("imported", flush=True)

@register
class Plain(nn.Module):
    class Config(BackboneConfig):
        name: Literal["plain"] = "plain"
        width: int = 8

    def __init__(self, config, image_size, image_channels, num_labels):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(image_channels, config.width, 3, padding=1), nn.SiLU(),
            nn.Conv2d(config.width, image_channels, 3, padding=1),
        )

    def forward(self, x, c_noise, labels=None, dropout_keys=None):
        return self.layers(x) + c_noise[:, None, None, None]
"""


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """The example package, installed as its users would."""
    target = tmp_path_factory.mktemp("example")
    argv = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--quiet"]
    subprocess.run([*argv, "--target", str(target), str(EXAMPLE)], check=True, capture_output=True)
    return target


@pytest.fixture
def network(tmp_path):
    """An installed package that brings a network."""
    home = tmp_path / "installed"
    (home / "cm_plain" / "conf" / "backbone").mkdir(parents=True)
    (home / "cm_plain" / "__init__.py").write_text(NETWORK)
    (home / "cm_plain" / "conf" / "backbone" / "plain.yaml").write_text("name: plain\nwidth: 8\ndropout: 0.0\n")
    info = home / "cm_plain-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cm-plain\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[cm_train.components]\ncm_plain = cm_plain\n")
    return home


@pytest.fixture
def run(command):
    """run(folder, "train", ..., path=where the package is installed) -> the finished process."""

    def start(folder, name, *arguments, path):
        return command(name, *arguments, cwd=folder, PYTHONPATH=str(path))

    return start


def test_the_example_is_a_page(example):
    code = (EXAMPLE / "cm_robust" / "components.py").read_text()
    assert len(code.splitlines()) <= 40


def test_a_loss_of_ones_own_trains_on_ranks_and_resumes(example, tmp_path, run):
    command = ["plugins=[cm_robust]", "mode=robust", *TINY, "devices=2"]
    done = run(tmp_path, "train", *command, "steps=3", path=example)
    assert done.returncode == 0, done.stderr
    done = run(tmp_path, "train", *command, path=example)
    assert done.returncode == 0 and "resuming at step 3" in done.stderr, done.stderr
    rows = [json.loads(line) for line in (tmp_path / "runs/digits-robust/metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 6 and rows[-1]["loss"] < 100
    # The network is one of this project's, so that nothing more is needed to sample from it.
    assert run(tmp_path, "sample", "runs/digits-robust", "num=2", "steps=2", path=example).returncode == 0


def test_a_plugin_has_no_say_unless_it_is_allowed(example, tmp_path, run):
    done = run(tmp_path, "train", "mode=robust", *TINY, path=example)
    assert done.returncode == 2 and "no such option mode=robust" in done.stderr
    done = run(tmp_path, "train", "mode=edm", "objective.name=robust_edm", *TINY, path=example)
    assert done.returncode == 2 and "unknown objective" in done.stderr
    done = run(tmp_path, "train", "plugins=[cm_robst]", "mode=edm", *TINY, path=example)
    assert done.returncode == 2 and "no such plugin; got 'cm_robst'; allowed: cm_robust" in done.stderr


def test_a_checkpoint_imports_nothing_and_says_what_it_needs(network, tmp_path, run):
    """Of its own it may name what it will: only the user's word has a plugin imported."""
    command = ["plugins=[cm_plain]", "mode=edm", "backbone=plain", *TINY]
    done = run(tmp_path, "train", *command, path=network)
    assert done.returncode == 0, done.stderr
    for words in (["sample", "runs/digits-edm", "num=2"], ["train", "mode=ect", "teacher=runs/digits-edm", *TINY]):
        done = run(tmp_path, *words, path=network)
        assert done.returncode == 2 and "imported" not in done.stdout
        assert "has a part that is not known here: backbone 'plain'" in done.stderr
        assert "fix: plugins=[cm_plain], once you trust it" in done.stderr
    again = run(tmp_path, "train", "mode=edm", *TINY, path=network)
    assert again.returncode == 2 and "fix: plugins=[cm_plain]" in again.stderr
    done = run(tmp_path, "sample", "runs/digits-edm", "num=2", "steps=2", "plugins=[cm_plain]", path=network)
    assert done.returncode == 0 and "imported" in done.stdout, done.stderr


PARTS = """
from typing import Literal
from cm_train.core.registry import register
from cm_train.data.datasets.base import DatasetConfig
from cm_train.data.datasets.digits import Digits
from cm_train.sampling.samplers.base import SamplerConfig
from cm_train.sampling.samplers.heun import Heun

@register
class Mine(Digits):
    class Config(DatasetConfig):
        name: Literal["mine"] = "mine"
        split: Literal["all"] = "all"

@register
class Mysamp(Heun):
    class Config(SamplerConfig):
        name: Literal["mysamp"] = "mysamp"
    usual_for = None
"""


@pytest.mark.long
def test_data_of_a_plugin_reach_the_teacher_and_its_sampler_the_sample_command(network, tmp_path, run):
    (network / "cm_plain" / "__init__.py").write_text(PARTS)
    (network / "cm_plain" / "conf" / "dataset").mkdir()
    (network / "cm_plain" / "conf" / "dataset" / "mine.yaml").write_text(
        "name: mine\nsplit: all\nconditional: false\nhflip: false\n"
    )
    command = ["plugins=[cm_plain]", "dataset=mine", *TINY]
    assert (
        run(tmp_path, "train", *command, "mode=edm", "run_dir=runs/mine-edm", "steps=3", path=network).returncode == 0
    )
    done = run(tmp_path, "train", *command, "mode=ict", "steps=3", path=network)
    assert done.returncode == 0, done.stderr
    # A teacher that is trained first is composed anew, and knows the plugin's files too.
    done = run(tmp_path, "train", *command, "mode=ect", "run_dir=other/s", "max_hours=0.003", path=network)
    assert done.returncode == 3 and "edm on mine" in done.stderr, done.stderr  # the teacher's steps are many
    done = run(
        tmp_path, "sample", "runs/mine-edm", "num=2", "steps=2", "sampler=mysamp", "plugins=[cm_plain]", path=network
    )
    assert done.returncode == 0, done.stderr


METRIC = """
from typing import Literal
from torch import Tensor
from cm_train.core.registry import register
from cm_train.evaluation.features.base import Extractor, FeaturesConfig
from cm_train.evaluation.metrics.base import Metric, MetricConfig

@register
class Gap(Metric):
    numbers = {"gap": "lower"}

    class Config(MetricConfig):
        name: Literal["gap"] = "gap"

    def measure(self, samples, real):
        return {"gap": float((samples.features.mean(0) - real.statistics.mean).abs().max())}

@register
class Bright(Extractor):
    sha256 = "0" * 64
    input = "as they are"

    class Config(FeaturesConfig):
        name: Literal["bright"] = "bright"

    def __init__(self, config, reference=None):
        super().__init__()

    def forward(self, images):
        return images.float().mean((2, 3)), None
"""


def test_a_metric_and_features_of_a_plugin_measure_a_run(network, tmp_path, run):
    (network / "cm_plain" / "__init__.py").write_text(METRIC)
    for group, text in (("metrics/gap", "gap: {name: gap}"), ("features/bright", "name: bright")):
        path = network / "cm_plain" / "conf" / f"{group}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text + "\n")
    parts = ["plugins=[cm_plain]", "metrics=[gap,kid]", "features=bright"]
    done = run(tmp_path, "train", "mode=ict", *TINY, *parts, "eval_every=6", "eval_num=16", path=network)
    assert done.returncode == 0, done.stderr
    logged = json.loads((tmp_path / "runs/digits-ict/metrics.jsonl").read_text().splitlines()[-1])
    done = run(tmp_path, "evaluate", "runs/digits-ict", *parts, "num=16", "blocks=1", "out=e", path=network)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "e" / "eval.json").read_text())["metrics"]
    assert set(found) == {"gap", "kid"}
    assert logged["eval_gap"] == pytest.approx(found["gap"]["mean"], abs=1.0)  # one grey level between batch shapes
    done = run(tmp_path, "evaluate", "runs/digits-ict", "metrics=[gap]", "out=f", path=network)
    assert done.returncode == 2 and "no such option metrics=gap" in done.stderr


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("class A:\n    class Config(EMAConfig):\n        x: int = 1\n", "Config has no name of its own"),
        ("class A:\n    class Config(EMAConfig):\n        name: Literal['warmup'] = 'warmup'\n", "registered twice"),
        ("import sys; sys.exit(7)\n", "SystemExit: 7"),
    ],
)
def test_a_plugin_that_is_wrong_is_named(code, words, network, tmp_path, run):
    head = "from typing import Literal\nfrom cm_train.core.registry import register\n"
    head += "from cm_train.models.averages import EMAConfig\n"
    body = code if code.startswith("import") else f"@register\n{code}"
    (network / "cm_plain" / "__init__.py").write_text(head + body)
    done = run(tmp_path, "train", "plugins=[cm_plain]", "mode=edm", *TINY, path=network)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "plugin cm_plain can't be imported" in done.stderr and words in done.stderr


def test_plugins_without_brackets_and_a_search_path_that_is_none_are_said(network, tmp_path, run):
    done = run(tmp_path, "train", "plugins=cm_plain", "mode=edm", *TINY, path=network)
    assert done.returncode == 2 and "plugins is a list" in done.stderr and "fix: plugins=[cm_plain]" in done.stderr
    done = run(tmp_path, "train", "plugins=[cm_plain]", "hydra.searchpath=pkg://nope", "mode=edm", *TINY, path=network)
    assert done.returncode == 2


def test_a_plugin_that_breaks_is_one_line(network, tmp_path, run):
    (network / "cm_plain" / "__init__.py").write_text("raise RuntimeError('unfinished')\n")
    done = run(tmp_path, "train", "plugins=[cm_plain]", "mode=edm", *TINY, path=network)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "plugin cm_plain can't be imported; got 'RuntimeError: unfinished'" in done.stderr


def test_without_any_plugin_the_list_says_so(monkeypatch):
    monkeypatch.setattr(plugins, "installed", dict)
    with pytest.raises(InputError, match="allowed: none is installed"):
        plugins.load(["anything"])

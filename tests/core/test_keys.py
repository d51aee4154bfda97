"""The keys that other words stand for: those of the configs themselves, asked as the commands ask."""

import sys

import pytest

from cm_train.core import configs
from cm_train.core.keys import Keys
from cm_train.core.synonyms import SAMPLE, TRAIN


@pytest.fixture(scope="module")
def known():
    """known("train") -> its keys on an empty command line."""
    before, sys.argv = sys.argv, ["cm-train"]
    found = {name: configs.keys_of(name) for name in ("train", "sample")}
    sys.argv = before
    return found.__getitem__


TRAIN_WORDS = {
    "lr": "optimizer.lr",
    "LR": "optimizer.lr",
    "learning-rate": "optimizer.lr",
    "optimizer.learning_rate": "optimizer.lr",
    "train.lr": "optimizer.lr",
    "batch": "batch_size",
    "bs": "batch_size",
    "batchsize": "batch_size",
    "iters": "steps",
    "iterations": "steps",
    "max_steps": "steps",
    "num_steps": "steps",
    "gpus": "devices",
    "num_gpus": "devices",
    "nproc": "devices",
    "output_dir": "run_dir",
    "outdir": "run_dir",
    "logdir": "run_dir",
    "data": "dataset or dataset.root",
    "data_dir": "dataset.root",
    "dataset_dir": "dataset.root",
    "path": "dataset.root",
    "root": "dataset.root",
    "image_size": "dataset.image_size",
    "resolution": "dataset.image_size",
    "size": "dataset.image_size",
    "fp16": "precision=fp16",
    "amp": "precision",
    "mixed_precision": "precision",
    "ema_decay": "ema.decay",
    "dropout": "backbone.dropout",
    "model": "backbone",
    "network": "backbone",
    "arch": "backbone",
    "wandb": "tracking=wandb",
    "huber_c": "objective.huber_c",
    "dataset.rot": "dataset.root",
    "ema.decya": "ema.decay",
    "stpes": "steps",
}
SAMPLE_WORDS = {
    "checkpoint": "ckpt",
    "model": "ckpt",
    "path": "ckpt",
    "n": "num",
    "num_images": "num",
    "count": "num",
    "num_steps": "steps",
    "nfe": "steps",
    "output": "out",
    "outdir": "out",
    "class": "labels",
    "label": "labels",
}


@pytest.mark.parametrize(
    ("command", "word", "key"),
    [(c, *pair) for c, words in (("train", TRAIN_WORDS), ("sample", SAMPLE_WORDS)) for pair in words.items()],
)
def test_what_other_tools_call_it_gets_our_key(command, word, key, known):
    assert known(command).advice(word) == f"did you mean {key}?"


def test_words_that_are_nothing_or_too_much_are_not_guessed_at(known):
    assert known("train").advice("xyzzyq").startswith("see --help")
    assert known("train").meant_by("name_of_nothing") == []
    assert Keys("train", ["a.x", "b.x", "c.x", "d.x"]).meant_by("x") == []
    assert Keys("train", ["a.x", "b.x"]).meant_by("x") == ["a.x", "b.x"]
    assert "the same command again" in known("train").advice("resume")


def test_key_of_another_option_names_that(known):
    advice = known("train").advice("dataset.root")
    assert advice == "it comes with dataset=cifar10|fashion_mnist|image_folder|mnist"
    assert known("train").advice("backbone.widht") != advice


def test_keys_are_those_of_the_options_that_the_command_line_chooses(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["cm-train", "dataset=image_folder", "mode=edm", "root=x"])
    keys = configs.keys_of("train")
    assert "dataset.root" in keys.here and "objective.huber_c" not in keys.here
    assert keys.advice("objective.huber_c").startswith("it comes with mode=cd|ct")
    monkeypatch.setattr(sys, "argv", ["cm-train", "dataset=nothing", "root=x"])
    assert "dataset.root" in configs.keys_of("train").elsewhere


@pytest.mark.parametrize(("command", "table"), [("train", TRAIN), ("sample", SAMPLE)])
def test_every_synonym_is_a_word_of_its_own_for_a_key_that_exists(command, table, known):
    keys = known(command)
    all_known = {*keys.here, *keys.elsewhere}
    assert {target.partition("=")[0] for target in table} <= all_known
    for target, words in table.items():
        assert words == words.lower() and len(set(words.split())) == len(words.split()), target
        assert not set(words.split()) & all_known, f"{target}: a key needs no synonym"

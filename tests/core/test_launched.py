"""What a launcher's variables make of a process, and that those left over from another job are told at once."""

import pytest

from cm_train.core import launched
from cm_train.core.errors import InputError
from cm_train.core.launched import STORE, Place
from cm_train.sweeps import leader as sweeps
from conftest import TINY

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", STORE)
ADDRESS = {"MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.fixture
def told(monkeypatch):
    """told(RANK="3") -> nothing; the environment then has these variables alone."""

    def tell(**variables):
        for name in (*NAMES, "CM_TRAIN_PATIENCE_S"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return tell


def test_place_is_what_each_launcher_says(told):
    told()
    assert launched.place() is None
    told(**ADDRESS, LOCAL_WORLD_SIZE="2")
    assert launched.place() is None, "an address alone makes nobody a rank"
    told(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", **{STORE: "/tmp/store"})
    assert launched.place() == Place(1, 2, 1, 1800.0), "ours"
    told(RANK="3", WORLD_SIZE="4", LOCAL_RANK="1", LOCAL_WORLD_SIZE="2", CM_TRAIN_PATIENCE_S="7.5", **ADDRESS)
    assert launched.place() == Place(3, 4, 1, 7.5), "torchrun"
    told(RANK="0", WORLD_SIZE="1", **ADDRESS)
    assert launched.place() == Place(0, 1, 0, 1800.0), "a cluster's, one process a machine"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "3"}, ["RANK=3 without WORLD_SIZE, MASTER_ADDR, MASTER_PORT", "unset RANK,"]),
        ({"WORLD_SIZE": "8"}, ["WORLD_SIZE=8 without RANK, MASTER_ADDR, MASTER_PORT", "unset WORLD_SIZE,"]),
        ({"RANK": "0", "WORLD_SIZE": "1"}, ["without MASTER_ADDR, MASTER_PORT", "unset RANK WORLD_SIZE,"]),
        ({"LOCAL_RANK": "0"}, ["LOCAL_RANK=0 without RANK, WORLD_SIZE", "unset LOCAL_RANK,"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": ""}, ["without MASTER_PORT"]),
        ({"RANK": "", "WORLD_SIZE": "2", **ADDRESS}, ["without RANK"]),
        ({"RANK": "one", "WORLD_SIZE": "2", **ADDRESS}, ["RANK must be a number; got 'one'"]),
        ({"RANK": "-1", "WORLD_SIZE": "2", **ADDRESS}, ["RANK must be a number"]),
        ({"RANK": "0", "WORLD_SIZE": "²", **ADDRESS}, ["WORLD_SIZE must be a number"]),
        ({"RANK": "2", "WORLD_SIZE": "2", **ADDRESS}, ["RANK=2, WORLD_SIZE=2", "0 to WORLD_SIZE - 1"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "2", **ADDRESS}, ["LOCAL_RANK=2"]),
        ({"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "x", **ADDRESS}, ["LOCAL_WORLD_SIZE must be a number"]),
        ({"RANK": "0", "WORLD_SIZE": "2", **ADDRESS, "MASTER_PORT": "65536"}, ["MASTER_PORT is no port; got '65536'"]),
        ({"RANK": "0", "WORLD_SIZE": "1", **ADDRESS, "CM_TRAIN_PATIENCE_S": "nan"}, ["CM_TRAIN_PATIENCE_S", "'nan'"]),
    ],
)
def test_half_a_rank_and_an_impossible_one_are_refused_and_silence_nobody(variables, words, told):
    told(**variables)
    with pytest.raises(InputError) as refused:
        launched.place()
    assert all(word in str(refused.value) for word in words), refused.value
    assert not launched.is_rank() and not launched.is_follower()
    assert sweeps.asked_for(["--multirun", "seed=0,1"]), "whose leader refuses it once, for all jobs"


def test_only_a_rank_leaves_the_sweep_and_the_terminal_to_another(told):
    told(RANK="0", WORLD_SIZE="2", **ADDRESS)
    assert launched.is_rank() and not launched.is_follower()
    assert not sweeps.asked_for(["--multirun", "seed=0,1"])
    told(RANK="1", WORLD_SIZE="2", **ADDRESS)
    assert launched.is_follower()


@pytest.mark.parametrize("more", [[], ["-m", "seed=0,1"], ["devices=2"]], ids=["run", "sweep", "ranks"])
def test_a_left_over_rank_is_one_line_and_trains_nothing(more, start, tmp_path):
    process = start("train", "mode=cd", *TINY, *more, RANK="3", WORLD_SIZE="4")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert len(err.splitlines()) == 1 and "RANK=3, WORLD_SIZE=4 without MASTER_ADDR, MASTER_PORT" in err, err
    assert list(tmp_path.iterdir()) == []


def test_wrong_patience_is_one_line_of_the_command_and_not_of_each_rank(start, tmp_path):
    process = start("train", "mode=edm", *TINY, "devices=2", "--quiet", CM_TRAIN_PATIENCE_S="soon")
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2 and len(err.splitlines()) == 1 and "CM_TRAIN_PATIENCE_S" in err, err

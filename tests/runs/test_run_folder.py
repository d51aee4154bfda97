import pytest

from cm_train.core.errors import InputError
from cm_train.runs.config import parse
from cm_train.runs.lock import lock
from cm_train.runs.same_run import check_same_run
from cm_train.runs.stored import store_config, stored_config


def test_lock_refuses_a_second_holder_and_lets_go(tmp_path):
    folder = tmp_path / "run"
    refused = pytest.raises(InputError, match="is in use by process [0-9]+")
    with lock(folder), refused, lock(folder):
        pass
    with lock(folder):
        pass


@pytest.mark.parametrize("name", ["a\0b", "a" * 300])
def test_lock_of_an_odd_name_is_an_input_error(name, tmp_path):
    with pytest.raises(InputError, match="can't write the run folder"), lock(tmp_path / name):
        pass


def test_lock_does_not_empty_what_a_link_points_to(tmp_path):
    (tmp_path / "precious").write_text("text")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(InputError, match="can't write the run folder"), lock(tmp_path / "run"):
        pass
    assert (tmp_path / "precious").read_text() == "text"


def test_stored_config_round_trip(tmp_path):
    assert stored_config(tmp_path) is None
    values = {"steps": 3, "noise": {"sigma_min": 0.002}, "list": [1, 2], "none": None}
    store_config(tmp_path, values)
    assert stored_config(tmp_path) == values
    assert not list(tmp_path.glob("*.tmp"))


def test_store_config_writes_a_shared_list_out_twice(tmp_path):
    """YAML would write an alias, which the reader refuses."""
    shared = [0.9, 0.999]
    values = {"optimizer": {"betas": shared}, "other": {"betas": shared}, "nested": [shared, shared]}
    store_config(tmp_path, values)
    assert stored_config(tmp_path) == values


NO_CONFIGS = ["", "- 1\n- 2", "a: [", "!!python/object/apply:os.system ['touch owned']", "\x00"]
NO_CONFIGS += ["a: " + "[" * 40 + "]" * 40, "a: &x 1\nb: *x", "a: 2001-01-01", "a: 0x" + "f" * 101, "a: 1\n" * 100_000]


@pytest.mark.parametrize("text", NO_CONFIGS, ids=range(len(NO_CONFIGS)))
def test_a_config_that_is_none_is_refused_and_runs_nothing(text, tmp_path):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=r"config\.yaml is not a run's config"):
        stored_config(tmp_path)
    assert not (tmp_path / "owned").exists()


def test_check_same_run_names_what_differs_and_lets_pass_what_may(composed, tmp_path):
    def config(*overrides):
        return parse(composed("mode=edm", "steps=5", "schedule_steps=5", *overrides))

    stored = config()
    check_same_run(tmp_path, stored, config("steps=50", "tracking=none", "devices=2", "name=other"))
    for changes, message in (
        (["seed=1"], r"seed \(0 -> 1\)"),
        (["optimizer.lr=0.2"], r"optimizer.lr \(0.001 -> 0.2\)"),
        (["ema.extra=[0.9]"], "ema.extra"),
        (["ema=half_life"], r"ema.rampup \(None -> 0.05\)"),
    ):
        with pytest.raises(InputError, match=message):
            check_same_run(tmp_path, stored, config(*changes))

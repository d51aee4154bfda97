"""How many images go through the networks at once: by what they take, and what is free."""

from dataclasses import replace

import pytest
import torch
from test_trainer import build  # noqa: F401 - a fixture

from cm_train.core import free_memory
from cm_train.core.errors import OutOfMemory
from cm_train.core.world import ALONE
from cm_train.training import micro_batch as fitting
from cm_train.training.micro_batch import Need

CPU = torch.device("cpu")


@pytest.fixture
def objective(build):  # noqa: F811
    return build("mode=ict").objective


def test_saved_bytes_are_those_of_a_pass_by_hand(objective):
    """Counted again with a hook of the test's own on a batch of five: activations grow with the images."""
    seen = {}
    own = {p.untyped_storage().data_ptr() for p in objective.parameters()}

    def pack(x):
        if x.untyped_storage().data_ptr() not in own:
            seen[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss, _ = objective(objective.draw(torch.zeros(5, 1, 8, 8), None, 0, range(5)))
    five = sum(x.untyped_storage().nbytes() for x in seen.values())
    assert five == pytest.approx(5 * fitting.saved_bytes(objective, CPU, None), rel=0.05)
    assert loss.shape == (5,)


@pytest.mark.parametrize(
    ("free", "expected"),
    [(10**6, 12), (2 * (100 + 120), 12), (2 * (100 + 119), 6), (2 * (100 + 59), 4), (2 * 111, 1), (2 * 105, 1)],
)
def test_settle_takes_the_largest_divisor_that_fills_half_of_what_is_free(free, expected, objective, monkeypatch):
    monkeypatch.setattr(fitting, "_fits", lambda *args: True)
    assert fitting.settle(12, Need(100, 10, free), objective, CPU, None, ALONE) == expected


def test_settle_tries_what_it_estimates_only_where_that_is_much(objective, monkeypatch):
    tried = []
    monkeypatch.setattr(fitting, "_fits", lambda objective, num, *args: tried.append(num) or num <= 3)
    assert fitting.settle(12, Need(100, 10, 2201), objective, CPU, None, ALONE) == 12 and not tried
    assert fitting.settle(12, Need(100, 10, 1000), objective, CPU, None, ALONE) == 3
    assert tried == [12, 6, 4, 3]
    monkeypatch.setattr(fitting, "_fits", lambda *args: False)
    with pytest.raises(OutOfMemory, match="for 1 images at once"):
        fitting.settle(12, Need(100, 10, 1000), objective, CPU, None, ALONE)


def test_a_try_leaves_nothing(objective):
    assert fitting._fits(objective, 3, CPU, None)
    assert all(parameter.grad is None for parameter in objective.parameters())


def test_what_has_no_room_is_one_line(objective, monkeypatch, build):  # noqa: F811
    monkeypatch.setattr(fitting, "free_bytes", lambda device, num: 2**20)
    with pytest.raises(
        OutOfMemory,
        match=r"for 1 images at once, and 0\.00 GiB are free; fix: activation_checkpointing=true, or a smaller",
    ):
        build("mode=ict", name="none")


def test_a_run_that_goes_on_keeps_its_number_and_says_where_it_no_longer_fits(build, monkeypatch):  # noqa: F811
    from cm_train.training.tracking import SilentTracker

    trainer = build("mode=ict", "micro_batch=8")
    trainer.run(SilentTracker())
    need = fitting.need(trainer.config, trainer.objective, CPU, None, ALONE)
    assert build("mode=ict", "micro_batch=8").micro_batch == 8
    between = (need.of(4) + need.of(8)) // 2
    monkeypatch.setattr(fitting, "free_bytes", lambda device, num: between)
    with pytest.raises(OutOfMemory, match=r"for 8 images at once, .*fix: micro_batch=4 or less"):
        build("mode=ict", "micro_batch=8")


def test_settled_once_it_is_stored(build, monkeypatch):  # noqa: F811
    from cm_train.runs import worker
    from cm_train.runs.read_back import read_back

    sure = build("mode=ict")
    need = fitting.need(sure.config, sure.objective, CPU, None, ALONE)
    monkeypatch.setattr(fitting, "free_bytes", lambda device, num: 2 * need.of(5))
    config = build("mode=ict", name="new").config
    assert config.micro_batch == 4
    worker.run(config.model_copy(update={"micro_batch": "auto"}), lambda reserve_s: False)
    assert read_back(config.folder).micro_batch == 4


def test_free_bytes_is_the_least_of_machine_groups_and_limits(tmp_path, monkeypatch):
    status = tmp_path / "meminfo"
    status.write_text("MemTotal:  9000 kB\nMemAvailable:    4000 kB\n")
    monkeypatch.setattr(free_memory, "_of_machine", lambda: free_memory._fields(status)["MemAvailable"])
    monkeypatch.setattr(free_memory, "_of_cgroups", lambda: [5_000_000, 3_000_000])
    monkeypatch.setattr(free_memory, "_of_limit", lambda: None)
    assert free_memory.free_bytes(CPU) == 3_000_000
    assert free_memory.free_bytes(CPU, 3) == 1_000_000
    monkeypatch.setattr(free_memory, "_of_limit", lambda: 2_000_000)
    assert (free_memory.free_bytes(CPU), free_memory.free_bytes(CPU, 3)) == (2_000_000, 1_000_000)
    monkeypatch.setattr(free_memory, "_of_cgroups", lambda: [-5])
    assert free_memory.free_bytes(CPU) == 0


def test_limits_of_control_groups_are_read_up_to_the_root(tmp_path, monkeypatch):
    inner = tmp_path / "user" / "job"
    inner.mkdir(parents=True)
    for folder, most, used in ((inner, "max", 10), (inner.parent, 1000, 400), (tmp_path, 5000, 100)):
        (folder / "memory.max").write_text(f"{most}\n")
        (folder / "memory.current").write_text(f"{used}\n")
    monkeypatch.setattr(free_memory, "_CGROUPS", tmp_path)
    names = ("memory.max", "memory.current")
    found = [(folder, *names) for folder in (inner, inner.parent, tmp_path)]
    monkeypatch.setattr(free_memory, "_groups", lambda: found)
    assert free_memory._of_cgroups() == [600, 4900]


def test_this_process_holds_something():
    assert free_memory.resident_bytes() > 2**20
    assert free_memory.resident_bytes(peak=True) >= free_memory.resident_bytes() // 2
    assert replace(Need(1, 2, 3), free=9).of(4) == 9

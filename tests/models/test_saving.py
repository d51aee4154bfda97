import threading

import pytest
import torch
from test_checkpoints import BACKBONE, CONFIG, network

from cm_train.models.checkpoints import load as loading
from cm_train.models.checkpoints import read as checkpoint
from cm_train.models.checkpoints import write as saving


@pytest.fixture
def gate(monkeypatch):
    """An event that every write waits for."""
    opened, write = threading.Event(), saving.write

    def slow(*args, **kwargs):
        assert opened.wait(60)
        write(*args, **kwargs)

    monkeypatch.setattr(saving, "write", slow)
    return opened


def arguments(run, step, weights):
    manifest = {"step": step, "finished": False, "ema": "ema_0.9", "denoiser": CONFIG, "backbone": BACKBONE}
    return checkpoint.step_folder(run, step), dict.fromkeys(("denoiser", "ema_0.9"), weights), {}, manifest


def of_run(run):
    return saving.Saver(after=lambda step: saving.prune(run, 3))


def start(saver, run, step, weights):
    folder, weights, state, manifest = arguments(run, step, weights)
    saver.start(folder, weights, state, provenance={}, **manifest)


def test_a_background_save_holds_the_weights_of_its_moment(gate, tmp_path):
    """Training goes on, and changes the weights, while the writer has not begun."""
    module, saver = network(0), of_run(tmp_path)
    start(saver, tmp_path, 1, module.state_dict())
    expected = {name: value.clone() for name, value in module.state_dict().items()}
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    assert checkpoint.latest(tmp_path) is None
    gate.set()
    saver.wait()
    loaded = loading.load_denoiser(tmp_path, "raw").state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_a_second_save_waits_for_the_first(gate, tmp_path):
    saver, weights = of_run(tmp_path), network(0).state_dict()
    start(saver, tmp_path, 1, weights)
    threading.Timer(0.2, gate.set).start()
    start(saver, tmp_path, 2, weights)
    assert checkpoint.step_folder(tmp_path, 1).exists()
    saver.wait()
    assert checkpoint.latest(tmp_path)[1].step == 2


def test_what_must_be_synced_is_synced_before_the_checkpoint_appears(tmp_path):
    seen = []

    def before(step):
        seen.append(list(tmp_path.rglob("step_*")))
        return {}

    saver = saving.Saver(before)
    start(saver, tmp_path, 1, network(0).state_dict())
    saver.wait()
    assert seen == [[]]


def test_a_failed_background_save_is_said_and_the_next_one_works(monkeypatch, tmp_path, capsys):
    write, failures = saving.write, [OSError(28, "No space left on device")]

    def sometimes(*args, **kwargs):
        if failures:
            raise failures.pop()
        write(*args, **kwargs)

    monkeypatch.setattr(saving, "write", sometimes)
    saver, weights = of_run(tmp_path), network(0).state_dict()
    start(saver, tmp_path, 1, weights)
    start(saver, tmp_path, 2, weights)
    saver.wait()
    assert "could not save step 1: No space left on device; trying again at the next save" in capsys.readouterr().err
    assert [f.name for f in checkpoint.folders(tmp_path)] == ["step_00000002"]


def test_now_does_not_write_the_same_step_twice(monkeypatch, tmp_path):
    saver, weights = of_run(tmp_path), network(0).state_dict()
    start(saver, tmp_path, 1, weights)
    saver.wait()
    monkeypatch.setattr(saving, "write", lambda *_, **__: pytest.fail("written again"))
    folder, weights, state, manifest = arguments(tmp_path, 1, weights)
    saver.now(folder, weights, state, provenance={}, **manifest)


def test_a_save_that_must_be_there_tells_of_any_error(tmp_path, capsys):
    """A writer that dies of something else than the disk must not look like one that is done."""

    def broken(step):
        raise MemoryError("no room for the metrics")

    saver, weights = saving.Saver(before=broken), network(0).state_dict()
    folder, weights, state, manifest = arguments(tmp_path, 1, weights)
    with pytest.raises(MemoryError):
        saver.now(folder, weights, state, provenance={}, **manifest)
    start(saver, tmp_path, 2, network(0).state_dict())
    saver.wait()
    assert "could not save step 2: MemoryError: no room for the metrics; trying again" in capsys.readouterr().err
    assert not folder.exists()

import pytest
import torch

from cm_train.core.world import ALONE, World
from cm_train.training import meters
from cm_train.training.meters import NUM_BANDS, Window, norm

CPU = torch.device("cpu")
NAN = float("nan")


def window():
    return Window(CPU, sigma_min=1.0, sigma_max=256.0)  # each band is one doubling


def test_window_means_over_all_that_is_finite():
    w = window()
    w.add({"loss": torch.tensor([1.0, NAN, 3.0]), "distance": torch.tensor([1.0, 2.0, 6.0]), "one": torch.tensor(5.0)})
    w.add({"loss": torch.tensor([5.0]), "distance": torch.tensor([torch.inf]), "one": torch.tensor(NAN)})
    assert w.close(ALONE) == {"loss": 3.0, "distance": 3.0, "one": 5.0}
    w.add({"loss": torch.tensor([NAN])})
    assert w.close(ALONE) == {"loss": None}
    assert w.close(ALONE) == {}


def test_loss_is_sorted_into_bands_of_equal_width_in_ln_sigma():
    sigma = torch.tensor([1.0, 1.9, 2.1, 100.0, 200.0, 256.0, 0.5, 300.0, 3.0])
    loss = torch.tensor([1.0, 3.0, 10.0, 7.0, 1.0, 2.0, 5.0, 9.0, NAN])
    w = window()
    w.add({"distance": loss + 1, "loss": loss}, sigma)
    means = w.close(ALONE)
    bands = {name: value for name, value in means.items() if name.startswith("loss_band")}
    # Bands without an image, or without a finite one, are left out; what lies beyond the ends counts for the end.
    assert bands == {"loss_band_0": 3.0, "loss_band_1": 10.0, "loss_band_6": 7.0, "loss_band_7": 4.0}
    assert NUM_BANDS == 8


def test_bands_take_levels_of_either_precision():
    for kind in (torch.float32, torch.float64):
        w = window()
        w.add({"loss": torch.ones(3)}, torch.tensor([1.0, 16.5, 256.0], dtype=kind))
        assert {"loss_band_0", "loss_band_4", "loss_band_7"} < w.close(ALONE).keys()


def steps(num, start=0):
    g = torch.Generator().manual_seed(start)
    for _ in range(num):
        loss = torch.rand(37, generator=g)
        yield {"loss": loss, "distance": loss.double() / 3}, 256 ** torch.rand(37, generator=g)


def test_a_window_goes_on_from_its_state_to_the_bit():
    whole, before, after = window(), window(), window()
    for values, sigma in steps(5, 1):
        whole.add(values, sigma)
        before.add(values, sigma)
    after.load(before.state(ALONE), ALONE)
    assert after.state(ALONE).keys() == before.state(ALONE).keys(), "also where it is saved again before the next step"
    for values, sigma in steps(5, 2):
        whole.add(values, sigma)
        after.add(values, sigma)
    assert after.close(ALONE) == whole.close(ALONE)


def test_one_rank_alone_goes_on_from_a_state(monkeypatch):
    before = window()
    before.add({"loss": torch.tensor([1.0, 2.0])}, torch.tensor([1.0, 256.0]))
    first, second = window(), window()
    first.load(before.state(ALONE), World(rank=0, size=2))
    second.load(before.state(ALONE), World(rank=1, size=2))
    assert first.close(ALONE) == {"loss": 1.5, "loss_band_0": 1.0, "loss_band_7": 2.0}
    assert second.close(ALONE) == {"loss": None}


def test_a_window_of_0_1_0_had_no_bands():
    w = window()
    w.load({"loss": torch.tensor([6.0, 2.0], dtype=torch.float64)}, ALONE)
    w.add({"loss": torch.tensor([6.0])}, torch.tensor([1.0]))
    assert w.close(ALONE) == {"loss": 4.0, "loss_band_0": 6.0}


def test_a_state_of_anything_else_is_refused():
    for wrong in (torch.zeros(3, dtype=torch.float64), torch.zeros(2), torch.zeros(1, 2, dtype=torch.float64)):
        with pytest.raises(TypeError, match="pairs"):
            window().load({"loss": wrong}, ALONE)


def test_norm_of_a_long_vector_is_exact_enough(monkeypatch):
    flat = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(meters, "_PART", 1000)
    assert norm(flat).item() == pytest.approx(flat.double().norm().item(), rel=1e-6)

"""Power-function averages and their reconstruction, against quadrature and a run's own weights."""

import pytest
import torch
from test_trainer import build, run  # noqa: F401 - build is a fixture

from cm_train.core.errors import InputError
from cm_train.models.averages import power_decay, power_exponent
from cm_train.models.checkpoints import find, posthoc
from cm_train.models.checkpoints import load as loading
from cm_train.models.checkpoints.posthoc import mixture, profile_product
from cm_train.models.checkpoints.weights import open_weights


@pytest.mark.parametrize(("width", "gamma"), [(0.05, 16.972), (0.10, 6.937), (0.20, 1.826)])
def test_power_exponent_is_the_tabled_one(width, gamma):
    assert power_exponent(width) == pytest.approx(gamma, abs=1e-3)
    g = power_exponent(width)
    assert ((g + 1) / ((g + 2) ** 2 * (g + 3))) ** 0.5 == pytest.approx(width, rel=1e-9)


def test_power_decay_follows_the_profile():
    """The weight that step i keeps at the end is near the profile (gamma + 1) / T (i / T)^gamma; the start has none."""
    steps, width = 4000, 0.1
    kept, weights = 1.0, torch.zeros(steps, dtype=torch.float64)
    for step in reversed(range(steps)):
        decay = power_decay(width, step)
        weights[step], kept = kept * (1 - decay), kept * decay
    assert kept == 0
    gamma = power_exponent(width)
    t = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    torch.testing.assert_close(weights, (gamma + 1) / steps * t**gamma, rtol=0.01, atol=1e-6)
    spread = ((weights * t**2).sum() - (weights * t).sum() ** 2).sqrt().item()
    assert spread == pytest.approx(width, rel=1e-3)


@pytest.mark.parametrize(
    ("a", "b"), [((1.0, 16.972), (1.0, 6.937)), ((0.3, 6.937), (1.0, 16.972)), ((2.0, 1.8), (0.7, 5.0))]
)
def test_profile_product_against_quadrature(a, b):
    t = (torch.arange(2_000_000, dtype=torch.float64) + 0.5) / 2_000_000 * max(a[0], b[0])
    profile = lambda time, gamma: torch.where(t <= time, (gamma + 1) / time * (t / time) ** gamma, 0.0)  # noqa: E731
    expected = (profile(*a) * profile(*b)).mean() * max(a[0], b[0])
    values = [torch.tensor(v, dtype=torch.float64) for v in (*a, *b)]
    torch.testing.assert_close(profile_product(*values), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("count", "width", "error"), [(40, 0.075, 6e-4), (40, 0.15, 1.5e-3), (40, 0.20, 4e-3), (16, 0.15, 9e-3)]
)
def test_mixture_has_the_tabled_profile_error(count, width, error):
    times = [(i + 1) / count for i in range(count) for _ in range(2)]
    widths = [0.05, 0.10] * count
    parts, told = mixture(times, widths, 1.0, width)
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000

    def profile(time, w):
        gamma = power_exponent(w)
        return torch.where(t <= time, (gamma + 1) / time * (t / time) ** gamma, 0.0)

    made = sum(p * profile(time, w) for p, time, w in zip(parts, times, widths, strict=True))
    wanted = profile(1.0, width)
    found = ((made - wanted).square().mean() / wanted.square().mean()).sqrt().item()
    assert found == pytest.approx(error, rel=0.25)
    assert told == pytest.approx(found, rel=0.01)
    assert parts.sum().item() == pytest.approx(1, abs=1e-12)


@pytest.mark.long
def test_run_keeps_snapshots_and_gives_other_widths(build, capsys):  # noqa: F811
    """A width that was kept comes back out of the snapshots; another one is near the average that a run of it kept."""
    options = ["mode=ict", "steps=60", "save_every=60", "log_every=60", "ema=power", "ema.num_snapshots=20"]
    kept = build(*options, name="kept")
    run(kept)
    assert len(list((kept.config.folder / "snapshots").iterdir())) == 20
    assert not list((kept.config.folder / "snapshots").glob("*/state.pt"))
    wanted = build(*options, "ema.power=[0.15]", name="wanted")
    run(wanted)
    flat = lambda denoiser: torch.cat([p.flatten() for p in denoiser.parameters()])  # noqa: E731
    truth = flat(loading.load_denoiser(wanted.config.folder, "power_0.15"))
    made = flat(loading.load_denoiser(kept.config.folder, "power_0.15"))
    stored = flat(loading.load_denoiser(kept.config.folder, "power_0.1"))
    assert (made - truth).norm() < 0.1 * (stored - truth).norm()
    assert "can't be made well" not in capsys.readouterr().err
    loading.load_denoiser(kept.config.folder, "power_0.27")
    assert "power_0.27 can't be made well of widths 0.05, 0.1: its profile is off by" in capsys.readouterr().err
    for wrong in ("power_0.5", "power_x"):
        with pytest.raises(InputError, match="not a width"):
            loading.load_denoiser(kept.config.folder, wrong)


def test_unknown_weights_are_refused_with_the_averages_that_there_are_and_that_can_be_made(build):  # noqa: F811
    trainer = build("mode=ict", "ema=power", "ema.num_snapshots=3")
    run(trainer)
    folder, manifest = find.resolve(trainer.config.folder)
    stored = f"allowed: ema, raw, {manifest.ema}, power_0.05, power_0.1"
    with pytest.raises(InputError, match=f"{stored}, power_<width> of any width up to 0.28, made of snapshots$"):
        loading.load_denoiser(folder, "best")
    none_yet = manifest.model_copy(update={"snapshots": []})
    with pytest.raises(InputError, match=f"no such weights.*{stored}$"):
        open_weights(folder, none_yet, "best")
    with pytest.raises(InputError, match=f"no snapshots to make an average of.*{stored}; fix"):
        posthoc.reconstruct(trainer.config.folder, none_yet, "power_0.2", trainer.objective.denoiser)


class OnGpu(torch.Tensor):
    """Stands for a tensor on a GPU: with one of the CPU it may be copied, and nothing else."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        on_cpu = [a for a in args if isinstance(a, torch.Tensor) and not isinstance(a, OnGpu) and a.ndim]
        assert not on_cpu or function is torch.Tensor.copy_, f"{function} of tensors on two devices"
        result = super().__torch_function__(function, types, args, kwargs)
        return result.as_subclass(torch.Tensor) if kwargs.get("device") == "cpu" else result


class Elsewhere(torch.nn.Module):
    def __init__(self, like):
        super().__init__()
        self.weights = {name: value.detach().clone().as_subclass(OnGpu) for name, value in like.state_dict().items()}

    def state_dict(self):
        return self.weights


def test_what_is_read_from_files_meets_no_tensor_of_another_device(build):  # noqa: F811
    trainer = build("mode=ict", "ema=power", "ema.num_snapshots=3")
    run(trainer)
    folder, manifest = find.resolve(trainer.config.folder)
    network = Elsewhere(trainer.objective.denoiser)
    posthoc.reconstruct(trainer.config.folder, manifest, "power_0.1", network)
    made = {name: value.as_subclass(torch.Tensor).clone() for name, value in network.weights.items()}
    for weights in ("raw", "ema", "power_0.1"):
        open_weights(folder, manifest, weights).load_into(network)
    for name, value in network.weights.items():
        torch.testing.assert_close(made[name], value.as_subclass(torch.Tensor))

"""What a request means; and that a sampler is one file, which nothing else has to name."""

import sys
from typing import get_args

import pytest
from test_generate import Recorder

from cm_train.core import registry
from cm_train.core.errors import InputError
from cm_train.models.denoiser import Kind
from cm_train.models.noise_levels import karras_sigmas
from cm_train.sampling import samplers
from cm_train.sampling.choosing import choose_levels, find_sampler
from cm_train.sampling.generate import generate
from cm_train.sampling.samplers.heun import Heun
from cm_train.sampling.samplers.multistep import Multistep

MIDPOINT = '''
from typing import Literal

from ...core.registry import register
from ...models.denoiser import per_image
from .base import SamplerConfig
from .ode import ODESampler, slope


@register
class Midpoint(ODESampler):
    """The slope in the middle of a step, for all of it."""

    class Config(SamplerConfig):
        name: Literal["midpoint"] = "midpoint"

    order = 2
    calls_per_step = 2

    @staticmethod
    def step(denoise, x, sigma, sigma_next):
        middle = (sigma * sigma_next).sqrt()
        halfway = x + per_image(middle - sigma, x) * slope(denoise, x, sigma)
        return x + per_image(sigma_next - sigma, x) * slope(denoise, halfway, middle)
'''


@pytest.fixture
def midpoint(tmp_path_factory, monkeypatch):
    """A sampler that somebody has written: its file, as if it lay among the others."""
    folder = tmp_path_factory.mktemp("samplers")
    (folder / "midpoint.py").write_text(MIDPOINT)
    registry.names("sampler")  # its own, before what is restored afterwards is looked at
    monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    monkeypatch.setattr(samplers, "__path__", [*samplers.__path__, str(folder)])
    registry._import_home.cache_clear()
    yield
    sys.modules.pop("cm_train.sampling.samplers.midpoint", None)


def levels(denoiser, sampler="auto", steps=None, sigmas=None):
    return choose_levels(find_sampler(sampler, denoiser.config.kind)[1], denoiser.config, steps, sigmas)


@pytest.mark.parametrize("kind", get_args(Kind))
def test_every_kind_of_model_has_one_usual_sampler(kind):
    usual = [name for name in registry.names("sampler") if registry.find("sampler", name).usual_for == kind]
    assert [find_sampler("auto", kind)[0]] == usual


def test_auto_takes_heun_for_a_diffusion_checkpoint_with_its_own_grid():
    name, sampler = find_sampler("auto", "diffusion")
    assert name == "heun" and isinstance(sampler, Heun)
    assert levels(Recorder("diffusion", "zero", num_scales=18)) == karras_sigmas(18, 0.002, 80.0).tolist()


def test_levels_of_a_consistency_model():
    """The stored points, else evenly spaced indices of the grid; IN-64's index 20 of 40 starts the second half."""
    grid = karras_sigmas(40, 0.002, 80.0).tolist()
    assert find_sampler("auto", "consistency")[0] == "multistep"
    assert levels(Recorder()) == [80.0]
    assert levels(Recorder(), steps=2) == [80.0, grid[20]]
    assert levels(Recorder(), steps=3) == [80.0, grid[13], grid[26]]
    assert levels(Recorder(points={2: [80.0, 0.821]}), steps=2) == [80.0, 0.821]
    assert levels(Recorder(points={2: [80.0, 0.821]}), steps=2, sigmas=[70, 3]) == [70.0, 3.0]


def test_a_sampler_takes_its_own_levels_whatever_the_model_is():
    assert levels(Recorder("diffusion", "zero"), "multistep") == [80.0]
    assert levels(Recorder(), "euler", steps=5) == karras_sigmas(5, 0.002, 80.0).tolist()
    assert levels(Recorder(), "euler", steps=1) == [80.0]


def test_one_step_is_known_as_the_multistep_sampling_that_it_is():
    name, sampler = find_sampler("onestep", "diffusion")
    assert name == "multistep" and isinstance(sampler, Multistep)
    assert levels(Recorder(), "onestep", sigmas=[70.0]) == [70.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sampler": "ddim"}, "unknown sampler; got 'ddim'; allowed: auto, euler, heun, multistep, onestep"),
        ({"steps": 0}, "steps must be positive"),
        ({"steps": 100}, "more steps than"),
        ({"sigmas": [1.0, 2.0]}, "must descend"),
        ({"sigmas": []}, "must descend"),
        ({"sigmas": [80.0, 0.001]}, "must descend"),
        ({"sigmas": [float("nan")]}, "must descend"),
        ({"sigmas": [80.0, 1.0], "steps": 3}, "disagree"),
        ({"sampler": "onestep", "steps": 2}, "one step"),
        ({"sampler": "onestep", "sigmas": [80.0, 1.0]}, "one step"),
    ],
)
def test_impossible_requests_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        levels(Recorder(), **arguments)


@pytest.mark.parametrize("name", registry.names("sampler"))
@pytest.mark.parametrize("kind", get_args(Kind))
def test_samplers_call_the_network_as_often_as_they_say(name, kind):
    _, sampler = find_sampler(name, kind)
    for steps in (1,) if name == "onestep" else (1, 2, 5):
        denoiser = Recorder(kind, "zero")
        generate(denoiser, [0], sampler=name, steps=steps)
        assert len(denoiser.calls) == sampler.num_calls(steps)


def test_a_new_sampler_is_one_new_file(midpoint):
    denoiser = Recorder("diffusion", "zero")
    generate(denoiser, range(3), sampler="midpoint", steps=4)
    assert len(denoiser.calls) == find_sampler("midpoint", "diffusion")[1].num_calls(4) == 7
    grid = karras_sigmas(4, 0.002, 80.0).tolist()
    assert [sigma for _, sigma, _ in denoiser.calls[:2]] == pytest.approx([grid[0], (grid[0] * grid[1]) ** 0.5])
    with pytest.raises(InputError, match="allowed: auto, euler, heun, midpoint, multistep, onestep"):
        find_sampler("mid", "diffusion")

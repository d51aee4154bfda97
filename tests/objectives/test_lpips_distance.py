"""LPIPS against the library used by itself. The backbone's weights are random: the real ones are a download."""

import hashlib
import sys
import warnings
from collections import OrderedDict

import lpips
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import nn

from cm_train.core import registry
from cm_train.core.errors import InputError
from cm_train.models.denoiser import DenoiserConfig
from cm_train.objectives import lpips as lpips_distance
from cm_train.objectives.lpips import LPIPS
from cm_train.objectives.noise import NoiseConfig, NoiseSchedule
from cm_train.runs import worker
from cm_train.runs.config import parse
from cm_train.training.tracking import SilentTracker
from conftest import TINY

NAME = "vgg16-397923af.pth"


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The library's own LPIPS on a random backbone, and a torch.hub folder with that backbone as torchvision's file."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    for name, p in network.net.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p, std=0.1)  # all are zero at first, and would be right even if they were not loaded
    home = tmp_path_factory.mktemp("torch")
    path = home / "hub" / "checkpoints" / NAME
    path.parent.mkdir(parents=True)
    stored = OrderedDict(("features." + n.split(".", 1)[1], p.data) for n, p in network.net.named_parameters())
    stored["classifier.0.bias"] = torch.zeros(1)  # there too, and not wanted
    torch.save(stored, path, _use_new_zipfile_serialization=False)  # the format of 2017
    return network.requires_grad_(False), home, hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def weights(reference, monkeypatch):
    """The random backbone lies where the real one is looked for."""
    _, home, digest = reference
    monkeypatch.setenv("TORCH_HOME", str(home))
    monkeypatch.setattr(lpips_distance, "_SHA256", digest)


@pytest.fixture(scope="module")
def distance(reference):
    """Ours with the random backbone."""
    _, home, digest = reference
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_HOME", str(home))
        patch.setattr(lpips_distance, "_SHA256", digest)
        return LPIPS()


@pytest.fixture
def no_weights(tmp_path, monkeypatch, website):
    """An empty torch.hub folder, and a server without the file; returns where that should be."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(lpips_distance, "_URL", f"{website.url}/{NAME}")
    return tmp_path / "torch" / "hub" / "checkpoints" / NAME


def images(count, *shape, seed=0):
    return torch.rand(count, *shape, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.mark.parametrize(
    ("shape", "count"),
    [((1, 8, 8), 1), *(pytest.param((3, n, n), c, marks=pytest.mark.long) for n, c in ((32, 2), (64, 1), (256, 1)))],
    ids=str,
)
def test_lpips_is_the_librarys_on_images_of_224_or_more(shape, count, reference, distance):
    x, y = images(count, *shape), images(count, *shape, seed=1)
    value = distance(x, y)
    # Not by interpolate as we call it: both corners' convention and the order with the channels are spelled out.
    enlarged = [x, y]
    if shape[-1] != 256:
        enlarged = [
            F.interpolate(v, (224, 224), mode="bilinear", align_corners=False, antialias=False) for v in enlarged
        ]
    if shape[0] == 1:
        enlarged = [torch.cat([v, v, v], 1) for v in enlarged]
    expected = reference[0](*enlarged)[:, 0, 0, 0]
    assert value.shape == (count,)
    assert expected.min() > 1e-3
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.long
def test_lpips_gradient_reaches_the_images_alone_and_is_finite_where_features_vanish(distance):
    flat = distance.network.scaling_layer.shift.expand(1, 3, 8, 8)  # what the network sees as zeros
    x = torch.cat([images(1, 3, 8, 8), flat]).requires_grad_()
    distance(x, images(2, 3, 8, 8, seed=1)).sum().backward()
    assert x.grad[0].abs().max() > 0
    assert x.grad.isfinite().all()
    assert not any(p.requires_grad or p.grad is not None for p in distance.parameters())


@pytest.mark.long
def test_lpips_of_equal_images_is_zero_and_stays_in_float32_and_evaluation(distance):
    distance.train()
    assert not any(m.training for m in distance.modules())
    x, y = images(1, 1, 8, 8).bfloat16(), images(1, 1, 8, 8, seed=1).bfloat16()
    plain = distance(x.float(), y.float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(distance(x, y), plain)
        assert torch.equal(distance(x, x), torch.zeros(1))
    assert plain.dtype == torch.float32


class Identity(nn.Module):
    """In the place of a denoiser."""

    config = DenoiserConfig(
        kind="consistency",
        boundary="sigma_min",
        image_size=8,
        image_channels=1,
        sigma_data=0.5,
        sigma_min=0.002,
        sigma_max=80.0,
    )

    def __init__(self, device="cpu"):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, device=device))

    def forward(self, x, sigma, labels=None, dropout_keys=None):
        return x + 0 * self.weight


def consistency(denoiser):
    noise = NoiseConfig(proposal={"name": "uniform"}, curriculum={"name": "constant", "num_scales": 18})
    values = {"name": "consistency", "pair": "data", "target_decay": 0.0, "distance": "lpips"}
    return registry.make("objective", values, denoiser, NoiseSchedule(noise, 10), seed=0)


def test_distance_setting_reaches_the_loss(weights, distance):
    objective = consistency(Identity())
    batch = objective.draw(images(1, 1, 8, 8), None, 0, range(1))
    x, x_next = (batch.x0 + batch.levels[s].view(-1, 1, 1, 1) * batch.noise for s in ("sigma", "sigma_next"))
    loss, _ = objective(batch)
    assert torch.equal(loss, distance(x, x_next))
    assert loss.item() > 0


def test_lpips_is_built_on_the_denoisers_device_and_leaves_the_random_state(weights):
    before = torch.get_rng_state()
    objective = consistency(Identity("meta"))
    assert {t.device.type for t in (*objective.distance.parameters(), *objective.distance.buffers())} == {"meta"}
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.long
def test_training_counts_and_saves_the_denoisers_weights_alone(weights, tmp_path, composed):
    given = [f"run_dir={tmp_path / 'run'}", "objective.distance=lpips", "objective.target_decay=0.9"]
    config = parse(composed(*TINY, "mode=ct", "steps=1", "batch_size=1", "log_every=1", *given))
    config.folder.mkdir()
    trainer = worker.build_trainer(config)
    num = sum(p.numel() for p in trainer.objective.denoiser.parameters())
    state = trainer.state
    assert state.weights.numel() == state.gradient.numel() == trainer.objective.target_weights.numel() == num
    assert all(v.numel() <= num for v in state.optimizer.state_dict().values())

    before, frozen = trainer.state.weights.clone(), [p.clone() for p in trainer.objective.distance.parameters()]
    assert trainer.run(SilentTracker())
    assert trainer.state.skipped == 0 and not torch.equal(trainer.state.weights, before)
    assert all(torch.equal(a, b) for a, b in zip(frozen, trainer.objective.distance.parameters(), strict=True))
    (folder,) = (config.folder / "checkpoints").iterdir()
    own = set(trainer.objective.denoiser.state_dict())
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as stored:
            assert set(stored.keys()) == own
    assert (folder / "state.pt").stat().st_size < 5 * 4 * num  # two moments, a target, and no VGG


def test_missing_library_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(InputError, match=r"^objective.distance=lpips needs .*; fix: pip install 'cm-train\[lpips\]'$"):
        LPIPS()


def test_missing_weights_are_one_line_that_says_where_they_belong(no_weights, website):
    url = f"{website.url}/{NAME}"
    with pytest.raises(InputError, match=f"^[^\n]*got '{url}: [^\n]* 404[^\n]*'; fix: put {url} at {no_weights}$"):
        LPIPS()
    assert not list(no_weights.parent.iterdir())


def test_missing_weights_are_downloaded(no_weights, website, reference, monkeypatch):
    whole = (reference[1] / "hub" / "checkpoints" / NAME).read_bytes()
    monkeypatch.setattr(lpips_distance, "_SHA256", reference[2])
    website.files[f"/{NAME}"] = whole
    assert lpips_distance.weights_file() == no_weights
    assert no_weights.read_bytes() == whole
    assert lpips_distance.weights_file() == no_weights and website.asked == [f"/{NAME}"]


def test_truncated_weights_are_one_line(reference, no_weights):
    whole = (reference[1] / "hub" / "checkpoints" / NAME).read_bytes()
    no_weights.parent.mkdir(parents=True)
    no_weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        InputError, match=f"^{no_weights} is truncated or another file; got 'sha256 [^\n]*; fix: delete it"
    ):
        LPIPS()


def test_missing_weights_are_found_before_a_teacher_is_trained(start, tmp_path):
    nowhere = {"https_proxy": "http://127.0.0.1:9", "no_proxy": "", "TORCH_HOME": str(tmp_path / "torch")}
    process = start("train", "mode=cd", "objective.distance=lpips", *TINY, **nowhere)
    *_, last = process.communicate(timeout=60)[1].splitlines()
    assert process.returncode == 2
    assert last.startswith("train.py: objective.distance=lpips needs VGG16's weights")
    assert not list(tmp_path.rglob("*.safetensors"))

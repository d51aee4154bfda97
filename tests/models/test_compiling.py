"""Compiled blocks: how many graphs, when they serve, and what becomes of a compiler that fails.

The quick tests trace and differentiate as the compiler does and leave out the machine code (backend aot_eager); those
marked `long` have that too (inductor).
"""

import functools
import json
import subprocess
import sys
import tempfile

import numpy as np
import pytest
import torch
from test_lpips_distance import reference, weights  # noqa: F401 - fixtures
from test_objectives import consistency as consistency_loss
from test_objectives import schedule
from test_trainer import EVERY_MODE, after, assert_same, build, lines, run  # noqa: F401 - build is a fixture
from torch import nn
from torch._dynamo.utils import counters

from cm_train import generate, load_denoiser
from cm_train.core import registry
from cm_train.core.errors import InputError
from cm_train.core.precision import arithmetic
from cm_train.models import compiling
from cm_train.models.averages import flatten_parameters, frozen_copy
from cm_train.models.backbones.base import KeyedDropout, blocks_as_written
from cm_train.models.backbones.unet import Attention, ResBlock, UNet, UNetConfig
from cm_train.models.compiling import CompiledBlocks, CompileError
from cm_train.models.denoiser import Denoiser, DenoiserConfig, build_denoiser, forward_flops
from cm_train.training import compile_policy
from conftest import ENVIRONMENT, TINY

ONE_BLOCK = ["backbone.channels=8", "backbone.head_channels=8", "backbone.channel_mult=[1]"]
ONE_BLOCK += ["backbone.attention_resolutions=[]", "backbone.group_channels=4"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def traced(monkeypatch):
    """The compiler without its last and slowest part."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))


def num_compiled():
    return counters["stats"]["unique_graphs"]


def network(dropout=0.0, **sizes):
    """A U-Net whose weights are not the zeros that it starts with."""
    values = {"channels": 8, "head_channels": 8, "channel_mult": [1], "num_blocks": 1, "group_channels": 4, **sizes}
    config = UNetConfig(attention_resolutions=[], dropout=dropout, **values)
    net = UNet(config, 8, 1).to(memory_format=torch.channels_last)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.3 if p.ndim == 1 else p[0].numel() ** -0.5))
    flatten_parameters(net.parameters())
    return net


def inputs(count=4):
    generator = torch.Generator().manual_seed(1)
    keys = torch.randint(-(2**31), 2**31, (count, 2), generator=generator).to(torch.int32)
    return torch.randn(count, 1, 8, 8, generator=generator), torch.linspace(-1, 1, count), None, keys


# ----------------------------------------------------------------------------------------------------------- the blocks


@pytest.mark.long
def test_one_graph_serves_all_blocks_of_a_kind_in_every_network(traced):
    net = network()
    twin, _ = frozen_copy(net)

    def everything(*args):
        with torch.no_grad():
            frozen = net(*args), twin(*args)
        return net(*args), *frozen

    expected = everything(*inputs())
    blocks = CompiledBlocks(net, twin)
    kinds = compiling.num_kinds(net)
    assert kinds < sum(isinstance(m, ResBlock | Attention) for m in net.modules())
    assert blocks.meet(lambda: everything(*inputs())) == 2 * kinds
    assert num_compiled() == 0
    assert blocks.compile()
    assert blocks.num_graphs == num_compiled() == 2 * kinds
    found = everything(*inputs())
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    gradient = torch.autograd.grad(found[0].square().sum(), [*net.parameters()])
    blocks.release()
    plain = torch.autograd.grad(net(*inputs()).square().sum(), [*net.parameters()])
    for a, b in zip(gradient, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    assert num_compiled() == 2 * kinds


def test_calls_that_nobody_announced_are_made_as_written_and_compile_nothing(traced):
    """Another batch size in a preview, a float64 network, or a derivative."""
    net = network()
    blocks = CompiledBlocks(net)
    blocks.meet(lambda: net(*inputs()))
    blocks.compile()
    compiled = num_compiled()
    for count in (3, 5):
        net(*inputs(count))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        net(*inputs())
    for precision, deterministic in (("tf32", False), ("fp32", True)):
        with arithmetic(precision, deterministic):
            net(*inputs())
    x, c, _, _ = inputs()
    with blocks_as_written(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, slope = torch.func.jvp(lambda x: net(x, c), (x,), (torch.ones_like(x),))
    assert slope.abs().max() > 0
    assert num_compiled() == compiled


def test_changes_of_the_weights_in_place_are_seen_without_gradient_too(traced):
    """A student's blocks are called through frozen twins there, which share its memory."""
    net = network()
    flat = flatten_parameters(net.parameters())
    blocks = CompiledBlocks(net)
    call = torch.no_grad()(lambda: net(*inputs()))
    blocks.meet(call)
    blocks.compile()
    before = call()
    flat.mul_(1.1)
    assert not torch.equal(call(), before)
    found = call()
    blocks.release()
    torch.testing.assert_close(found, call(), rtol=1e-5, atol=1e-6)


def test_compiling_moves_no_gradient(traced):
    net = network()
    for p in net.parameters():
        p.grad = torch.full_like(p, 2.0)
        p.register_post_accumulate_grad_hook(lambda p: pytest.fail("the data-parallel wrapper heard of a gradient"))
    blocks = CompiledBlocks(net)
    blocks.meet(lambda: net(*inputs()))
    blocks.compile()
    assert all((p.grad == 2).all() for p in net.parameters())


def test_settings_of_a_block_that_tell_it_from_others_make_another_kind():
    kinds = [{compiling.kind_of(m) for m in network(p).modules() if type(m) is ResBlock} for p in (0.0, 0.1, 0.2)]
    assert len(set.union(*kinds)) == 3 * len(kinds[0]) > 3


def test_weights_that_lie_differently_in_memory_make_another_kind():
    """A GPU's graph reads sixteen bytes at once where the weights of the block that it was made for allow it."""
    flat = torch.zeros(10_000)
    blocks = [next(m for m in network().modules() if type(m) is ResBlock) for _ in range(3)]
    for block, start in zip(blocks, (0, 4, 2), strict=True):
        bias = block.norm_in.bias
        bias.data = flat[start : start + bias.numel()]
    kinds = [compiling.kind_of(block) for block in blocks]
    assert kinds[0] == kinds[1] != kinds[2]


def test_looking_for_graphs_keeps_nothing_for_a_backward_pass(traced):
    """A network may fit into memory compiled and not as written."""
    net, outputs = network(), []
    CompiledBlocks(net).meet(lambda: outputs.append(net(*inputs())))
    with pytest.raises((RuntimeError, TypeError)):
        outputs[0].sum().backward()


def test_compiling_stops_between_two_graphs(traced):
    net, asked = network(), []
    blocks = CompiledBlocks(net)
    blocks.meet(lambda: net(*inputs()))
    assert not blocks.compile(lambda: asked.append(1) or len(asked) > 2)
    assert blocks.num_graphs == 2


def test_a_compiler_that_fails_says_why_in_one_line(monkeypatch):
    def broken(*args, **kwargs):
        try:
            raise FileNotFoundError(2, "No such file or directory: 'g++'")
        except FileNotFoundError as error:
            raise RuntimeError("backend='inductor' raised\nmany\nlines") from error

    monkeypatch.setattr(torch, "compile", lambda f, **_: broken)
    net = network()
    blocks = CompiledBlocks(net)
    blocks.meet(lambda: net(*inputs()))
    with pytest.raises(CompileError, match=r"^FileNotFoundError: .*'g\+\+'$"):
        blocks.compile()


def test_the_cache_is_where_the_user_says_or_in_a_folder_of_our_own(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    assert compiling.cache_folder() == tmp_path / "cm-train" / "inductor"
    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/elsewhere")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/elsewhere/torchinductor_me")  # torch's own choice, nobody's wish
    assert compiling.cache_folder() == tmp_path / "cm-train" / "inductor"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "mine"))
    assert compiling.cache_folder() == tmp_path / "mine"


# ------------------------------------------------------------------------------------------------------ when it is done


def sizes(channels, mult, blocks, attention):
    values = {"channels": channels, "channel_mult": mult, "num_blocks": blocks}
    return values | {"attention_resolutions": attention, "head_channels": 64, "noise_multiplier": 1000.0}


def told(image_size):
    levels = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}
    return DenoiserConfig(kind="diffusion", boundary="zero", image_size=image_size, image_channels=3, **levels)


@pytest.mark.parametrize(
    ("image_size", "backbone", "gflops"),
    [(64, sizes(192, [1, 2, 3, 4], 3, [32, 16, 8]), 219.3), (32, sizes(128, [2, 2, 2], 4, [16]), 44.2)],
)
def test_flops_are_those_of_the_published_networks(image_size, backbone, gflops):
    assert forward_flops(told(image_size), UNetConfig(**backbone)) / 1e9 == pytest.approx(gflops, rel=2e-3)


def test_flops_of_a_convolution_are_two_a_weight_and_pixel():
    """By hand: three levels' worth of nothing but the parts of the smallest U-Net."""
    backbone = {"channels": 2, "channel_mult": [1], "num_blocks": 1, "attention_resolutions": []}
    backbone |= {"head_channels": 2, "group_channels": 2, "scale_shift": False}
    config = told(4).model_copy(update={"image_channels": 1})
    pixels, width, embedding = 16, 2, 8
    block = lambda cin: 2 * pixels * 9 * (cin + width) * width + 2 * embedding * width  # noqa: E731
    skip = 2 * pixels * 4 * width  # a 1x1 convolution, where the decoder's blocks take twice the width
    attention = 2 * pixels * width * 4 * width + 2 * 2 * pixels * pixels * width
    ends = 2 * pixels * 9 * (1 * width + width * 1)
    embed = 2 * (width * embedding + embedding * embedding)
    expected = embed + ends + 3 * block(width) + attention + 2 * (block(2 * width) + skip)
    assert forward_flops(config, UNetConfig(**backbone)) == expected


def test_compiling_pays_for_long_runs_of_large_networks_only():
    cifar = 44.2e9
    assert compile_policy.pays(cifar, 200_000_000, 24)
    assert not compile_policy.pays(cifar, 100_000, 24)
    digits = 11e6
    assert not compile_policy.pays(digits, 2_000 * 128, 16)


def test_auto_compiles_by_what_the_run_costs_and_never_on_a_cpu():
    backbone = sizes(32, [1, 2], 1, [])
    denoiser = build_denoiser(told(8), UNetConfig(**backbone))
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    choose = functools.partial(compile_policy.compiles, denoiser=denoiser, backbone=UNetConfig(**backbone))
    assert choose("auto", cpu, images=10**12) == (False, "not compiled, which does not pay on a CPU")
    assert choose("auto", gpu, images=10**3)[0] is False
    wanted, why = choose("auto", gpu, images=10**12)
    assert wanted
    assert why.startswith("compiled, which the run is long enough to repay")
    assert choose("true", cpu, images=1)[0]
    assert not choose("false", gpu, images=10**12)[0]


def test_auto_goes_on_without_a_compiler_and_says_so(build, monkeypatch, capsys):  # noqa: F811
    plain, fallen = build("mode=ict", *ONE_BLOCK, name="plain"), build("mode=ict", *ONE_BLOCK, name="fallen")
    fallen.blocks = CompiledBlocks(fallen.objective)
    monkeypatch.setattr(torch, "compile", missing)
    run(plain)
    run(fallen)
    assert "note: the networks could not be compiled, and train uncompiled: OSError: no g++" in capsys.readouterr().err
    assert_same(plain, fallen)


def missing(*args, **kwargs):
    raise OSError("no g++")


def test_true_refuses_where_nothing_can_be_compiled(build, monkeypatch):  # noqa: F811
    trainer = build("mode=ict", *ONE_BLOCK, "compile=true")
    monkeypatch.setattr(torch, "compile", missing)
    with pytest.raises(InputError, match="this machine can't compile: OSError: no g.*; fix: install gcc"):
        run(trainer)


# ---------------------------------------------------------------------------------------------------------- in training


def pair(build, *options):  # noqa: F811
    return [build(*options, f"compile={value}", name=value) for value in ("false", "true")]


def compare(plain, compiled, steps=3, rtol=1e-3):
    """A few steps of both: their gradients' running means, as vectors, and their losses."""
    assert compiled.prepare()
    for trainer in (plain, compiled):
        for _ in range(steps):
            trainer.train_step(trainer.fetch())
    found, wanted = compiled.state.optimizer.mean, plain.state.optimizer.mean
    assert (found - wanted).norm() < rtol * wanted.norm()
    losses = [t.state.window.close(t.world)["loss"] for t in (plain, compiled)]
    assert losses[1] == pytest.approx(losses[0], rel=rtol)


def starting_from(path, mode):
    """A start whose last layers are not zeros, or all that is compared behind them agrees."""
    return [f"mode={mode}", f"init={path}", *([f"teacher={path}"] if mode in ("cd", "scd") else [])]


@pytest.fixture
def learnt(build):  # noqa: F811
    """learnt(*options) -> the folder of a short edm run of a network of that kind."""

    def make(*options):
        trainer = build(
            "mode=edm", "steps=30", "optimizer.lr=0.003", "optimizer.warmup_steps=0", *options, name="learnt"
        )
        run(trainer)
        return trainer.config.folder

    return make


@pytest.mark.long
@pytest.mark.parametrize("mode", ["cd", "ict", "scd"])
def test_compiled_steps_are_the_same_steps(mode, traced, build, learnt):  # noqa: F811
    start = starting_from(learnt(*ONE_BLOCK), mode)
    compare(*pair(build, *start, *ONE_BLOCK, "backbone.dropout=0.2"))
    assert num_compiled() > 0


@pytest.mark.long
def test_a_curriculum_compiles_nothing_anew(traced, build, learnt):  # noqa: F811
    """iCT's eight stages, micro-batches, a log line and a preview: the graphs of before the first step serve all."""
    trainer = build(*starting_from(learnt(*ONE_BLOCK), "ict"), *ONE_BLOCK, "compile=true", "steps=8", "micro_batch=8")
    trainer.prepare()
    compiled = num_compiled()
    trainer.previews.batch_size = 5
    run(trainer)
    assert trainer.objective.noise.num_scales(7) > trainer.objective.noise.num_scales(0)
    assert num_compiled() == compiled


def test_a_stop_while_compiling_ends_the_run_before_its_first_step(traced, build):  # noqa: F811
    trainer = build("mode=ict", *ONE_BLOCK, "compile=true", should_stop=lambda reserve_s: True)
    assert not run(trainer)
    assert trainer.step == 0
    assert trainer.blocks.num_graphs == 0


@pytest.mark.long
@pytest.mark.parametrize("mode", EVERY_MODE)
def test_inductor_trains_every_mode_alike(mode, build, learnt):  # noqa: F811
    """Ten steps, dropout and a target where there may be one, and everything that resuming needs."""
    options = [*starting_from(learnt(*ONE_BLOCK), mode), *ONE_BLOCK, "backbone.dropout=0.2"]
    options += ["objective.target_decay=0.9"] if mode in ("cd", "ct") else []
    compare(*pair(build, *options), steps=10)


@pytest.mark.long
@pytest.mark.parametrize("options", [["precision=bf16"], ["micro_batch=4"], ["dataset.conditional=true"]])
def test_inductor_trains_alike_in_bf16_in_micro_batches_and_with_labels(options, build, learnt):  # noqa: F811
    labels = [o for o in options if o.startswith("dataset")]
    start = starting_from(learnt(*ONE_BLOCK, *labels), "cd")
    half = options == ["precision=bf16"]
    compare(*pair(build, *start, *ONE_BLOCK, *options), rtol=0.1 if half else 1e-3)


@pytest.mark.long
def test_inductor_resumes_to_the_bit_and_previews_alike(build, learnt):  # noqa: F811
    options = [*starting_from(learnt(*ONE_BLOCK), "cd"), *ONE_BLOCK, "compile=true", "backbone.dropout=0.2"]
    whole = build(*options, "preview_every=6", name="whole")
    run(whole)
    asked = whole.blocks.num_graphs + 3  # before each graph, and before each of three steps
    assert not run(build(*options, "preview_every=6", name="parts", should_stop=after(asked)))
    rest = build(*options, "preview_every=6", name="parts")
    assert rest.step == 3
    run(rest)
    assert_same(whole, rest)
    assert lines(whole)[-1]["agreement_rms"] == pytest.approx(lines(rest)[-1]["agreement_rms"])
    folder = whole.config.folder
    plain = generate(load_denoiser(folder), range(9), steps=2)
    denoiser = load_denoiser(folder)
    blocks = CompiledBlocks(denoiser)
    draw = functools.partial(generate, denoiser, steps=2, batch_size=4, whole_batches=True)
    blocks.meet(lambda: draw(range(4)))
    blocks.compile()
    compiled = num_compiled()
    assert (draw(range(9)).int() - plain.int()).abs().max() <= 1
    assert num_compiled() == compiled


class Masks(nn.Module):
    def __init__(self):
        super().__init__()
        self.dropout = KeyedDropout(0.3, (4, 8, 8), salt=3)

    def forward(self, x, keys):
        return self.dropout(x, keys)


@pytest.mark.long
def test_inductor_draws_the_same_dropout_masks():
    x, keys = torch.ones(64, 4, 8, 8), torch.randint(-(2**31), 2**31, (64, 2), dtype=torch.int32)
    masks = Masks()
    assert torch.equal(torch.compile(masks)(x, keys), masks(x, keys))


@pytest.mark.long
@pytest.mark.parametrize("mode", ["cd", "ct", "ict"])
def test_inductor_on_two_ranks_equals_one_process_uncompiled(mode, command, tmp_path):
    small = [*TINY, *ONE_BLOCK, "backbone.dropout=0.2"]
    options = [f"mode={mode}", *small, *([] if mode == "ict" else ["objective.target_decay=0.9"])]
    if mode == "cd":
        assert command("train", "mode=edm", *small, "name=teacher").returncode == 0
        options.append("teacher=runs/teacher")
    assert command("train", *options, "name=one", "compile=false").returncode == 0
    done = command("train", *options, "name=two", "compile=true", "devices=2")
    assert done.returncode == 0, done.stderr
    assert "compiling " in done.stderr
    one, two = (dict(load_denoiser(tmp_path / "runs" / name).named_parameters()) for name in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5, msg=name)
    logs = [(tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines() for name in ("one", "two")]
    plain, compiled = ([json.loads(row)["loss"] for row in log] for log in logs)
    assert compiled == pytest.approx(plain, rel=1e-3)


@pytest.mark.long
def test_cm_sample_compiled_makes_the_same_images(command, tmp_path):
    assert command("train", "mode=ict", *TINY, *ONE_BLOCK).returncode == 0
    for name, value in (("plain", "false"), ("compiled", "true")):
        options = ["num=10", "batch_size=4", "steps=2", "format=npz", f"out={name}", f"compile={value}"]
        done = command("sample", "ckpt=runs/digits-ict", *options)
        assert done.returncode == 0, done.stderr
    plain, compiled = (np.load(tmp_path / name / "samples.npz")["arr_0"].astype(int) for name in ("plain", "compiled"))
    assert plain.shape == (10, 8, 8, 1)
    assert abs(plain - compiled).max() <= 1


@pytest.mark.long
def test_a_machine_without_a_compiler_is_one_line_and_exit_code_2(tmp_path):
    argv = [sys.executable, "-m", "cm_train.commands.train", "mode=ict", *TINY, *ONE_BLOCK, "compile=true"]
    env = {**ENVIRONMENT, "CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert "compile=true, and this machine can't compile: " in last
    assert "Traceback" not in done.stderr


# ------------------------------------------------------------------------------ whole objectives, by whoever wants that


CONSISTENCY = [
    (pair, distance, weighting, decay)
    for pair in ("teacher", "data")
    for distance in ("l1", "l2", "pseudo_huber")
    for weighting in ("uniform", "inverse_gap")
    for decay in (0.0, 0.9)
]


def assert_compiles_to_the_same_gradient(objective, batch):
    gradients = []
    trained = [p for p in objective.parameters() if p.requires_grad]
    for call in (objective, torch.compile(objective)):
        loss, metrics = call(batch)
        assert loss.requires_grad
        assert not any(m.requires_grad for m in metrics.values())
        gradients.append(torch.autograd.grad(loss.sum(), trained))
    assert max(g.abs().max() for g in gradients[0]) > 1e-4  # or they could not differ
    for plain, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-5)


class Scaled(nn.Module):
    """A function of its weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.7))

    def forward(self, x, c_noise, labels=None, dropout_keys=None):
        return self.weight * x * torch.tanh(c_noise).view(-1, 1, 1, 1)


def one_weight(kind="consistency", boundary="sigma_min"):
    levels = {"sigma_data": 0.5, "sigma_min": 0.002, "sigma_max": 80.0}
    config = DenoiserConfig(kind=kind, boundary=boundary, image_size=4, image_channels=1, **levels)
    return Denoiser(config, Scaled())


def batch_for(objective):
    return objective.draw(torch.linspace(-1, 1, 64).view(4, 1, 4, 4), None, 3, range(4))


@pytest.mark.long
@pytest.mark.parametrize(("pair", "distance", "weighting", "decay"), CONSISTENCY)
def test_inductor_keeps_the_gradient_of_every_consistency_loss(pair, distance, weighting, decay):
    """Torch's compiler returns `1.0 * distance` and `distance.detach()` as one tensor, without a gradient."""
    frozen = one_weight("diffusion", "zero").requires_grad_(False) if pair == "teacher" else None
    settings = {"distance": distance, "weighting": weighting, "target_decay": decay}
    objective = consistency_loss(one_weight(), schedule(), frozen, **settings)
    assert_compiles_to_the_same_gradient(objective, batch_for(objective))


@pytest.mark.long
@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("weighting", ["uniform", "inverse_gap"])
@pytest.mark.parametrize("pair", ["teacher", "data"])
def test_inductor_keeps_the_gradient_of_every_lpips_loss(pair, weighting, decay, weights):  # noqa: F811
    """One image: VGG16 sees it at 224 x 224."""
    frozen = one_weight("diffusion", "zero").requires_grad_(False) if pair == "teacher" else None
    settings = {"distance": "lpips", "weighting": weighting, "target_decay": decay}
    objective = consistency_loss(one_weight(), schedule(), frozen, **settings)
    x0 = torch.linspace(-1, 1, 16).view(1, 1, 4, 4)
    assert_compiles_to_the_same_gradient(objective, objective.draw(x0, None, 3, range(1)))


def other_objectives():
    yield "edm", {"name": "edm"}, {"name": "lognormal"}, None
    for weighting in ("inverse_gap", "snr_plus_one"):
        for c in (0.0, 0.03):
            yield (
                f"ect-{weighting}-{c}",
                {"name": "ect", "weighting": weighting, "huber_c": c},
                {"name": "lognormal"},
                None,
            )
    for velocity in ("teacher", "data"):
        for adaptive in (True, False):
            for tangent in ("normalize", "clip"):
                values = {"name": "scm", "velocity": velocity, "adaptive_weighting": adaptive, "tangent": tangent}
                yield f"scm-{velocity}-{adaptive}-{tangent}", values, {"name": "lognormal"}, velocity


@pytest.mark.long
@pytest.mark.parametrize(("name", "values", "proposal", "velocity"), [*other_objectives()])
def test_inductor_keeps_the_gradient_of_every_other_loss(name, values, proposal, velocity):
    noise = schedule(proposal=proposal)
    frozen = one_weight("diffusion", "zero").requires_grad_(False) if velocity == "teacher" else None
    cls = registry.find("objective", values["name"])
    objective = registry.make("objective", values, one_weight(cls.kind, cls.boundary), noise, seed=0, teacher=frozen)
    assert_compiles_to_the_same_gradient(objective, batch_for(objective))


@pytest.mark.parametrize("name", ["edm", "consistency", "ect", "scm"])
def test_a_metric_can_not_be_the_same_tensor_as_the_loss(name):
    """Of another type, whatever the settings: in float32, which is what training has."""
    values = {"name": name} | ({"pair": "data", "target_decay": 0.0} if name == "consistency" else {})
    proposal = {"name": "uniform"} if name == "consistency" else {"name": "lognormal"}
    cls = registry.find("objective", name)
    denoiser = one_weight(cls.kind, cls.boundary)
    objective = registry.make("objective", values, denoiser, schedule(proposal=proposal), seed=0)
    loss, metrics = objective(batch_for(objective))
    assert loss.dtype == torch.float32
    assert metrics
    assert all(m.dtype == torch.float64 and not m.requires_grad for m in metrics.values())

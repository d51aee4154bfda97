"""Activation checkpointing: the same numbers, to the bit, from less memory."""

import copy

import pytest
import torch
from test_songunet import filled, numbers
from test_trainer import after, assert_same, build, run  # noqa: F401 - build is a fixture

from cm_train.core import registry
from cm_train.core.rng import Draws
from cm_train.models import compiling
from cm_train.models.backbones.base import Block, recompute_blocks
from cm_train.models.compiling import CompiledBlocks
from cm_train.models.denoiser import Denoiser
from cm_train.training.micro_batch import saved_bytes

SIZES = {"channel_mult": [1, 2], "num_blocks": 1, "attention_resolutions": [4], "dropout": 0.3}
NETWORKS = {
    "unet": {"name": "unet", "channels": 16, "head_channels": 8, "group_channels": 4, **SIZES},
    "songunet": {"name": "songunet", "channels": 16, **SIZES},
    "edm2": {"name": "edm2", "channels": 16, "head_channels": 8, **SIZES},
}


def network(name):
    return filled(registry.build(registry.settings("backbone", NETWORKS[name]), 8, 3, 0))


def called_on(net, x):
    keys = Draws(0, 0, range(4), torch.device("cpu")).bits("dropout", (2,))
    return net(x, torch.tensor([-0.8, -0.1, 0.3, 1.0]), None, keys)


def images():
    return numbers(4, 3, 8, 8, key=1000).float().requires_grad_()


def gradients(net):
    """The output, and the gradients of all weights and of the image."""
    x = images()
    output = called_on(net, x)
    (output * numbers(*output.shape, key=1001)).sum().backward()
    return [output.detach(), x.grad, *(p.grad for p in net.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_the_same_bits(name):
    net, called = network(name), []
    other = copy.deepcopy(net)
    recompute_blocks(other)
    for block in other.modules():
        if isinstance(block, Block):
            block.register_forward_pre_hook(lambda block, _: called.append(block))
    for one, two in zip(gradients(net), gradients(other), strict=True):
        assert torch.equal(one, two)
    assert len(called) == 2 * len(set(called)) > 0, "each block twice"
    with torch.no_grad():
        called.clear()
        other(torch.zeros(1, 3, 8, 8), torch.zeros(1))
    assert len(called) == len(set(called)), "without a gradient once"


@pytest.mark.parametrize("name", NETWORKS)
def test_compiled_blocks_are_recomputed_too_and_share_their_graphs(name, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    net = network(name)
    frozen = copy.deepcopy(net).requires_grad_(False)
    recompute_blocks(net)
    blocks = [block for block in net.modules() if isinstance(block, Block)]
    twins = [block for block in frozen.modules() if isinstance(block, Block)]
    assert [compiling.kind_of(block) for block in blocks] == [compiling.kind_of(twin) for twin in twins]
    plain, compiled = gradients(net), CompiledBlocks(net)
    net.zero_grad()
    compiled.meet(lambda: called_on(net, images()))
    assert compiled.compile() and compiled.num_graphs > 0
    net.zero_grad()
    for one, two in zip(plain, gradients(net), strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("mode", ["edm", "ict", "cd", "scd"])
def test_a_run_is_the_same_and_may_change_it_on_the_way(mode, build):  # noqa: F811
    words = [f"mode={mode}", "backbone.dropout=0.3"]
    if mode in ("cd", "scd"):
        teacher = build("mode=edm", "steps=2", "save_every=2", name="teacher")
        run(teacher)
        words.append(f"teacher={teacher.config.folder}")
    whole, saving = build(*words, name="whole"), "activation_checkpointing=true"
    run(whole)
    assert not run(build(*words, saving, name="parts", should_stop=after(3)))
    rest = build(*words, saving, name="parts")
    kept, usual = (saved_bytes(t.objective, torch.device("cpu"), None) for t in (rest, whole))
    assert kept < usual / 2
    run(rest)
    assert_same(whole, rest)
    assert isinstance(rest.objective.denoiser, Denoiser)

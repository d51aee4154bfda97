"""A loaded denoiser, called as a notebook would."""

import numpy as np
import pytest
import torch
from test_checkpoints import CONFIG, network, write
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cm_train.core.errors import InputError
from cm_train.models.calling import callable_by_hand
from cm_train.models.checkpoints.load import load_denoiser
from cm_train.models.denoiser import Denoiser

X = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


class Echo(nn.Module):
    """A backbone that keeps the labels that it was given."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, c_noise, labels, dropout_keys):
        self.labels = labels
        return x


def with_classes(**more):
    config = CONFIG.model_copy(update={"num_classes": 3, "class_names": ["cat", "dog", "owl"], **more})
    return callable_by_hand(Denoiser(config, Echo()))


def test_a_number_is_the_noise_level_of_all_images(tmp_path):
    write(tmp_path, 5)
    denoiser = load_denoiser(tmp_path)
    expected = network(1)(X, torch.full((3,), 5.0))
    tensors = [torch.tensor(5.0), torch.tensor(5), torch.full((3,), 5.0), torch.tensor([5.0], dtype=torch.float64)]
    for sigma in (5.0, 5, np.float64(5), np.float32(5), [5.0, 5, 5], np.full(3, 5.0), *tensors):
        assert torch.equal(denoiser(X, sigma), expected), sigma
    assert torch.equal(denoiser(x=X, sigma=5.0), expected)
    assert torch.equal(denoiser(X, sigma=5.0, labels=None), expected)
    assert denoiser(X[:0], 5.0).shape == (0, 1, 8, 8)


def test_labels_are_numbers_a_list_or_a_tensor():
    denoiser = with_classes()
    for labels in (2, [2, 2, 2], (2, 2, 2), np.int64(2), torch.tensor(2), torch.tensor([2, 2, 2])):
        denoiser(X, 1.0, labels)
        assert denoiser.backbone.labels.tolist() == [2, 2, 2], labels
    denoiser(X, 1.0, labels=[0, 1, 2])
    assert denoiser.backbone.labels.tolist() == [0, 1, 2]
    hidden = with_classes(null_label=True)
    hidden(X, 1.0, 3)
    assert hidden.backbone.labels.tolist() == [3, 3, 3]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((X[:, :, :4, :4], 1.0), r"not of this model's images; got 'shape \[3, 1, 4, 4\]'; allowed: .*\[N, 1, 8, 8"),
        ((X.expand(-1, 3, -1, -1), 1.0), r"shape \[3, 3, 8, 8\]"),
        ((X[0], 1.0), r"shape \[1, 8, 8\].*fix: x\[None\]"),
        ((X.numpy(), 1.0), "x is no tensor; got 'ndarray'.*fix: torch.as_tensor"),
        ((X.double(), 1.0), r"got 'torch.float64'; allowed: torch.float32; fix: x.float\(\)"),
        ((X.to(torch.uint8), 1.0), "got 'torch.uint8'; allowed: a float tensor"),
        ((X.to("meta"), 1.0), "two devices; got 'meta'; allowed: cpu"),
        ((X, "80"), "sigma is the noise level; got '80'; allowed: a number above 0"),
        ((X, 0.0), "sigma is the noise level; got '0.0'"),
        ((X, -1), "got '-1.0'"),
        ((X, float("nan")), "got 'nan'"),
        ((X, None), "got 'None'"),
        ((X, [1.0, 2.0]), r"shape \[2\] for 3 images"),
        ((X, torch.ones(3, 1, 1, 1)), r"shape \[3, 1, 1, 1\] for 3 images"),
        ((X, 1.0, 0), "this model has no classes; got 'labels 0'; fix: drop labels"),
    ],
)
def test_what_does_not_fit_is_one_line(args, message):
    denoiser = callable_by_hand(network(0))
    with pytest.raises(InputError, match=message) as raised:
        denoiser(*args)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "wants the class of each image; got 'no labels'; allowed: 0 to 2"),
        (3, "no such class; got '3'; allowed: 0 to 2"),
        ([0, -1, 1], "no such class"),
        ([0, 1], r"one an image; got 'shape \[2\] for 3 images'"),
        (1.5, "whole numbers"),
        ("dog", "numbers here; got 'dog'; allowed: 0 to 2.*fix: labels=1"),
        (["cat", "cow", "owl"], "numbers here; got 'cat'"),
        (torch.ones(3), r"got 'torch.float32'.*labels.long\(\)"),
    ],
)
def test_labels_that_do_not_fit_are_one_line(labels, message):
    with pytest.raises(InputError, match=message):
        with_classes()(X, 1.0, labels)


def test_what_is_missing_is_left_to_python():
    with pytest.raises(TypeError, match="sigma"):
        callable_by_hand(network(0))(X)


def test_gradients_and_derivatives_pass(tmp_path):
    write(tmp_path, 5)
    denoiser, plain, x = load_denoiser(tmp_path), network(1), X.clone().requires_grad_()
    denoiser(x, 2.0).sum().backward()
    assert x.grad.abs().sum() > 0
    direction = torch.ones_like(X)
    with sdpa_kernel(SDPBackend.MATH):  # the fast one has no forward-mode derivative
        _, slope = torch.func.jvp(lambda x: denoiser(x, 2.0), (X,), (direction,))
        _, expected = torch.func.jvp(lambda x: plain(x, torch.full((3,), 2.0)), (X,), (direction,))
    assert torch.equal(slope, expected)


def test_networks_that_train_have_no_hook(tmp_path):
    from cm_train.models.checkpoints.find import resolve
    from cm_train.models.checkpoints.load import load_resolved

    write(tmp_path, 5)
    assert load_denoiser(tmp_path)._forward_pre_hooks
    assert not load_resolved(*resolve(tmp_path))._forward_pre_hooks
    assert not network(0)._forward_pre_hooks

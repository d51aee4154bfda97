"""Where images come from that are measured, or compared with; and what is none of these."""

import io
import pickle
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from cm_train.core.errors import InputError
from cm_train.data.datasets.base import Dataset
from cm_train.evaluation.gaussian import Gaussian
from cm_train.evaluation.npz_files import read_npz
from cm_train.evaluation.sources import Statistics, real_images, samples_at


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def pixels(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def saved(path, mode="RGB", size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = {"RGB": 3, "L": 1}[mode]
    array = pixels(size[1], size[0], channels)
    Image.fromarray(array[:, :, 0] if mode == "L" else array).save(path)
    return array


def test_npz_holds_images_or_statistics(tmp_path):
    array = pixels(5, 8, 8, 3)
    np.savez(tmp_path / "images.npz", array, np.arange(5))  # OpenAI's have labels after them
    assert torch.equal(read_npz(tmp_path / "images.npz"), torch.from_numpy(array).permute(0, 3, 1, 2))
    np.savez_compressed(tmp_path / "grey.npz", pixels(5, 8, 8))
    assert read_npz(tmp_path / "grey.npz").shape == (5, 1, 8, 8)
    mu, sigma = np.arange(3.0), np.eye(3, dtype=np.float32)
    np.savez(tmp_path / "stats.npz", mu=mu, sigma=sigma)
    found = read_npz(tmp_path / "stats.npz")
    assert isinstance(found, Gaussian) and found.num is None
    assert found.mean.tolist() == [0, 1, 2] and torch.equal(found.cov, torch.eye(3, dtype=torch.float64))


class Hostile:
    def __reduce__(self):
        return print, ("run",)


def test_npz_of_a_stranger_is_one_line_and_runs_nothing(tmp_path, capsys):
    path = tmp_path / "x.npz"

    def refused(words):
        with pytest.raises(InputError, match=rf"x\.npz can't be read.*{words}.*allowed: uint8 images"):
            read_npz(path)

    path.write_bytes(b"nothing of the kind")
    refused("zip")
    np.savez(path, np.array([Hostile()], dtype=object))
    refused("")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0.npy", pickle.dumps(Hostile()))
    refused("")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        packed = io.BytesIO()
        np.save(packed, np.zeros((1000, 64, 64, 3), np.uint8))
        archive.writestr("arr_0.npy", packed.getvalue())
    refused("would unpack to")
    for array in (np.zeros((4, 8, 8, 3)), pixels(4, 8, 9, 3), pixels(4, 8, 8, 2), pixels(0, 8, 8, 3)):
        np.savez(path, array)
        refused("first array is")
    np.savez(path, mu=np.arange(3.0), sigma=np.eye(2))
    refused("sigma")
    np.savez(path, mu=np.full(2, np.nan), sigma=np.eye(2))
    refused("not finite")
    assert "run" not in capsys.readouterr().out


def test_a_reference_is_a_data_set_a_folder_a_zip_or_an_npz(tmp_path):
    digits = real_images("digits", 8, 1)
    assert isinstance(digits, Dataset) and len(digits) == 1797 and digits.num_classes == 10
    for i in range(3):
        saved(tmp_path / "photos" / f"{i}.png", size=(20, 12))
    folder = real_images(str(tmp_path / "photos"), 8, 3)
    assert len(folder) == 3 and folder.image_size == 8 and not folder.hflip
    np.savez(tmp_path / "stats.npz", mu=np.arange(3.0), sigma=np.eye(3))
    assert isinstance(real_images(str(tmp_path / "stats.npz"), 8, 3), Statistics)
    with pytest.raises(InputError, match="there are no such pictures; got 'digit'; allowed: .*digits.*a folder"):
        real_images("digit", 8, 1)
    with pytest.raises(InputError, match="there are no such pictures"):
        real_images(str(tmp_path / "nowhere"), 8, 3)
    with pytest.raises(InputError, match="there are no such samples"):
        samples_at(str(tmp_path / "nowhere"))


def test_samples_are_taken_as_they_are(tmp_path):
    arrays = [saved(tmp_path / "out" / "images" / f"{i:08d}.png") for i in range(4)]
    saved(tmp_path / "out" / "grid.png", size=(40, 40))  # which is none of them
    samples = samples_at(str(tmp_path / "out"))
    found = samples.gather(torch.arange(4))[0].permute(0, 2, 3, 1).numpy()
    assert np.array_equal(found, np.stack(arrays))
    grey = saved(tmp_path / "grey" / "0.png", "L")
    assert torch.equal(
        samples_at(str(tmp_path / "grey")).gather(torch.arange(1))[0][0, 0], torch.from_numpy(grey[:, :, 0])
    )
    np.savez(tmp_path / "packed.npz", pixels(3, 8, 8, 3))
    assert len(samples_at(str(tmp_path / "packed.npz"))) == 3


def test_samples_of_several_sizes_are_refused(tmp_path):
    saved(tmp_path / "a.png")
    saved(tmp_path / "b.png", size=(9, 9))
    with pytest.raises(InputError, match="square and of one size; got '8x8, 9x9'.*reference="):
        samples_at(str(tmp_path))
    np.savez(tmp_path / "stats.npz", mu=np.arange(3.0), sigma=np.eye(3))
    with pytest.raises(InputError, match="holds statistics and no images"):
        samples_at(str(tmp_path / "stats.npz"))

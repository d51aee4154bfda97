"""Pictures of a run: the data as the network sees them."""

import numpy as np
import torch
from PIL import Image
from test_generate import Recorder
from test_trainer import build  # noqa: F401 - a fixture

from cm_train import captions, generate
from cm_train.core.errors import InputError
from cm_train.core.run_layout import DATA_PICTURE, SAMPLES
from cm_train.core.world import ALONE
from cm_train.data.pixels import grid
from cm_train.runs import worker
from cm_train.training import drawing, previews
from cm_train.training.previews import Previews, show_data


def cells(picture, side, gap, count):
    """The images of a grid that is enlarged by a whole factor, in their own size."""
    factor = picture.shape[0] // (8 * (side + gap) + gap)
    small = picture[::factor, ::factor]
    step = side + gap
    return [small[gap + i // 8 * step :, gap + i % 8 * step :][:side, :side] for i in range(count)]


def test_data_are_shown_before_the_first_step(build, tmp_path):  # noqa: F811
    trainer = build("mode=ict")
    config, loader = trainer.config, trainer.loader
    assert worker.run(config, lambda reserve_s=0.0: True) is False, "stopped before the first step"
    picture = np.asarray(Image.open(config.folder / SAMPLES / DATA_PICTURE))
    batches = [loader.batch_at(step, range(config.batch_size))[0] for step in range(4)]  # 64 images
    for shown, image in zip(cells(picture, 8, 1, 64), torch.cat(batches), strict=True):
        assert np.array_equal(shown, image[0].numpy())


def test_data_are_shown_anew_where_a_run_is_and_kept_where_it_goes_on(build, tmp_path):  # noqa: F811
    loader = build("mode=ict").loader
    (tmp_path / DATA_PICTURE).write_text("of the first command, which was a mistake")
    show_data(loader, tmp_path, anew=False)
    assert (tmp_path / DATA_PICTURE).read_text().startswith("of the first")
    show_data(loader, tmp_path, anew=True)
    assert Image.open(tmp_path / DATA_PICTURE).size[0] >= 512


def test_pictures_of_classes_name_them(build, tmp_path):  # noqa: F811
    """Each image its own, of the data and of previews."""
    loader = build("mode=ict", "dataset.conditional=true").loader
    show_data(loader, tmp_path, anew=True)
    images, labels = loader.dataset.gather(loader.first(64))
    expected = grid(images, captions=[str(label) for label in labels.tolist()])
    assert np.array_equal(np.asarray(Image.open(tmp_path / DATA_PICTURE)), expected[0].numpy())

    named = Recorder(num_classes=3)
    named.config = named.config.model_copy(update={"class_names": ["ant", "bee", "cow"]})
    path, _ = Previews(tmp_path, 16, ALONE).make(named, 7)
    words = captions(named, 64)
    assert set(words) == {"ant", "bee", "cow"}
    assert np.array_equal(np.asarray(Image.open(path)), grid(generate(named, 64), captions=words)[0].numpy())


def test_data_that_can_not_be_shown_end_nothing(build, tmp_path, capsys, monkeypatch):  # noqa: F811
    loader = build("mode=ict").loader
    capsys.readouterr()
    (tmp_path / "file").touch()
    show_data(loader, tmp_path / "file", anew=True)
    assert f"could not write {tmp_path / 'file' / DATA_PICTURE}" in capsys.readouterr().err

    def broken(index):
        raise InputError("image 'a.png' can't be decoded")

    monkeypatch.setattr(loader.dataset, "gather", broken)
    show_data(loader, tmp_path / "elsewhere", anew=True)
    assert not (tmp_path / "elsewhere").exists() and capsys.readouterr().err == "", "training says it"


def test_a_preview_is_timed_without_its_teachers_pictures_which_are_made_once(tmp_path, monkeypatch):
    """They take eighty times as long in a run of one-step samples."""
    clock = [0.0]
    monkeypatch.setattr(previews.time, "monotonic", lambda: clock[0])

    def generate(denoiser, seeds, batch_size):
        clock[0] += {"student": 2.0, "teacher": 100.0}[denoiser]
        return torch.zeros(len(seeds), 1, 8, 8, dtype=torch.uint8)

    monkeypatch.setattr(drawing, "generate", generate)
    monkeypatch.setattr(previews, "captions", lambda *_: [])
    made = Previews(tmp_path, 64, ALONE, "teacher")
    for step in (1, 2):
        made.make("student", step)
        assert made.took_s == 2.0
    assert clock[0] == 104.0

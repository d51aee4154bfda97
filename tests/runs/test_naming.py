"""What runs on own pictures are called, and that other pictures never get into them."""

import shutil

import pytest
from PIL import Image
from test_train import plan  # noqa: F401 - a fixture

from cm_train.core.errors import InputError


def pictures(folder, first=0, count=5):
    folder.mkdir(parents=True)
    for i in range(count):
        Image.new("RGB", (20, 24), (first + i, 40, 90)).save(folder / f"{i}.png")
    Image.new("RGB", (20, 24), "red").save(folder / "9.png")
    return folder


@pytest.fixture
def own(plan, tmp_path):  # noqa: F811
    plan.usual = [*plan.usual, "dataset=image_folder"]
    pictures(tmp_path / "photos")
    return plan


def test_a_run_and_its_teacher_are_called_after_the_folder(own):
    assert own("mode=cd", "dataset.root=photos", "steps=2", "budget=null")
    assert own.names == ["photos-edm", "photos-cd"]
    assert own.trained[0].dataset.image_size == own.trained[1].dataset.image_size == 16


def test_other_pictures_of_that_name_get_six_digits(own, tmp_path, capsys):
    assert own("mode=ict", "dataset.root=photos")
    pictures(tmp_path / "elsewhere" / "photos", first=100)
    for _ in range(2):
        assert own("mode=ict", "dataset.root=elsewhere/photos")
        assert "runs called photos on other pictures, so those on elsewhere/photos are called photos-" in (
            capsys.readouterr().err
        )
    folders = sorted(path.name for path in (tmp_path / "runs").iterdir())
    assert len(folders) == 2 and folders[1] == "photos-ict" and len(folders[0]) == len("photos-123456-ict")
    assert own("mode=edm", "dataset.root=elsewhere/photos")
    assert own.names == [folders[0].replace("ict", "edm")], "another kind of run on them too"


def test_the_same_pictures_anywhere_are_the_same_run(own, tmp_path, capsys):
    assert own("mode=ict", "dataset.root=photos")
    shutil.copytree(tmp_path / "photos", tmp_path / "copy" / "photos")
    assert own("mode=ict", "dataset.root=copy/photos")
    assert own.names == [] and "is finished" in capsys.readouterr().err


def test_a_run_or_teacher_of_the_same_pictures_under_another_name_is_named(own, tmp_path, capsys):
    assert own("mode=ict", "dataset.root=photos") and own("mode=edm", "dataset.root=photos")
    (tmp_path / "photos").rename(tmp_path / "pets")
    capsys.readouterr()
    assert own("mode=ict", "dataset.root=pets")
    said = capsys.readouterr().err
    assert (
        "note: the same pictures have a run of another name, runs/photos-ict: name=photos-ict goes on with it" in said
    )
    assert "teacher" not in said
    own.ends["pets-edm"] = 0
    assert not own("mode=cd", "dataset.root=pets")
    said = capsys.readouterr().err
    assert "have a teacher of another name, runs/photos-edm: teacher=runs/photos-edm takes it" in said
    assert own("mode=cd", "dataset.root=pets", "teacher=runs/photos-edm")
    assert own.names == ["pets-cd"]


def test_a_name_that_is_asked_for_is_kept(own, tmp_path):
    assert own("mode=ict", "dataset.root=photos", "name=mine")
    assert own.names == ["mine"]
    pictures(tmp_path / "b", first=50)
    assert own("mode=ict", "dataset.root=b", "data_name=other")
    assert own.names == ["other-ict"]
    with pytest.raises(InputError, match="the dataset of runs/mine changed"):
        own("mode=ict", "dataset.root=b", "name=mine", "steps=9", "schedule_steps=6")


def test_a_folder_without_pictures_is_one_line(own, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no images found"):
        own("mode=ict", "dataset.root=empty")
    with pytest.raises(InputError, match="no such data"):
        own("mode=ict", "dataset.root=nowhere")
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("*/config.yaml"))


def test_a_students_images_are_as_large_as_its_teachers(own):
    assert own("mode=edm", "dataset.root=photos", "dataset.image_size=24")
    assert own("mode=cd", "dataset.root=photos")
    assert own.trained[0].dataset.image_size == 24

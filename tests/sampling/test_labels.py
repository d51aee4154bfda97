"""Classes as a user asks for them, and as they are said."""

import pytest
from test_generate import Recorder

from cm_train.core.errors import InputError
from cm_train.sampling.labels import captions_of, class_numbers, drawn_labels, in_words


def test_class_numbers_are_those_of_the_names_or_the_numbers_themselves():
    config = Recorder(num_classes=3).config
    named = config.model_copy(update={"class_names": ["2", "cat", "great white shark"]})
    assert class_numbers("cat", 5, named) == 1
    assert class_numbers(2, 5, named) == 0, "a name wins"
    assert class_numbers(["great white shark", 1, "2"], 3, named) == [2, 1, 0]
    assert class_numbers(2, 5, config) == 2
    assert class_numbers([0, "cat"], 5, named) == [0, 1], "they take turns"
    for asked, known, message in (
        ("cta", named, r"no such class; got 'cta'; allowed: 2, cat, great white shark, or 0 to 2; fix: labels=cat"),
        ("cat", config, "knows its classes by number alone; got 'cat'; allowed: 0 to 2"),
        (3, named, "no such class; got '3'; allowed: 0 to 2"),
        ([0, 1, 2, 0], named, "4 labels for 3 images"),
        ([], named, "0 labels for 1 images"),
        ("cat", Recorder().config, "has no classes; got 'labels=cat'"),
    ):
        with pytest.raises(InputError, match=message):
            class_numbers(asked, 3, known)


def test_classes_are_said_once_each_and_the_first_ones_of_many():
    names = [*"abcdefg"]
    assert in_words(1, names) == "b (1)"
    assert in_words([2, 0, 2], names) == "c (2), a (0)"
    assert in_words([*range(7)], names) == "a (0), b (1), c (2), d (3), e (4), ... (7 in all)"
    assert in_words([1], []) == in_words(None, names) == ""


def test_many_names_are_cut_and_counted():
    names = [f"class of name {i}" for i in range(1000)]
    config = Recorder(num_classes=1000).config.model_copy(update={"class_names": [*names[:-1], "x" * 255]})
    with pytest.raises(InputError) as raised:
        class_numbers("cat", 1, config)
    assert "class of name 19, ... (1000 names in all), or 0 to 999" in str(raised.value)
    assert len(str(raised.value)) < 600


def test_captions_are_names_in_letters_that_the_font_has_or_numbers():
    names = ["cat", "Café", "猫", "a\nb", " "]
    assert captions_of([0, 1, 2, 3, 4, 0], names) == ["cat", "Cafe", "class 2", "class 3", "class 4", "cat"]
    assert captions_of([7, 0], []) == ["class 7", "class 0"]


def test_drawn_labels_depend_on_their_seed_alone():
    assert drawn_labels(range(50), 10)[20:] == drawn_labels(range(20, 50), 10)
    assert drawn_labels([], 10) == []

"""Images with known faults: each metric ranks them as it should, by more than its spread."""

import pytest

from cm_train.evaluation.sources import real_images
from known_answers import known_answers

REAL, NOISE, BLUR = "other real images", "slight noise", "3x3 blur"
REPEATED, NORMAL, COPIES = "thirty images repeated", "normal, their moments", "copies of the reference"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        return known_answers(real_images("digits", 8, 1), "classifier")[1]


def is_worse(found, name, worse, better, by=2.0, higher_is_better=False):
    a, b = found[worse][name], found[better][name]
    gap = (b.mean - a.mean) if higher_is_better else (a.mean - b.mean)
    return gap > by * (a.std**2 + b.std**2) ** 0.5


def test_distances_see_every_fault(digits):
    for name in ("kid", "fd"):
        for fault in (BLUR, REPEATED, NORMAL):  # slight noise is nothing to who has learnt to read
            assert is_worse(digits, name, fault, REAL), (name, fault)
            assert is_worse(digits, name, fault, NOISE), (name, fault)
    assert abs(digits[REAL]["kid"].mean) < 3 * digits[REAL]["kid"].std  # the same distribution


def test_precision_sees_quality_and_recall_variety(digits):
    assert is_worse(digits, "precision", NORMAL, REAL, higher_is_better=True)
    assert is_worse(digits, "density", NORMAL, REAL, higher_is_better=True)
    assert is_worse(digits, "recall", REPEATED, REAL, higher_is_better=True)
    assert is_worse(digits, "coverage", REPEATED, REAL, higher_is_better=True)
    # Each sees its own fault alone: repeated real images look as real as others.
    assert digits[REPEATED]["precision"].mean > 0.8 > 0.5 > digits[REPEATED]["recall"].mean


def test_memorisation_sees_copies_alone(digits):
    assert digits[COPIES]["copies"].mean == 1 and digits[COPIES]["nearer"].mean > 0.99
    assert digits[REAL]["copies"].mean == pytest.approx(0.05, abs=0.05)
    assert digits[REAL]["nearer"].mean == pytest.approx(0.5, abs=0.06)
    for fault in (NOISE, BLUR, NORMAL):
        assert digits[fault]["copies"].mean < 0.2

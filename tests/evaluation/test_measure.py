"""Spread, protocols, results and tables."""

import json
import math
import statistics

import pytest
import torch

from cm_train.core.errors import InputError
from cm_train.evaluation import measure
from cm_train.evaluation.metrics.base import Metric, Real
from cm_train.evaluation.page import Shown, page
from cm_train.evaluation.protocol import FeaturesFacts, ModelFacts, Protocol, ReferenceFacts, SamplesFacts
from cm_train.evaluation.result import Number, Result, read_result
from cm_train.evaluation.seen import Seen
from cm_train.evaluation.table import rows


class Mean(Metric):
    """The mean of the first feature, whose spread is known: its deviation over the root of the number of images."""

    numbers = {"mean": "lower"}

    class Config:
        name = "mean"

    def measure(self, samples, real):
        return {"mean": samples.features[:, 0].double().mean().item()}


def drawn(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def real():
    x = drawn(99, 50, 2)
    return Real("pixels", Seen(x, None))


def test_spread_over_halves_is_the_means_standard_error():
    found = [measure.over_halves([Mean(Mean.Config)], Seen(drawn(i, 2000, 1), None), real())["mean"] for i in range(40)]
    assert found[0].mean == pytest.approx(drawn(0, 2000, 1).mean().item(), abs=1e-6)
    typical = math.sqrt(statistics.fmean(number.std**2 for number in found))
    assert typical == pytest.approx(1 / math.sqrt(2000), rel=0.15)


def test_spread_over_blocks_is_theirs():
    blocks = [Seen(drawn(i, 100, 1), None) for i in range(3)]
    values = [block.features.double().mean().item() for block in blocks]
    found = measure.over_blocks([Mean(Mean.Config)], blocks, real())["mean"]
    assert found.values == pytest.approx(values)
    assert found.mean == pytest.approx(statistics.fmean(values)) and found.std == pytest.approx(
        statistics.stdev(values)
    )
    assert measure.over_blocks([Mean(Mean.Config)], blocks[:1], real())["mean"].std is None


def test_features_that_are_not_finite_are_refused():
    bad = Seen(torch.full((3, 2), math.nan), None)
    with pytest.raises(InputError, match="not finite"):
        measure.usable([Mean(Mean.Config)], bad, real())


def protocol(name="runs/a", step=100, **changes):
    of = ModelFacts(
        ckpt=name,
        step=step,
        weights="ema",
        sha256="00",
        seeds=["0-99"],
        sampler="multistep",
        sigmas=[80.0],
        network_calls=1,
        labels=None,
        guidance=1.0,
        precision="fp32",
    )
    values = {
        "name": None,
        "num": 100,
        "spread": "3 blocks of seeds",
        "reference": ReferenceFacts(what="photos", sha256="ab", num=500, image_size=32, channels=3),
        "held_out": None,
        "features": FeaturesFacts(name="pixels", sha256="cd", input="as they are"),
        "metrics": {"kid": {"subset_size": 1000}},
        "rounding": "nearest",
        "of": of,
        "versions": {"torch": "2.11"},
    }
    return Protocol(**values | changes)


def result(protocol, mean=0.5):
    return Result(metrics={"kid": Number(mean=mean, std=0.1, values=[mean])}, protocol=protocol)


def test_a_result_comes_back_from_its_file(tmp_path):
    given = result(protocol()).model_copy(update={"notes": ["few"], "real": {"kid": 0.1}, "num_real": 70})
    given.write(tmp_path / "new")
    assert read_result(tmp_path / "new" / "eval.json") == given
    stored = json.loads((tmp_path / "new" / "eval.json").read_text())
    assert stored["metrics"]["kid"]["mean"] == 0.5 and stored["protocol"]["reference"]["sha256"] == "ab"


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b'{"metrics": {}}', b"\xff\xfe", b"[" * 10_000, b"x" * (1 << 21)]
)
def test_what_is_no_result_is_one_line(tmp_path, content):
    (tmp_path / "eval.json").write_bytes(content)
    with pytest.raises(InputError, match="is none of cm-eval's"):
        read_result(tmp_path / "eval.json")


def test_results_of_one_protocol_share_a_table():
    headings, cells = rows([result(protocol("runs/a")), result(protocol("runs/b", versions={"torch": "3"}), 0.25)])
    assert headings == ["", "kid"]
    assert cells == [["runs/a at 100, 1 call", "0.5 ± 0.1"], ["runs/b at 100, 1 call", "0.25 ± 0.1"]]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num": 50}, r"images \(100 and 50\)"),
        ({"spread": "10 halves"}, "spread"),
        (
            {"reference": ReferenceFacts(what="x", sha256="ff", num=500, image_size=32, channels=3)},
            r"reference \(ab and",
        ),
        ({"held_out": ReferenceFacts(what="x", sha256="ff", num=5, image_size=32, channels=3)}, "held-out pictures"),
        ({"features": FeaturesFacts(name="pixels", sha256="ee", input="as they are")}, "weights of the features"),
        ({"features": FeaturesFacts(name="pixels", sha256="cd", input="at 96")}, "what the features see"),
        ({"metrics": {"kid": {"subset_size": 10}}}, "settings of kid"),
        ({"rounding": "truncated"}, "rounding"),
    ],
)
def test_results_of_two_protocols_are_refused_a_table(changes, named):
    with pytest.raises(InputError, match=f"runs/a at 100, 1 call and of runs/b.*can't share a table.*{named}"):
        rows([result(protocol("runs/a")), result(protocol("runs/b", **changes))])


def test_a_page_shows_numbers_pictures_and_a_curve_and_obeys_nobody():
    named = "<script>alert(1)</script>"
    results = [result(protocol(named, step), 1 / step) for step in (100, 200, 400)]
    picture = b"\x89PNG and so on"
    text = page("A run", [Shown(r, {"Its <b>images</b>": picture}) for r in results])
    assert "<script" not in text and "<b>images" not in text
    assert text.count("data:image/png;base64,") == 3
    assert "Over training" in text and text.count("<circle") == 3 and "step 400: 0.0025 ± 0.1" in text
    assert "0.0025 ± 0.1" in text and "reference.sha256" in text
    assert "<polyline" not in page("One", [Shown(results[0])])


def test_of_samples_the_path_is_the_name():
    of = SamplesFacts(path="out", sha256="12")
    assert rows([result(protocol(of=of))])[1][0][0] == "out"

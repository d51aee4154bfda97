"""The Python that the documents show does what they say it does, on a run of a few steps."""

import re
from pathlib import Path

import pytest
import torch

from cm_train.commands import from_python

ROOT = Path(__file__).parent.parent
FEW = {"tracking": "none", "steps": 3, "batch_size": 16, "preview_every": 0}


@pytest.fixture
def run_blocks(tmp_path, monkeypatch):
    """run_blocks(document) -> the names that its Python leaves, run in an empty folder; training takes few steps."""
    monkeypatch.chdir(tmp_path)
    real = from_python.train
    monkeypatch.setattr(from_python, "train", lambda given=None, **more: real({**(given or {}), **more, **FEW}))

    def run(document: str) -> dict[str, object]:
        blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / document).read_text(), re.MULTILINE | re.DOTALL)
        assert blocks
        names: dict[str, object] = {}
        exec("\n".join(blocks), names)
        return names

    return run


def test_the_lines_of_the_readme(run_blocks):
    names = run_blocks("README.md")
    assert names["run"] == Path("runs/digits-ct") and (names["run"] / "checkpoints").is_dir()
    assert names["images"].dtype == torch.uint8 and names["images"].shape == (64, 1, 8, 8)
    assert names["picture"].size[0] > 500
    assert names["denoised"].shape == (64, 1, 8, 8) and names["denoised"].is_floating_point()


def test_the_lines_of_the_guide(run_blocks):
    names = run_blocks("docs/python.md")
    assert names["run"] == Path("runs/digits-classes")
    assert names["images"].shape == (16, 1, 8, 8) and names["path"].shape == (9, 1, 8, 8)
    assert names["threes"].shape == names["pairs"].shape == (8, 1, 8, 8)
    assert names["exact"].dtype == names["clean"].dtype == torch.float32
    begun = names["generate"](names["denoiser"], [3, 8], labels=5)
    assert torch.equal(names["path"][0], begun[0])
    assert (names["path"][8].int() - begun[1].int()).abs().max() <= 1, "cos(pi / 2) is nearly 0"

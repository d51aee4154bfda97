"""A wheel built from the repository and installed elsewhere carries its configs and runs."""

import importlib.util
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from conftest import TINY

ROOT = Path(__file__).parent.parent
_spec = importlib.util.spec_from_file_location("lowest_versions", ROOT / "scripts" / "lowest_versions.py")
lowest_versions = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(lowest_versions)


def test_lowest_versions_are_those_of_every_requirement_that_has_one():
    text = """
        [project]
        dependencies = ["a>=1", "b-c[x,y]>=2.0.1,<3", "d<2", 'e > 1 ; python_version >= "3.11"']
        [project.optional-dependencies]
        more = ["f<4,>=3rc1", "own[more]"]
    """
    assert lowest_versions.floors(text) == ["a==1", "b-c==2.0.1", "f==3rc1"]
    ours = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = lowest_versions.floors((ROOT / "pyproject.toml").read_text())
    assert {line.split("==")[0] for line in found} >= {r.split(">=")[0] for r in ours["dependencies"]}


@pytest.mark.long
def test_wheel_finds_its_configs_and_trains(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    yamls = {str(p.relative_to(ROOT / "conf")) for p in (ROOT / "conf").rglob("*.yaml")}
    assert "cm_train/py.typed" in names
    assert yamls == {n.removeprefix("cm_train/conf/") for n in names if n.startswith("cm_train/conf/")}

    installed, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(installed)
    environment = {**os.environ, "PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    for arguments in (["train", "mode=ict", *TINY], ["sample", "ckpt=runs/digits-ict", "num=2"]):
        code = f"import cm_train.commands.{arguments[0]} as m; print(m.__file__); m.main()"
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments[1:]], cwd=elsewhere, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith(str(installed)), "it ran the checkout instead"
    assert (elsewhere / "samples" / "digits-ict-step-6-1-step" / "grid.png").exists()

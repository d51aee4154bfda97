"""A wheel built from the repository and installed elsewhere carries its configs and runs."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from conftest import TINY

ROOT = Path(__file__).parent.parent


@pytest.mark.long
def test_wheel_finds_its_configs_and_trains(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(tmp_path), str(ROOT)]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    yamls = {str(p.relative_to(ROOT / "conf")) for p in (ROOT / "conf").rglob("*.yaml")}
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

"""What `cm-train --info` says before Hydra lists its plugins and configs: where things are, and what was found."""

import importlib.util
import os
import platform
from pathlib import Path

from .. import __version__
from ..core import cli, configs


def lines() -> list[str]:
    """One "what  where" a line."""
    import torch

    from ..models.compiling import cache_folder
    from ..objectives.lpips import weights_path

    package = Path(__file__).parents[1]
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    vgg = weights_path()
    rows = {
        "cm_train": f"{__version__} in {package}",
        "configs": f"{configs.conf_dir()} (your own: --config-dir)",
        "runs": f"{Path('runs').absolute()} (run_dir=...), sweeps in {Path('runs/sweeps')}",
        "data": f"{Path('data').absolute()} (dataset.root=...)",
        "python": f"{platform.python_version()}, torch {torch.__version__}, hydra {cli.version('hydra-core')}",
        "devices": ", ".join(gpus) or f"no GPU; {os.cpu_count()} CPU cores",
        "wandb": f"{cli.version('wandb')}, {_wandb_login()}",
        "VGG16 (LPIPS)": f"{vgg}{'' if vgg.exists() else ' (not there yet)'}",
        "compiled": f"{cache_folder()} (TORCHINDUCTOR_CACHE_DIR)",
        "extras": ", ".join(f"{name}{'' if _has(module) else ' (missing)'}" for name, module in _EXTRAS.items()),
    }
    return [f"{what:14}{where}" for what, where in rows.items()]


_EXTRAS = {
    "eval": "torch_fidelity",
    "lpips": "lpips",
    "sweeps": "hydra_plugins.hydra_joblib_launcher",
    "tensorboard": "tensorboard",
}


def _has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _wandb_login() -> str:
    from ..training.tracking import has_wandb_login

    if os.environ.get("WANDB_MODE"):
        return f"WANDB_MODE={os.environ['WANDB_MODE']}"
    if os.environ.get("WANDB_API_KEY"):
        return "a key in WANDB_API_KEY"
    return "logged in" if has_wandb_login() else "no login: offline (wandb login)"

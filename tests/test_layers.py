"""The house's rules that a reader can't see at a glance: who may import whom, and that no setting is unread."""

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import cm_train
from cm_train import registry

PACKAGE = Path(cm_train.__file__).parent

# Lower layers first; a module imports from layers below its own, or by name from its own line where listed.
LAYERS = [
    {"errors"},
    {"child_python", "command_line", "files", "launched", "memory", "registry", "rng", "signals", "waiting"},
    {"distributed", "images", "precision", "state_file", "tracking"},
    {"cifar_pickles", "decoding", "downloads", "gpus", "host_memory", "idx_files"},
    {"image_files", "left_out", "meters", "rank", "run_folder"},
    {"cifar_batches", "fingerprint", "image_labels", "launching", "vanishing"},
    {"slurm"},
    {"noise", "distances", "lpips_distance", "ema", "optimizers", "backbones", "datasets"},
    {"compiling", "denoiser"},
    {"compile_policy", "sampling", "guidance"},
    {"manifest"},
    {"checkpoint", "weights"},
    {"posthoc"},
    {"loading"},
    {"objectives", "generation", "metrics", "saving"},
    {"config", "previews"},
    {"student", "train_state"},
    {"run_saver", "steps"},
    {"trainer"},
    {"announce", "sweep_table"},
    {"worker"},
    {"cli", "joblib_launcher", "optuna_search", "slurm_launcher", "teachers"},
    {"plugins"},
    {"info", "runs"},
    {"sweep_job"},
    {"sweeps"},
    {"sample_folder"},
    {"sample_files"},
    {"train", "sample"},
]
# Within a folder siblings import only its `base`, unless it has layers of its own.
INNER_LAYERS = {
    "tracking": [
        {"config", "terminal"},
        {"base", "metrics_file", "progress_bar"},
        {"tensorboard", "training_progress", "wandb_run"},
        {"tracker"},
        {"__init__"},
    ],
}
TRACKERS = {"wandb", "tensorboard"}
PLUGINS = {"joblib_launcher", "optuna_search", "plugins", "slurm_launcher"}
HYDRA_ALLOWED = {"cli", "command_line", "config", "runs", "sample", "sweep_job", "sweeps", "teachers"} | PLUGINS


def modules() -> list[Path]:
    return sorted(p for p in PACKAGE.rglob("*.py") if p != PACKAGE / "__init__.py" and "conf" not in p.parts)


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def level(name: str, layers: list[set[str]] = LAYERS) -> int:
    return next(i for i, layer in enumerate(layers) if name in layer)


def internal_imports(path: Path) -> set[str]:
    """Dotted names below cm_train that a module imports anywhere in it, as `room` or `room.module`."""
    package = ["cm_train", *path.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            full = base + (node.module.split(".") if node.module else [])
            if full[:1] == ["cm_train"]:
                tail = full[1:]
                found |= {".".join(tail)} if tail else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("cm_train.") for a in node.names if a.name.startswith("cm_train.")}
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_module_imports_only_downward(path):
    own = room(path)
    for imported in internal_imports(path):
        other = imported.split(".")[0]
        if other == own and own in INNER_LAYERS:
            inner = imported.split(".")[1]
            assert level(inner, INNER_LAYERS[own]) < level(path.stem, INNER_LAYERS[own]), f"{path} imports {inner}"
        elif other == own:
            assert imported in (own, f"{own}.base"), f"{path} imports its sibling {imported}"
        else:
            assert level(other) < level(own), f"{path} (layer {level(own)}) imports {imported} (layer {level(other)})"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_hydra_and_trackers_stay_in_their_rooms(path):
    tree = ast.parse(path.read_text())
    names = {a.name.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    names |= {
        n.module.split(".")[0] for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and n.module and not n.level
    }
    if room(path) not in HYDRA_ALLOWED:
        assert not names & {"hydra", "omegaconf"}
    if room(path) != "tracking":
        assert not names & TRACKERS


def all_settings() -> list[type[registry.Settings]]:
    for kind in registry._HOMES:
        registry.names(kind)
    import cm_train.sample
    import cm_train.worker  # noqa: F401 - imports the rest

    found, todo = [], [registry.Settings]
    while todo:
        for cls in todo.pop().__subclasses__():
            todo.append(cls)
            found.append(cls)
    return [c for c in dict.fromkeys(found) if c.__module__.startswith("cm_train")]


def test_every_config_field_is_read():
    source = "\n".join(p.read_text() for p in modules())
    unread = []
    for cls in all_settings():
        for field in cls.model_fields:
            # Read as an attribute somewhere in the package, outside of its own declaration.
            if not re.search(rf"(?:\.|\bc\.){field}\b", source):
                unread.append(f"{cls.__module__}.{cls.__qualname__}.{field}")
    assert not unread


def test_every_yaml_key_is_a_config_field_and_the_reverse(composed):
    from cm_train.run_config import RunConfig

    keys = set(composed("mode=cd"))
    assert keys == set(RunConfig.model_fields)


def test_public_functions_have_docstrings():
    missing = []
    for path in modules():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
                short = isinstance(node, ast.FunctionDef) and node.name in ("main", "train", "sample", "step_folder")
                if not short and ast.get_docstring(node) is None and node.name != "Config":
                    missing.append(f"{path.name}:{node.name}")
    assert not missing
    assert inspect.getdoc(cm_train)


def test_tracking_imports_nothing_heavy():
    """Commands import it before they know what they will need."""
    heavy = ["torch", "wandb", "tensorboard", "rich.progress", "rich.console"]
    code = f"import cm_train.tracking, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

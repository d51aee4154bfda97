"""The house's rules that a reader can't see at a glance: who may import whom, and that no setting is unread."""

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from cm_train.core import registry, run_layout
from cm_train.core.settings import Settings
from coverage_floors import FLOORS
from draw_rooms import PACKAGE, PICTURE, ROOMS, between_rooms, dotted, draw, internal_imports, modules

HYDRA_ALLOWED = {"commands", "sweeps", "runs/config.py"} | {
    f"core/{name}.py" for name in ("cli", "command_line", "composing", "configs", "override")
}
TRACKERS = {"wandb", "tensorboard"}


def test_rooms_import_only_downwards():
    for path in modules():
        own = ROOMS.index(dotted(path).split(".")[0])
        for imported in internal_imports(path):
            other = ROOMS.index(imported.split(".")[0])
            assert other >= own, f"{path} is in {ROOMS[own]} and imports {imported}, which is above it"


def test_files_have_one_job():
    """A file that grows longer has taken on a second one. A network is one job, however many layers it has."""
    for path in modules():
        if "backbones" not in path.parts:
            count = len(path.read_text().splitlines())
            assert count <= 250, f"{path} has {count} lines: which of its jobs belongs elsewhere?"


def test_the_picture_of_the_rooms_is_of_these_imports():
    assert PICTURE.read_text() == draw(between_rooms()), "fix: python scripts/draw_rooms.py"


def test_every_room_has_a_floor_of_what_tests_run_of_it():
    assert list(FLOORS) == ROOMS
    assert all(50 < floor <= 98 for floors in FLOORS.values() for floor in floors)


def test_no_module_imports_itself_in_a_circle():
    imports = {dotted(path): internal_imports(path) - {dotted(path)} for path in modules()}
    while imports:  # take away what imports nothing that is left
        free = [name for name, others in imports.items() if not others & imports.keys()]
        assert free, f"a circle among {sorted(imports)}"
        for name in free:
            del imports[name]


def test_packages_import_themselves_by_where_they_are():
    for path in modules():
        absolute = [
            n.module if isinstance(n, ast.ImportFrom) else n.names[0].name
            for n in ast.walk(ast.parse(path.read_text()))
            if isinstance(n, ast.Import) or (isinstance(n, ast.ImportFrom) and not n.level)
        ]
        assert not [name for name in absolute if name.split(".")[0] == "cm_train"], f"{path}: relative imports only"


def test_hydra_and_trackers_stay_in_their_rooms():
    for path in modules():
        place, names = str(path.relative_to(PACKAGE)), set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.add(node.module.split(".")[0])
        if not {place, place.split("/")[0]} & HYDRA_ALLOWED:
            assert not names & {"hydra", "omegaconf"}, path
        if not place.startswith("training/tracking/"):
            assert not names & TRACKERS, path


def test_names_inside_a_run_folder_are_spelled_in_one_place():
    names = {run_layout.CONFIG, run_layout.METRICS, run_layout.LEFT_OUT, run_layout.SAVED, run_layout.STATE}
    names |= {run_layout.MANIFEST, run_layout.CHECKPOINTS, run_layout.DATA_PICTURE, run_layout.RUN_LOG}
    names |= {run_layout.step_name(1)[:5]}
    for path in modules():
        place = str(path.relative_to(PACKAGE))
        if place in ("core/run_layout.py", "objectives/lpips.py"):  # torch.hub has "checkpoints" too
            continue
        spelled = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
        assert not names & spelled, path


def all_settings() -> list[type[Settings]]:
    for kind in registry.KINDS:
        registry.names(kind)
    import cm_train.commands.draw
    import cm_train.runs.worker  # noqa: F401 - imports the rest

    found, todo = [], [Settings]
    while todo:
        for cls in todo.pop().__subclasses__():
            todo.append(cls)
            found.append(cls)
    return [c for c in dict.fromkeys(found) if c.__module__.startswith("cm_train")]


def read_in(path: Path) -> set[str]:
    """What a module reads of anything: attributes, and keys that it spells."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    found = {n.attr for n in nodes if isinstance(n, ast.Attribute) and isinstance(n.ctx, ast.Load)}
    return found | {n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str)}


def unread(settings: Iterable[type[Settings]]) -> list[str]:
    """Fields that are read neither where they are declared, nor where that is imported, nor where runs are built."""
    read = {f"cm_train.{dotted(path)}": read_in(path) for path in modules()}
    imported = {f"cm_train.{dotted(path)}": {f"cm_train.{n}" for n in internal_imports(path)} for path in modules()}
    found = []
    for cls in settings:
        homes = {base.__module__ for base in cls.__mro__ if base.__module__.startswith("cm_train")}
        homes -= {"cm_train.core.settings", "cm_train.core.registry"}  # which everybody imports
        near = homes | {n for n, others in imported.items() if others & (homes | {"cm_train.training.config"})}
        near |= {name for name in read if name.startswith(("cm_train.runs.", "cm_train.sweeps."))}
        names = set().union(*(read.get(module, set()) for module in near))
        found += [f"{cls.__module__}.{cls.__qualname__}.{field}" for field in cls.model_fields if field not in names]
    return found


def test_every_config_field_is_read():
    # For those who look into eval.json.
    recorded = [f"cm_train.evaluation.protocol.ModelFacts.{name}" for name in ("sampler", "seeds", "sigmas")]
    assert sorted(unread(all_settings())) == recorded


def test_a_field_that_nobody_reads_is_found_whatever_its_name():
    class Planted(Settings):
        b: float = 0.0  # read of other settings
        unheard_of: int = 0

    Planted.__module__ = "cm_train.training.tracking.config"
    assert [name.split(".")[-1] for name in unread([Planted])] == ["b", "unheard_of"]


def test_every_yaml_key_is_a_config_field_and_the_reverse(composed):
    from cm_train.training.config import RunConfig

    keys = set(composed("mode=cd"))
    assert keys == set(RunConfig.model_fields)


def test_public_methods_have_docstrings_of_their_own_or_of_a_base():
    """What the linter can't see: ruff holds modules, classes and functions to theirs."""
    missing = []
    for path in modules():
        module = importlib.import_module(f"cm_train.{dotted(path)}")
        for cls in vars(module).values():
            if inspect.isclass(cls) and cls.__module__ == module.__name__ and not cls.__name__.startswith("_"):
                missing += [f"{module.__name__}.{cls.__name__}.{name}" for name in vars(cls) if not is_told(cls, name)]
    assert not missing


def is_told(cls: type, name: str) -> bool:
    """Whether a member is private, no function, what torch and pydantic call, or has a docstring anywhere."""
    member = vars(cls)[name]
    function = member.fget if isinstance(member, property) else inspect.unwrap(getattr(member, "__func__", member))
    if name.startswith("_") or name in ("forward", "model_post_init") or not inspect.isfunction(function):
        return True
    is_field = function.__name__ == "<lambda>"
    return is_field or any(getattr(getattr(base, name, None), "__doc__", None) for base in cls.__mro__)


def test_tracking_imports_nothing_heavy():
    """Commands import it before they know what they will need."""
    heavy = ["torch", "wandb", "tensorboard", "rich.progress", "rich.console"]
    code = f"import cm_train.training.tracking, sys; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"

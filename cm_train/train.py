"""cm-train: from a composed config to a trained run folder."""

import sys
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from . import cli


def train(cfg: DictConfig) -> int:
    _name_sweep_job(cfg)

    from .config import parse  # torch is imported from here on
    from .signals import StopFlag

    config = parse(cfg)
    with StopFlag() as stop:
        finished = _train(config, cfg, stop)
    return cli.DONE if finished else cli.STOPPED


def _train(config: Any, cfg: DictConfig, stop: Any) -> bool:
    from . import checkpoint, run_folder, worker
    from .config import dump
    from .tracking import warn

    with run_folder.lock(config.folder):
        config = _inherit(config, cfg, stop)
        if config is None:
            return False
        stored = run_folder.stored_config(config.folder)
        # Before its first checkpoint a run has nothing to lose: a mistaken first command may be corrected.
        if stored is not None and any((config.folder / "checkpoints").glob("step_*")):
            # Raising `steps` moves the end; what the schedules count to stays as it was first set.
            config = config.model_copy(update={"schedule_steps": config.schedule_steps or stored["schedule_steps"]})
            run_folder.check_same_run(config.folder, stored, dump(config))
        else:
            config = config.model_copy(update={"schedule_steps": config.schedule_steps or config.steps})
        run_folder.store_config(config.folder, dump(config))
        found = checkpoint.latest(config.folder, set_aside=True)
        if found is not None and found[1].step >= config.steps:
            warn(f"{config.folder} is finished at step {found[1].step}; steps=... beyond that goes on")
            return True
        _print_header(config, found[1].step if found else 0)
        finished = worker.run(config, stop)
        _print_summary(config, finished)
        return finished


def _inherit(config: Any, cfg: DictConfig, stop: Any) -> Any:
    """The config with its teacher found (trained first where it is missing), and the teacher's backbone taken."""
    from . import checkpoint
    from .tracking import warn

    if not config.needs_teacher():
        return config
    if config.teacher is None:
        home = config.folder.parent / f"{config.dataset['name']}-edm"
        if not _is_finished(home):
            warn(f"no finished teacher in {home}: training it first (teacher=... names another)")
            teacher = _teacher_config(config, cfg, home)
            if not _train(teacher, cfg, stop):
                return None
        config = config.model_copy(update={"teacher": str(home)})
    backbone = checkpoint.resolve(config.teacher)[1].backbone
    if backbone["name"] == config.backbone["name"] and "dropout" in config.backbone:
        backbone = {**backbone, "dropout": config.backbone["dropout"]}  # belongs to the recipe, not to the sizes
    return config.model_copy(update={"backbone": backbone})


def _is_finished(run: Path) -> bool:
    from . import checkpoint

    found = checkpoint.latest(run)
    return found is not None and found[1].finished


def _teacher_config(config: Any, cfg: DictConfig, home: Path) -> Any:
    """mode=edm with its own recipe for the same data, backbone, precision, seed and tracking."""
    from .config import parse

    choice = HydraConfig.get().runtime.choices["dataset"]
    teacher = compose("train", overrides=["mode=edm", f"dataset={choice}"])
    backbone = OmegaConf.to_container(cfg.backbone)
    assert isinstance(backbone, dict)
    if "dropout" in backbone and "dropout" in teacher.backbone:
        backbone["dropout"] = teacher.backbone.dropout
    with open_dict(teacher):
        teacher.backbone = backbone
        for key in ("dataset", "precision", "compile", "seed", "tracking"):
            teacher[key] = cfg[key]
        teacher.name, teacher.run_dir = home.name, str(home)
    return parse(teacher)


def _name_sweep_job(cfg: DictConfig) -> None:
    """In a multirun, append this job's swept overrides to its name: one folder a job."""
    hydra_config = HydraConfig.get()
    if hydra_config.mode != RunMode.MULTIRUN:
        return
    asked = OverridesParser.create().parse_overrides([a for a in sys.argv[1:] if not a.startswith("-")])
    swept = {o.key_or_group for o in asked if o.is_sweep_override()} - {"dataset", "mode", "name"}
    job = OverridesParser.create().parse_overrides(list(hydra_config.overrides.task))
    if any(o.key_or_group in ("name", "run_dir") for o in job):
        return
    parts = [f"{o.key_or_group}-{o.get_value_string()}" for o in job if o.key_or_group in swept]
    if parts:
        clean = "".join(c if c.isalnum() or c in "-._" else "-" for c in "-".join(parts))
        cfg.name = f"{cfg.name}-{clean}"


def _print_header(config: Any, step: int) -> None:
    from .tracking import warn

    start = f"resuming at step {step} of" if step else "for"
    source = f" from teacher {config.teacher}" if config.teacher else ""
    warn(
        f"{config.mode} on {config.dataset['name']}{source}: {start} {config.steps} steps of {config.batch_size} images"
    )
    warn(f"run folder {config.folder}")


def _print_summary(config: Any, finished: bool) -> None:
    from .tracking import warn

    if finished:
        warn(f"done; samples in {config.folder / 'samples'}. Next: cm-sample ckpt={config.folder}")
    else:
        warn(f"stopped after saving; the same command goes on. Folder {config.folder}")


def main() -> None:
    cli.run("train", train)


if __name__ == "__main__":
    main()

import itertools

import pytest
import torch
from hydra.errors import MissingConfigException
from omegaconf import OmegaConf

from cm_train.core import configs, registry
from cm_train.core.errors import InputError
from cm_train.core.settings import typed
from cm_train.models.denoiser import SamplingConfig
from cm_train.objectives.noise import NoiseConfig
from cm_train.runs.config import parse
from cm_train.training.config import RunConfig, dump, save_interval
from cm_train.training.tracking import TrackingConfig

CONF = configs.conf_dir()


def options(group: str) -> list[str]:
    return sorted(p.stem for p in (CONF / group).glob("*.yaml"))


def arguments(dataset: str) -> list[str]:
    return ["dataset.root=somewhere"] if dataset == "image_folder" else []


@pytest.mark.parametrize("dataset", options("dataset"))
def test_config_composes_for_every_mode_and_dataset(dataset, composed):
    """And for each backbone with some of them: shared out over the modes, on each data set in another way."""
    backbones = itertools.cycle(["", *(f"backbone={name}" for name in options("backbone"))])
    backbones = itertools.islice(backbones, options("dataset").index(dataset), None)
    for mode, backbone in zip(options("mode"), backbones, strict=False):
        cfg = composed(f"mode={mode}", f"dataset={dataset}", *filter(None, [backbone]), *arguments(dataset))
        config = parse(cfg)
        assert config.mode == mode
        assert config.name == f"{'somewhere' if arguments(dataset) else dataset}-{mode}"
        assert config.dataset.name == dataset, "the run's name must be what the user typed"
        assert typed(RunConfig, dump(config)) == config


@pytest.mark.parametrize("group", ["noise", "ema", "optimizer", "tracking"])
def test_config_composes_for_every_option_of_a_group(group, composed):
    for option in options(group):
        mode = {"lognormal": "edm", "ect": "ect", "scm": "sct"}.get(option, "ict")
        parse(composed(f"{group}={option}", f"mode={mode}"))


def test_a_recipe_of_the_users_lies_in_a_folder_and_may_be_named_by_an_experiment(tmp_path, composed):
    for name, text in {
        "experiment/typo": "defaults: [override /recipe: mien]",
        "experiment/mine": "defaults: [override /recipe: mine]",
        "recipe/mine": "steps: 7",
    }.items():
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"# @package _global_\n{text}\n")
    place = f"hydra.searchpath=[file://{tmp_path}]"
    for words in ("experiment=mine", "recipe=mine"):
        assert composed(place, words).steps == 7
    assert parse(composed(place, "recipe=mine")).optimizer.warmup_steps == 1, "the rest suits what it sets"
    assert parse(composed(place, "recipe=mine", "steps=9")).steps == 9
    with pytest.raises(MissingConfigException, match="recipe/mien"):
        composed(place, "experiment=typo")


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("backbone", options("backbone"))
def test_backbone_yaml_builds_and_runs_on_the_meta_device(channels, backbone, composed):
    config = parse(composed(f"backbone={backbone}"))
    sizes = {"auto": 8, "unet_xs": 8, "unet_s": 28, "unet_m": 32, "ddpmpp_cifar10": 32, "ncsnpp_cifar10": 32}
    size = (sizes | {"adm_lsun256": 256}).get(backbone, 64)
    with torch.device("meta"):
        network = registry.build(config.backbone, size, channels, 0)
        assert network(torch.empty(2, channels, size, size), torch.empty(2)).shape == (2, channels, size, size)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("steps=0", "steps: .*greater than or equal to 1"),
        ("seed=-1", "seed: "),
        ("batch_size=10.5", "batch_size: "),
        ("micro_batch=5", "batch_size 128 must divide by micro_batch 5"),
        ("budget=soon", "can't read budget; got 'soon'; allowed: a time, as 30m, 8h or 2d, or a number of images"),
        ("teacher_budget=5m", "teacher_budget is a share of budget"),
        ("save_every=soon", "save_every='soon' is neither"),
        ("precision=fp8", "precision: input should be 'auto', 'fp32', 'tf32', 'bf16' or 'fp16'"),
        ("ema.decay=1.0", "ema.decay: .*less than 1"),
        ("optimizer.betas=[0.9]", "optimizer.betas"),
        ("objective.solver=rk4", "objective.solver: input should be 'euler' or 'heun'"),
        ("noise.sigma_min=0", "noise.sigma_min: "),
        ("noise.curriculum.num_scales=1", "noise.curriculum.num_scales: "),
        ("noise.proposal.name=unifrom", "unknown proposal.*allowed: lognormal, uniform.*uniform"),
        ("+objective.solvr=heun", "unknown key objective.solvr.*did you mean solver"),
        ("+backbone._target_=os.system", "unknown key backbone._target_"),
        ("backbone.name=os.system", "unknown backbone; got 'os.system'"),
        ("dataset.conditional=1", "dataset.conditional: "),
    ],
)
def test_parse_names_the_wrong_key(override, message, composed):
    with pytest.raises(InputError, match=message) as error:
        parse(composed(override))
    assert "\n" not in str(error.value)


def test_save_interval_reads_steps_and_minutes():
    assert save_interval(100) == (100, None)
    assert save_interval("100") == (100, None)
    assert save_interval("15m") == (None, 900.0)
    for bad in (0, -5, "m", "1h", "", "15 minutes"):
        with pytest.raises(ValueError, match="neither steps"):
            save_interval(bad)


@pytest.mark.parametrize(
    ("images", "batch", "decay"), [(500000, 512, 0.99929), (50e6, 4096, 0.9999432), (3.55e6, 512, 0.9999)]
)
def test_decay_can_be_a_half_life_in_images(images, batch, decay, composed):
    """Karras et al. 2022's and Song et al. 2023's values; the batch size is the run's own."""
    config = parse(composed("mode=ct", "ema=half_life", f"batch_size={batch}", f"ema.half_life_images={images}"))
    assert config.ema.decay == decay
    assert config.ema.half_life_images is None, "a run of a version that knew only decays must be the same run"


@pytest.mark.parametrize(
    ("arguments", "decay"),
    [
        (["experiment=cifar10-edm"], 0.99929),
        (["experiment=cifar10-edm", "batch_size=1024"], 0.99858),
        ([], 0.99711),  # an eighth of the run
        (["ema.half_life_images=1e5"], 0.999113),
        (["dataset=cifar10", "ema.half_life_images=null", "ema.decay=0.5"], 0.5),
        (["dataset=cifar10", "+ema.decay=0.5"], 0.5),
        (["ema.half_life_images=1e-3"], 0.0),
        (["ema.half_life_images=1e12", "batch_size=1"], 1 - 6.93e-13),
    ],
)
def test_decay_is_the_last_of_decay_and_half_life_to_be_set(arguments, decay, composed):
    config = parse(composed("mode=edm", *arguments))
    assert (config.ema.decay, config.ema.half_life_images) == (decay, None)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["ema.decay=0.9", "ema.half_life_images=5e5"], "say one thing; got '0.9, 500000.0'"),
        (["ema.decay=null", "ema.half_life_images=null"], "say one thing; got 'None, None'.*set one of them"),
        (["ema.half_life_images=0"], "ema.half_life_images: input should be greater than 0"),
        (["ema.half_life_images=many"], "ema.half_life_images: input should be a valid number"),
        (["ema.half_life_images=1e13"], "ema.half_life_images: input should be less than"),
        (
            ["ema.decay=${half_life:500000}"],
            "half_life.* is a key now; fix: ema.half_life_images=500000",
        ),  # as it was written once
    ],
)
def test_decay_and_half_life_are_one_setting(overrides, message, composed):
    with pytest.raises(InputError, match=message):
        parse(composed(*overrides))


def test_config_that_sets_decay_or_half_life_sets_the_other_to_null():
    """Or what comes later in the defaults list would not overrule what came before."""
    for path in CONF.rglob("*.yaml"):
        values = OmegaConf.load(path)
        ema = values if path.parent.name == "ema" else values.get("ema") or {}
        given = [ema[key] for key in ("decay", "half_life_images") if key in ema]
        assert not given or sorted(value is None for value in given) == [False, True], path


def stated(path):
    """The plain values in a file of conf/, without its list of defaults."""
    values = OmegaConf.to_container(OmegaConf.load(CONF / path))
    return {key: value for key, value in values.items() if key not in ("defaults", "hydra")}


@pytest.mark.parametrize(
    ("path", "group", "kind"),
    [
        *((f"optimizer/{name}.yaml", None, "optimizer") for name in ("adam", "radam")),
        *((f"ema/{name}.yaml", None, "decay") for name in ("constant", "warmup")),
        *((f"mode/{mode}.yaml", "objective", "objective") for mode in ("cd", "ect", "edm", "sct")),
        ("backbone/edm2_xs.yaml", None, "backbone"),
        *((f"noise/{name}.yaml", "proposal", "proposal") for name in ("lognormal", "uniform")),
        *((f"noise/{name}.yaml", "curriculum", "curriculum") for name in ("uniform", "ct", "ict")),
    ],
)
def test_what_yaml_shows_is_what_a_component_does_unasked(path, group, kind):
    """A value stands in YAML, for a user to see, and in the class, for Python and for stored runs that lack the key.

    But for what is settled by the data, whose default in the class is the published one.
    """
    values = stated(path) if group is None else stated(path)[group]
    fields = registry.find(kind, values["name"]).Config.model_fields
    values = {key: fields[key].default if value == "auto" else value for key, value in values.items()}
    assert registry.settings(kind, values) == registry.settings(kind, {"name": values["name"]})
    assert values.keys() == registry.find(kind, values["name"]).Config.model_fields.keys(), "all of it is shown"


@pytest.mark.parametrize("name", options("backbone"))
def test_backbone_yaml_shows_all_that_its_class_takes(name):
    values = stated(f"backbone/{name}.yaml")
    assert values.keys() == registry.find("backbone", values["name"]).Config.model_fields.keys()


def test_what_yaml_shows_is_what_a_run_does_unasked():
    shown = stated("train.yaml")
    for key, field in RunConfig.model_fields.items():
        # Made of what the data are called, and chosen from groups.
        if not field.is_required() and key not in ("data_name", "metrics", "features"):
            assert shown[key] == field.default, key
    assert typed(SamplingConfig, shown["sampling"]) == SamplingConfig()
    for path in (CONF / "noise").iterdir():
        for key, value in stated(f"noise/{path.name}").items():
            if key not in ("proposal", "curriculum"):
                assert value == NoiseConfig.model_fields[key].default, (path, key)
    for path in (CONF / "tracking").iterdir():
        assert typed(TrackingConfig, stated(f"tracking/{path.name}")) == TrackingConfig(backend=path.stem)


def test_integers_may_be_written_with_an_exponent(composed):
    words = ["steps=1e5", "batch_size=2e3", "optimizer.warmup_steps=1e2", "save_every=1e3", "backbone.channels=1.6e1"]
    config = parse(composed("mode=ict", "noise.curriculum.s1=1e3", "name=1e3", *words))
    assert config.name == "1e3"
    found = [config.steps, config.batch_size, config.optimizer.warmup_steps, config.save_every]
    found += [config.backbone.channels, config.noise.curriculum.s1]
    assert found == [100000, 2000, 100, 1000, 16, 1000] and all(type(value) is int for value in found)
    for wrong in ("steps=100.5", "steps=1e17", "steps=true", "deterministic=1e0"):
        with pytest.raises(InputError, match=wrong.split("=")[0]):
            parse(composed("mode=ict", wrong))

"""What cm-eval does: models, or images that are there, measured against real ones; their numbers, and a page."""

import os
from pathlib import Path

import torch
from omegaconf import DictConfig
from rich.console import Console

from ..core.errors import ExitCode, InputError
from ..core.files import write_whole
from ..core.progress import progress
from ..core.signals import Stopped
from ..core.terminal import is_quiet, say
from ..data.datasets.base import Dataset
from ..data.pixels import grid
from ..evaluation import measure
from ..evaluation.comparison import Comparison
from ..evaluation.drawing import Drawing
from ..evaluation.neighbours import with_nearest
from ..evaluation.page import Shown, page
from ..evaluation.protocol import ENOUGH, ROUNDING, ModelFacts, Protocol, SamplesFacts, versions
from ..evaluation.result import EVAL, Result, read_result
from ..evaluation.seen import Seen, look
from ..evaluation.table import as_table
from .evaluation_config import EvalConfig, parse
from .evaluation_models import Model, load, models_of
from .evaluation_reference import compare, compare_samples
from .sample_folder import writing

PAGE = "eval.html"
_MOST_IMAGES = 2048  # a number is of, where nobody says
_SHOWN, _WITH_NEAREST = 64, 8  # images of a result on its page
_FEW = f"fewer than {ENOUGH:,} images are too few to compare models by"


def evaluate(cfg: DictConfig) -> ExitCode:
    """The command on its composed config; its exit code."""
    config = parse(cfg)
    try:
        if config.samples is None:
            _evaluate_models(config)
        else:
            _evaluate_samples(config, config.samples)
    except Stopped as stopped:
        say(str(stopped) or "stopped; what was measured before is kept, and the same command goes on")
        return ExitCode.STOPPED
    return ExitCode.DONE


def _evaluate_models(config: EvalConfig) -> None:
    models = models_of(config)
    comparison = compare(config, models)
    several = len(models) > 1
    name = models[0].label + (f"-and-{len(models) - 1}-more" if several else "")
    out = _out(config, name)
    shown = [_model_measured(config, m, comparison, out / m.label if several else out) for m in models]
    _finish(out, shown, name)


def _model_measured(config: EvalConfig, model: Model, comparison: Comparison, place: Path) -> Shown:
    """One model's result, from `place` where it is there already."""
    drawing = load(config, model)
    num = _num(config, comparison)
    starts = range(config.seed, config.seed + config.blocks * num, num)
    of = ModelFacts(
        ckpt=model.run,
        step=model.manifest.step,
        weights=config.weights,
        sha256=model.sha256(config.weights),
        seeds=[f"{start}-{start + num - 1}" for start in starts],
        sampler=drawing.name,
        sigmas=drawing.levels,
        network_calls=drawing.network_calls,
        labels=_labels_in_words(drawing),
        guidance=config.guidance,
        precision=config.precision,
    )
    spread = f"{config.blocks} blocks of seeds" if config.blocks > 1 else "none: one block of seeds"
    protocol = _protocol(config, comparison, num, spread, of)
    known = _known(place, protocol)
    if known is not None:
        return Shown(known)
    say(f"{model.path}: {config.blocks} x {num:,} images, {drawing.network_calls} network calls each")
    blocks: list[Seen] = []
    images = torch.empty(0)
    with progress(num * config.blocks, "drawing and looking, images") as bar:
        for start in starts:
            seen, some = drawing.look(comparison.extractor, range(start, start + num), 0 if blocks else _SHOWN, bar)
            images = images if blocks else some
            blocks.append(seen)
    metrics, left_out = measure.usable(comparison.metrics, blocks[0], comparison.real)
    numbers = measure.over_blocks(metrics, blocks, comparison.real)
    real, num_real = comparison.numbers_of_real(num)
    notes = [*left_out, *([_FEW] if num < ENOUGH else [])]
    result = Result(metrics=numbers, protocol=protocol, real=real, num_real=num_real, notes=notes)
    with writing(place):
        result.write(place)
    return Shown(result, _pictures(images, blocks[0], comparison))


def _evaluate_samples(config: EvalConfig, path: str) -> None:
    samples, sha256, comparison = compare_samples(config, path)
    out = _out(config, Path(os.path.abspath(path)).name.removesuffix(".npz").removesuffix(".zip"))
    num = len(samples) if isinstance(config.num, str) else config.num
    if num > len(samples):
        raise InputError("there are not as many samples", f"num={num} of {len(samples)}", f"2 to {len(samples)}")
    spread = f"{measure.NUM_HALVES} halves"
    protocol = _protocol(config, comparison, num, spread, SamplesFacts(path=path, sha256=sha256))
    known = _known(out, protocol)
    if known is not None:
        _finish(out, [Shown(known)], path)
        return
    index = torch.arange(num).split(config.batch_size)
    with progress(num, "looking at samples") as bar:
        seen = look(comparison.extractor, (samples.gather(some)[0] for some in index), bar)
    metrics, left_out = measure.usable(comparison.metrics, seen, comparison.real)
    numbers = measure.over_halves(metrics, seen, comparison.real)
    real, num_real = comparison.numbers_of_real(num)
    notes = [*left_out, *([_FEW] if num < ENOUGH else [])]
    result = Result(metrics=numbers, protocol=protocol, real=real, num_real=num_real, notes=notes)
    with writing(out):
        result.write(out)
    images = samples.gather(torch.arange(min(_SHOWN, num)))[0].cpu()
    _finish(out, [Shown(result, _pictures(images, seen, comparison))], path)


def _protocol(
    config: EvalConfig, comparison: Comparison, num: int, spread: str, of: ModelFacts | SamplesFacts
) -> Protocol:
    settings = {name: metric.model_dump(exclude={"name"}) for name, metric in config.metrics.items()}
    return Protocol(
        name=config.protocol,
        num=num,
        spread=spread,
        reference=comparison.reference,
        held_out=comparison.held_out,
        features=comparison.features,
        metrics=settings,
        rounding=ROUNDING,
        of=of,
        versions=versions(comparison.extractor, comparison.metrics),
    )


def _known(place: Path, protocol: Protocol) -> Result | None:
    """The result that is in `place` already, of the very same protocol. Raises InputError where another one is."""
    path = place / EVAL
    if not path.exists():
        return None
    known = read_result(path)
    differences = known.protocol.differences(protocol)
    if known.protocol.metrics.keys() != protocol.metrics.keys():
        differences.append(f"metrics ({', '.join(known.protocol.metrics)} and {', '.join(protocol.metrics)})")
    if known.protocol.of != protocol.of and not differences:
        differences.append(f"what was measured ({known.protocol.of.name} and {protocol.of.name})")
    if differences:
        raise InputError(f"{path} has other numbers: {'; '.join(differences)}", fix="out=... in a folder of its own")
    say(f"{path} is there already")
    return known


def _pictures(images: torch.Tensor, seen: Seen, comparison: Comparison) -> dict[str, torch.Tensor]:
    pictures = {f"The first {len(images)} images": grid(images)}
    if isinstance(comparison.images, Dataset) and comparison.real.seen is not None:
        num = min(_WITH_NEAREST, len(images))
        words = f"The {num} of them that are nearest to real images, and under each its nearest real ones"
        pictures[words] = with_nearest(images, seen, comparison.real.seen, comparison.images, num)
    return pictures


def _finish(out: Path, shown: list[Shown], title: str) -> None:
    """Print the table, and write the page where there is anything new to show."""
    results = [each.result for each in shown]
    table, text = as_table(results), page(title, shown)
    with writing(out):
        if any(each.pictures for each in shown) or not (out / PAGE).exists():
            out.mkdir(parents=True, exist_ok=True)
            write_whole(out / PAGE, text.encode())
    if not is_quiet():
        Console(width=None if Console().is_terminal else 160).print(table)
    of = results[0].protocol
    say(
        f"{of.num:,} images a number, deviations over {of.spread}; features={of.features.name}; "
        f"reference {of.reference.what}" + (f", {of.reference.num:,} images" if of.reference.num else "")
    )
    for note in dict.fromkeys(note for result in results for note in result.notes):
        say(f"note: {note}")
    say(f"wrote {out / PAGE}")


def _out(config: EvalConfig, name: str) -> Path:
    return Path("evaluations") / name if config.out is None else Path(os.path.expanduser(config.out))


def _num(config: EvalConfig, comparison: Comparison) -> int:
    usual = min(comparison.reference.num or _MOST_IMAGES, _MOST_IMAGES)
    return usual if isinstance(config.num, str) else config.num


def _labels_in_words(drawing: Drawing) -> str | None:
    if not drawing.denoiser.config.num_classes:
        return None
    return "drawn from the seeds" if drawing.labels is None else f"{', '.join(map(str, drawing.labels))}, in turn"

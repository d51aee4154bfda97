"""What cm-eval does: models, or images that are there, measured against real ones; their numbers, and a page."""

import hashlib
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
from ..evaluation import measure
from ..evaluation.comparison import Comparison
from ..evaluation.drawing import Drawing
from ..evaluation.metrics.base import Metric
from ..evaluation.page import Shown, page
from ..evaluation.pictures import read_pictures, write_pictures
from ..evaluation.protocol import ENOUGH, ROUNDING, ModelFacts, Protocol, SamplesFacts, versions
from ..evaluation.result import EVAL, Number, Result, read_result
from ..evaluation.seen import Seen, look
from ..evaluation.table import as_table
from .evaluation_config import EvalConfig, parse
from .evaluation_models import Model, load, models_of
from .evaluation_protocol import check_follows
from .evaluation_reference import compare, compare_samples
from .sample_folder import writing

PAGE, HOME = "eval.html", Path("evaluations")
_MOST_IMAGES = 2048  # a number is of, where nobody says
_SHOWN = 64  # images of a result on its page
_FEW = f"fewer than {ENOUGH:,} images are too few to compare models by"


def evaluate(cfg: DictConfig) -> ExitCode:
    """The command on its composed config; its exit code."""
    config = parse(cfg)
    check_follows(config)
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
    labels = [model.label for model in models]
    name, several = labels[0], len(labels) > 1
    if several:  # a table of its own for each choice of models
        name += f"-and-{len(labels) - 1}-more-{hashlib.sha256(' '.join(labels).encode()).hexdigest()[:6]}"
    out = _folder(config, name)
    beside = HOME if config.out is None else out  # where each of several has a folder of its own
    comparison = compare(config, models)
    shown = [_model_measured(config, m, comparison, beside / m.label if several else out) for m in models]
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
    spread = f"{config.blocks} blocks of seeds" if config.blocks > 1 else "nothing: one block of seeds"
    protocol = _protocol(config, comparison, num, spread, of)
    if (known := _known(place, protocol)) is not None:
        return known
    _make(place)
    calls = f"{drawing.network_calls} network call{'s' * (drawing.network_calls > 1)}"
    say(f"{model.path}: {config.blocks} x {num:,} images, {calls} each")
    blocks: list[Seen] = []
    images = torch.empty(0)
    with progress(num * config.blocks, "drawing and looking, images") as bar:
        for start in starts:
            seen, some = drawing.look(comparison.extractor, range(start, start + num), 0 if blocks else _SHOWN, bar)
            images = images if blocks else some
            blocks.append(seen)
    metrics, left_out = measure.usable(comparison.metrics, blocks[0], comparison.real)
    numbers = measure.over_blocks(metrics, blocks, comparison.real)
    return _written(place, protocol, comparison, numbers, left_out, images, blocks[0])


def _evaluate_samples(config: EvalConfig, path: str) -> None:
    out = _folder(config, Path(os.path.abspath(path)).name.removesuffix(".npz").removesuffix(".zip"))
    samples, sha256, comparison = compare_samples(config, path)
    num = len(samples) if isinstance(config.num, str) else config.num
    if num > len(samples):
        raise InputError("there are not as many samples", f"num={num} of {len(samples)}", f"2 to {len(samples)}")
    spread = f"{measure.NUM_HALVES} halves"
    protocol = _protocol(config, comparison, num, spread, SamplesFacts(path=path, sha256=sha256))
    shown = _known(out, protocol)
    if shown is None:
        _make(out)
        index = torch.arange(num).split(config.batch_size)
        with progress(num, "looking at samples") as bar:
            seen = look(comparison.extractor, (samples.gather(some)[0] for some in index), bar)
        metrics, left_out = measure.usable(comparison.metrics, seen, comparison.real)
        numbers = measure.over_halves(metrics, seen, comparison.real)
        images = samples.gather(torch.arange(min(_SHOWN, num)))[0].cpu()
        shown = _written(out, protocol, comparison, numbers, left_out, images, seen)
    _finish(out, [shown], path)


def _written(
    place: Path,
    protocol: Protocol,
    comparison: Comparison,
    numbers: dict[str, Number],
    left_out: list[str],
    images: torch.Tensor,
    seen: Seen,
) -> Shown:
    """A result and its pictures, in `place`."""
    real, num_real = comparison.numbers_of_real(protocol.num)
    notes = [*left_out, *([_FEW] if protocol.num < ENOUGH else [])]
    result = Result(metrics=numbers, protocol=protocol, real=real, num_real=num_real, notes=notes)
    with writing(place):
        write_pictures(place, images, seen, comparison)
        result.write(place)
    return Shown(result, read_pictures(place))


def _protocol(
    config: EvalConfig, comparison: Comparison, num: int, spread: str, of: ModelFacts | SamplesFacts
) -> Protocol:
    metrics: list[Metric] = comparison.metrics
    return Protocol(
        name=config.protocol,
        num=num,
        spread=spread,
        reference=comparison.reference,
        held_out=comparison.held_out,
        features=comparison.features,
        metrics={name: metric.settings() for name, metric in zip(config.metrics, metrics, strict=True)},
        rounding=ROUNDING,
        of=of,
        versions=versions(comparison.extractor, metrics),
    )


def _known(place: Path, protocol: Protocol) -> Shown | None:
    """The result that is in `place` already, of the very same protocol. Raises InputError where another one is."""
    path = place / EVAL
    if not path.exists():
        return None
    known = read_result(path)
    differences = known.protocol.differences(protocol)
    if known.protocol.metrics.keys() != protocol.metrics.keys():
        differences.append(f"metrics ({', '.join(known.protocol.metrics)} and {', '.join(protocol.metrics)})")
    differences += known.protocol.of.differences(protocol.of)
    if differences:
        raise InputError(f"{path} has other numbers: {'; '.join(differences)}", fix="out=... in a folder of its own")
    say(f"{path} is there already")
    return Shown(known, read_pictures(place))


def _finish(out: Path, shown: list[Shown], title: str) -> None:
    """Print the table, and write the page."""
    results = [each.result for each in shown]
    table, text = as_table(results), page(title, shown)
    with writing(out):
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


def _make(folder: Path) -> None:
    """Before anything is drawn for it. Raises InputError where it can't be made."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)


def _folder(config: EvalConfig, name: str) -> Path:
    return HOME / name if config.out is None else Path(os.path.expanduser(config.out))


def _num(config: EvalConfig, comparison: Comparison) -> int:
    usual = min(comparison.reference.num or _MOST_IMAGES, _MOST_IMAGES)
    return usual if isinstance(config.num, str) else config.num


def _labels_in_words(drawing: Drawing) -> str | None:
    if not drawing.denoiser.config.num_classes:
        return None
    return "drawn from the seeds" if drawing.labels is None else f"{', '.join(map(str, drawing.labels))}, in turn"

"""How numbers went over a run's training: a curve a metric, drawn as SVG, where several checkpoints were measured."""

from collections import defaultdict
from collections.abc import Sequence
from html import escape

from .protocol import ModelFacts
from .result import Number, Result

_WIDTH, _HEIGHT = 560, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 70, 20, 28, 34


def curves(results: Sequence[Result]) -> list[str]:
    """HTML: for each metric its values over the steps of a run; empty where no run has two checkpoints among them."""
    runs: dict[tuple[str, str, int], list[tuple[int, Result]]] = defaultdict(list)
    for result in results:
        of = result.protocol.of
        if isinstance(of, ModelFacts):
            runs[of.ckpt, of.weights, of.network_calls].append((of.step, result))
    found = []
    for (ckpt, weights, calls), points in runs.items():
        steps = sorted(points, key=lambda point: point[0])
        if len({step for step, _ in steps}) < 2:
            continue
        found.append(f"<h2>Over training: {escape(ckpt)}, {escape(weights)}, {calls} network calls</h2>")
        for name in steps[0][1].metrics:
            values = [(step, result.metrics[name]) for step, result in steps if name in result.metrics]
            if len(values) > 1:
                found.append(_curve(name, values))
    return found


def _curve(name: str, points: Sequence[tuple[int, Number]]) -> str:
    steps = [step for step, _ in points]
    low = min(number.mean - (number.std or 0) for _, number in points)
    high = max(number.mean + (number.std or 0) for _, number in points)
    span = high - low or abs(high) or 1.0
    wide, tall = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM

    def x(step: int) -> float:
        return _LEFT + wide * (step - steps[0]) / (steps[-1] - steps[0])

    def y(value: float) -> float:
        return _TOP + tall * (high - value) / span

    marks = []
    for step, number in points:
        if number.std:
            top, bottom = y(number.mean + number.std), y(number.mean - number.std)
            marks.append(f'<path d="M{x(step):.1f} {top:.1f}V{bottom:.1f}" stroke="#6a8caf"/>')
        marks.append(
            f'<circle cx="{x(step):.1f}" cy="{y(number.mean):.1f}" r="3.5" fill="#1f4e79">'
            f"<title>step {step}: {number}</title></circle>"
        )
    line = " ".join(f"{x(step):.1f},{y(number.mean):.1f}" for step, number in points)
    ticks = "".join(
        f'<text x="{_LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.3g}</text>'
        f'<path d="M{_LEFT} {y(value):.1f}H{_WIDTH - _RIGHT}" stroke="#e4e4e4"/>'
        for value in (low, (low + high) / 2, high)
    )
    ends = "".join(
        f'<text x="{x(step):.1f}" y="{_HEIGHT - 10}" text-anchor="{anchor}">step {step}</text>'
        for step, anchor in ((steps[0], "start"), (steps[-1], "end"))
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" font-family="system-ui, sans-serif" font-size="12" '
        f'fill="#444"><text x="{_LEFT}" y="16" font-weight="600">{escape(name)}</text>{ticks}{ends}'
        f'<polyline points="{line}" fill="none" stroke="#1f4e79" stroke-width="1.5"/>{"".join(marks)}</svg>'
    )

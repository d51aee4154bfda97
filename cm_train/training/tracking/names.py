"""The groups of what a run logs, as trackers show them: one word in front of a name."""

_OF_EVERY_GROUP = ("step", "images", "epoch")  # what curves are drawn over
_OF_PREVIEWS = ("agreement_", "samples")
_OF_EVALUATIONS = "eval_"
_OF_A_MACHINE = ("_s", "_gib")  # how fast, how long, how much memory


def group(name: str) -> str | None:
    """The group of a name in metrics.jsonl: train, perf (what no two runs have alike), preview or eval; None: none."""
    if name in _OF_EVERY_GROUP:
        return None
    if name.startswith(_OF_EVALUATIONS):
        return "eval"
    if name.startswith(_OF_PREVIEWS):
        return "preview"
    return "perf" if name.endswith(_OF_A_MACHINE) else "train"


def shown(name: str) -> str:
    """The name that trackers show, as "train/loss" for "loss", and "eval/kid" for "eval_kid"."""
    found = group(name)
    return name if found is None else f"{found}/{name.removeprefix(_OF_EVALUATIONS)}"

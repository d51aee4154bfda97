"""The keys of cm-eval."""

from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field, SerializeAsAny, field_validator

from ..core import plugins
from ..core.errors import InputError
from ..core.settings import Count, Settings, Text, typed
from ..evaluation.metrics.base import MetricConfig


class EvalConfig(Settings):
    """What is measured, against what, and how."""

    ckpt: list[Text]
    samples: Text | None
    checkpoints: Literal["newest", "all"]
    reference: Text | None
    held_out: Text | None
    metrics: dict[str, SerializeAsAny[MetricConfig]]
    features: dict[str, Any]  # typed once the reference is known, on which `auto` hangs
    protocol: str | None
    num: Annotated[int, Field(ge=2)] | Literal["auto"]
    blocks: Annotated[int, Field(ge=1, le=1000)]
    seed: Annotated[int, Field(ge=0)]
    steps: Count | None
    sigmas: list[float] | None
    sampler: str
    weights: Text
    labels: int | str | list[int | str] | None
    guidance: Annotated[float, Field(ge=0)]
    precision: Literal["fp32", "tf32", "bf16", "fp16"]
    batch_size: Count
    device: str
    out: Text | None
    plugins: list[Text] = []

    @field_validator("sampler")
    @classmethod
    def _is_known(cls, value: str) -> str:
        from ..sampling.choosing import check_sampler

        check_sampler(value)
        return value

    def model_post_init(self, _: object) -> None:
        if not self.metrics:
            raise ValueError("metrics is empty")
        if bool(self.ckpt) == (self.samples is not None):
            what = "cm-eval measures a run (cm-eval runs/x) or images that are there (samples=...)"
            raise InputError(what, "both" if self.ckpt else "neither", "one of them")
        if self.samples is not None and self.checkpoints == "all":
            raise InputError("checkpoints=all is of a run", f"samples={self.samples}", fix="cm-eval runs/x")


def parse(cfg: DictConfig) -> EvalConfig:
    """The typed config of a composed one. Raises InputError."""
    try:
        values: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise InputError(str(error).splitlines()[0]) from None
    plugins.load(plugins.names_in(values))  # before the config is typed, which may name parts of theirs
    values["ckpt"] = _several(values.get("ckpt"))
    return typed(EvalConfig, values, as_written=True)


def _several(given: Any) -> Any:
    """One path or several: "[runs/a,runs/b]" is how the command line has a list of them."""
    if given is None:
        return []
    if isinstance(given, str) and given.startswith("[") and given.endswith("]"):
        return [part.strip() for part in given[1:-1].split(",")]
    return [given] if isinstance(given, str) else given

"""Which network, batch and number of images suit a set of images: sizes, in plain numbers."""

from typing import Any

from ..data.datasets.base import Facts

AUTO = "auto"
Values = dict[str, Any]  # a config as plain values, before it is typed

BATCH, _LARGE_BATCH, _LEAST_BATCH = 128, 256, 16
_MANY_STEPS = 1000  # that a run has at least, as far as its batches can be smaller for it
_TINY = 12  # up to this size 0.4 M parameters do
_MANY, _VERY_MANY = 20_000, 500_000  # colour images, from which on a wider network pays
_IMAGES_A_PIXEL = 32_000  # that a diffusion model trains on at least, times the images' side
_EPOCHS, _MOST = 16, 20  # rather so many epochs, as far as that is no more than so many times the least
_LENGTH = {"cd": 0.6, "scd": 0.6, "sct": 0.6, "ect": 1.25, "ct": 2.0, "ict": 2.5}  # relative to a diffusion model's

NETWORK = (
    *("channels", "channel_mult", "num_blocks", "attention_resolutions"),
    *("head_channels", "group_channels", "scale_shift", "resample_in_block"),
)


def network(data: Facts) -> Values:
    """The sizes of an ADM U-Net for such images, by their side, and wider for many in colour."""
    size = data.image_size
    if size <= _TINY:
        sizes: list[Any] = [24, [1, 2] if size % 2 == 0 else [1], 1, [max(1, size // 2)], 24, 4, False, False]
        return dict(zip(NETWORK, sizes, strict=True))
    levels = 1
    while size / 2 ** (levels - 1) > 8 and size % 2**levels == 0 and levels < 6:
        levels += 1
    many = data.count if data.channels == 3 else data.count // 10
    channels, blocks = (32, 1) if many < _MANY else (64, 2) if many < _VERY_MANY else (128, 3)
    mult = ([1, 1] if levels > 4 else [1]) + [2] * levels
    attention = sorted({size >> level for level in range(levels) if size >> level <= 16})[:2]
    if levels <= 3:  # attention is dear where it is wide
        attention = attention[:1]
    head = min(64, channels)
    return dict(zip(NETWORK, [channels, mult[:levels], blocks, attention, head, 8, True, True], strict=True))


def usual_batch_size(count: int, images: int, steps: object) -> int:
    """A power of two: as usual, but no more than there are images, and in short runs so few that steps are many.

    Args:
        count: images of the set.
        images: that the run trains on, where `steps` is still to be settled.
    """
    usual = _LARGE_BATCH if count >= _VERY_MANY else BATCH
    short = images // _MANY_STEPS if steps == AUTO else usual
    return min(usual, max(_LEAST_BATCH, _power_below(min(short, count))))


def _power_below(number: int) -> int:
    """The largest power of two that is no more than `number`, or 1."""
    return 1 << (max(1, number).bit_length() - 1)


def usual_images(mode: str, data: Facts) -> int:
    """How many images a run trains on where nobody says."""
    least = _IMAGES_A_PIXEL * data.image_size
    return round(_LENGTH.get(mode, 1.0) * min(max(least, _EPOCHS * data.count), _MOST * least))

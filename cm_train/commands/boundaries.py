"""Which images of a request are drawn together: always the same ones, so that an interruption leaves no trace in them.

A batch's shape moves the last bits of what a network computes, and now and then a pixel by one grey level. So batches
begin at the multiples of the request's batch size, wherever drawing stopped, and one of which any image is missing is
drawn again whole. Where a request was enlarged a batch ends too: what was there by then is not drawn in another shape.
"""

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Annotated

from pydantic import Field

MOST_AT_ONCE = 1 << 20

BatchSize = Annotated[int, Field(ge=1, le=MOST_AT_ONCE)]


def batch_of(place: int, num: int, size: int, ends: Sequence[int]) -> range:
    """The places of the batch that `place` belongs to.

    Args:
        num: of the request's images, more than `place`.
        size: of a batch.
        ends: ascending; how many images the request had before it was enlarged, each time.
    """
    start = place - place % size
    i = bisect_right(ends, place)
    return range(max([start, *ends[:i][-1:]]), min([start + size, num, *ends[i:][:1]]))


def unfinished(missing: Iterable[int], num: int, size: int, ends: Sequence[int]) -> list[range]:
    """The batches of which an image is missing, in order; `missing` ascends."""
    batches: list[range] = []
    for place in missing:
        if not batches or place >= batches[-1].stop:
            batches.append(batch_of(place, num, size, ends))
    return batches

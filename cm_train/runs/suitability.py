"""Settings that do not suit the data, said before time is spent on them."""

from collections.abc import Iterator, Mapping

from ..training.config import RunConfig

_PARAMETERS = 4  # for each value in the images: digits have three, and do well
_MANY_EPOCHS = 10_000
_FEW_IMAGES = 2  # of a class


def remarks(
    config: RunConfig, num_images: int, values_an_image: int, num_parameters: int, classes: Mapping[str, int]
) -> Iterator[str]:
    """A sentence for each setting that is rather a slip than a choice.

    Args:
        values_an_image: numbers that an image consists of.
        classes: how many images each has, where there are classes and that is known.
    """
    pixels = num_images * values_an_image
    if num_parameters > _PARAMETERS * pixels:
        more = f"the network has {num_parameters:,} parameters and the images {pixels:,} values"
        yield f"{more}: it can learn them by heart"
    epochs = config.steps * config.batch_size / num_images
    if epochs > _MANY_EPOCHS:
        yield f"each image comes {epochs:,.0f} times; steps= or budget= makes the run shorter"
    few = [name for name, count in classes.items() if 0 < count < _FEW_IMAGES]
    if few:
        some = ", ".join(few[:5]) + (", ..." if len(few) > 5 else "")
        yield f"{len(few):,} classes have one image only ({some}): each is likely to be learnt by heart"

"""Which images are drawn together."""

import itertools
import random

from cm_train.commands.boundaries import batch_of, unfinished


def cut(num, size, ends):
    """The batches, by cutting the line of all places wherever there is a cut."""
    cuts = sorted({0, num} | set(range(0, num, size)) | {end for end in ends if end < num})
    return [range(a, b) for a, b in itertools.pairwise(cuts)]


def test_batches_lie_between_multiples_of_their_size_and_the_ends():
    assert cut(20, 8, [5]) == [range(0, 5), range(5, 8), range(8, 16), range(16, 20)]
    dice = random.Random(0)
    for _ in range(300):
        num, size = dice.randrange(1, 60), dice.randrange(1, 70)
        ends = sorted({dice.randrange(1, 80) for _ in range(dice.randrange(4))})
        batches = cut(num, size, ends)
        assert [batch_of(place, num, size, ends) for place in range(num)] == [b for b in batches for _ in b]
        missing = sorted(dice.sample(range(num), dice.randrange(num + 1)))
        assert unfinished(missing, num, size, ends) == [b for b in batches if set(b) & set(missing)]


def test_a_request_that_was_enlarged_has_its_old_batches_still():
    for num, size, more in ((45, 8, 60), (48, 8, 60), (3, 256, 1000), (1000, 7, 1001)):
        assert cut(more, size, [num])[: len(cut(num, size, []))] == cut(num, size, [])


def test_batches_of_a_huge_request_cost_nothing():
    assert unfinished([5], 10**30, 8, [10**29]) == [range(0, 8)]

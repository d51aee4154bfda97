"""How fast this machine computes, for what is estimated rather than measured."""

import time

import torch

_SHARE = 0.3  # of what a large product reaches that a network's training step does
_SIZE_ON_CPU, _SIZE_ON_GPU, _TIMES = 1024, 8192, 4


def flops_per_second() -> float:
    """What a training step may reach here, in floating-point operations a second: a share of a large product's."""
    on_gpu = torch.cuda.is_available()
    kind = torch.bfloat16 if on_gpu else torch.float32
    size = _SIZE_ON_GPU if on_gpu else _SIZE_ON_CPU
    a = torch.ones(size, size, dtype=kind, device="cuda" if on_gpu else "cpu")
    took = []
    for _ in range(_TIMES):
        began = time.monotonic()
        a @ a
        if on_gpu:
            torch.cuda.synchronize()
        took.append(time.monotonic() - began)
    return _SHARE * 2 * size**3 / min(took)

"""Classifier-free guidance: a class-conditional diffusion model pushed away from what it makes of no class."""

import torch
from torch import Tensor, nn

from ..core.errors import InputError
from ..models.denoiser import Denoiser, DenoiserConfig


class Guided(nn.Module):
    """D_null + guidance (D_label - D_null), Ho & Salimans 2022, in the place of a denoiser.

    The weights of both sum to 1, so this guides the ODE's slope and TrigFlow's velocity just the same.

    Args:
        denoiser: a diffusion model that was trained with label dropout.
        guidance: 0 without the class, 1 plain, above 1 towards the class. (LCM's w is guidance - 1.)

    Raises:
        InputError: the model can't be guided.
    """

    def __init__(self, denoiser: Denoiser, guidance: float):
        super().__init__()
        if denoiser.config.kind != "diffusion":  # a student was distilled from a guided teacher or was not
            raise InputError("only a diffusion model can be guided", f"guidance={guidance}", "1", "drop guidance=")
        if not denoiser.config.null_label:
            raise InputError(
                "guidance needs a class-conditional model that was trained with label dropout",
                f"guidance={guidance}",
                "1 for this one",
                "train a teacher with mode=edm dataset.conditional=true label_dropout=0.1",
            )
        self.denoiser, self.guidance = denoiser, guidance

    @property
    def config(self) -> DenoiserConfig:
        """The guided denoiser's."""
        return self.denoiser.config

    def forward(self, x: Tensor, sigma: Tensor, labels: Tensor) -> Tensor:
        """The denoised images [B, C, H, W] for labels int64 [B]; see `Denoiser.forward`."""
        sigma = sigma.expand(x.shape[0])
        null = torch.full_like(labels, self.config.num_classes)
        both = self.denoiser(torch.cat([x, x]), torch.cat([sigma, sigma]), torch.cat([null, labels]))
        without, within = both.chunk(2)
        return without + self.guidance * (within - without)


def guided(denoiser: Denoiser | Guided, guidance: float | None) -> Denoiser | Guided:
    """`denoiser` under `guidance`; itself where that is None, or 1, which saves a network call.

    Raises:
        InputError: it can't be guided, or is already.
    """
    if guidance is None:
        return denoiser
    if isinstance(denoiser, Guided):
        fix = "drop guidance=, or pass the model inside, `.denoiser`"
        raise InputError(f"this model is guided already, by {denoiser.guidance}", f"guidance={guidance}", fix=fix)
    return denoiser if guidance == 1 else Guided(denoiser, guidance)

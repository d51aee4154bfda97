"""A loss's weights by noise level, learnt beside the network."""

from torch import Tensor, nn

from ..models.backbones.base import autocast_off, sinusoidal_embedding
from ..models.denoiser import Denoiser

_WIDTH = 128  # of the embedding of the noise level


class LearnedWeighting(nn.Linear):
    """exp(w(sigma)) L - w(sigma), whose minimum over w is at -ln E[L | sigma]: every noise level then counts alike.

    Lu & Song 2024 (sCM), eq. 8. The same as Karras et al. 2024 (EDM2), eq. 21 with u(sigma) = -w(sigma), after Kendall
    et al. 2018: u is the logarithm of the loss that is to be expected, the network's uncertainty. Linear in sines and
    cosines of ln(sigma), and 0 at the start; EDM2's layer of random features has rows of fixed length, by which u
    can't grow.

    Args:
        denoiser: on whose device it lies.
    """

    def __init__(self, denoiser: Denoiser):
        super().__init__(_WIDTH, 1, device=next(denoiser.parameters()).device)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def w(self, sigma: Tensor) -> Tensor:
        """w for noise levels sigma [B]."""
        with autocast_off(sigma):
            return self(sinusoidal_embedding(sigma.log(), _WIDTH)).flatten()

    def weighted(self, loss: Tensor, sigma: Tensor) -> Tensor:
        """The weighted loss of each image, for its own loss [B] and noise level sigma [B]."""
        w = self.w(sigma).to(loss.dtype)
        return w.exp() * loss - w

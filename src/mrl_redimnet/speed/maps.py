"""Feature maps: sums in place, from the fewest frames to the most, as coarse sums are repeated and not coarse maps;
norms that keep less.
"""

import itertools

import torch

from modeling_mrl_redimnet import MapMix, MapNorm
from mrl_redimnet.speed.recompute import recomputed


class FastMapMix(MapMix):
    """`MapMix` in one pass over each map."""

    def forward(self, maps: list[torch.Tensor]) -> torch.Tensor:
        """As `MapMix.forward`, to the rounding of sums."""
        weights = self.logits.softmax(0)
        repeats = [later // earlier for earlier, later in itertools.pairwise(self.strides)] + [1]
        mixed: torch.Tensor | None = None
        split: tuple[int, ...] = ()
        for x, weight, repeat in reversed(list(zip(maps, weights, repeats, strict=True))):
            split = (*split, repeat) if repeat > 1 else split
            x, weight = x.unflatten(1, (-1, *split)) if split else x, weight.to(x.dtype)
            if mixed is None:
                mixed = x * weight
            elif repeat > 1:
                mixed = torch.addcmul(mixed.unsqueeze(-2), x, weight)
            else:
                mixed.addcmul_(x, weight)  # in place: nothing needs the partial sums again
        return mixed.flatten(1, -2)  # type: ignore[union-attr]  # there is at least one map


class FastMapNorm(MapNorm):
    """Differences from the mean are computed again in the backward pass."""

    def squares(self, x: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
        """As `MapNorm.squares`."""

        def differences() -> torch.Tensor:
            return x - mean

        return recomputed(torch.square, differences(), differences)


FAST = {MapMix: FastMapMix, MapNorm: FastMapNorm}

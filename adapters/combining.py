"""Several adapters into one: the methods behind `AdapterBank.combine`."""

import math

import torch
from peft.utils import merge_utils
from torch import nn

from mrl_redimnet.adapters.placement import adapted_layers
from mrl_redimnet.adapters.strategies import truncated

FACTOR_METHODS = {
    "linear": lambda tensors, weights, density: merge_utils.task_arithmetic(tensors, weights),
    "ties": merge_utils.ties,
    "dare_linear": merge_utils.dare_linear,
    "dare_ties": merge_utils.dare_ties,
    "magnitude_prune": merge_utils.magnitude_prune,
}
METHODS = ("cat", "svd", *FACTOR_METHODS, *(f"{name}_svd" for name in FACTOR_METHODS if name != "linear"))


def lora_factors(encoder: nn.Module, name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Copies of each layer's A [r, in, ...] and B [out, r, ...], and its scaling."""
    return {
        layer: (
            part.lora_A[name].weight.detach().clone(),
            part.lora_B[name].weight.detach().clone(),
            part.scaling[name],
        )
        for layer, part in adapted_layers(encoder, name).items()
    }


def combined(
    factors: list[tuple[torch.Tensor, torch.Tensor, float]],
    weights: list[float],
    method: str,
    rank: int | None,
    density: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's A and B, scaling 1, of several adapters'; see `AdapterBank.combine`."""
    if any(len(down) != up.shape[1] for down, up, _ in factors):
        raise ValueError("convolutions in groups cannot be combined.")
    scales = [weight * scale for weight, (*_, scale) in zip(weights, factors, strict=True)]
    downs, ups = [down.flatten(1) for down, *_ in factors], [up.flatten(1) for _, up, _ in factors]
    rank = rank or max(map(len, downs))
    if method in ("cat", "svd"):
        down, up = torch.cat(downs), torch.cat([up * scale for up, scale in zip(ups, scales, strict=True)], dim=1)
    elif method.endswith("_svd"):
        products = [scale * (up @ down) for up, down, (*_, scale) in zip(ups, downs, factors, strict=True)]
        up = FACTOR_METHODS[method.removesuffix("_svd")](products, torch.tensor(weights).to(products[0]), density)
        down = torch.eye(up.shape[1]).to(up)
    elif len({len(down) for down in downs}) > 1:
        ranks = ", ".join(str(len(down)) for down in downs)
        raise ValueError(f"ranks {ranks} differ; cat, svd and the methods with _svd behind take any.")
    else:  # as PEFT: a root of the weight on either factor, its sign on one
        roots = torch.tensor([abs(scale) ** 0.5 for scale in scales]).to(downs[0])
        signs = torch.tensor([math.copysign(1.0, scale) for scale in scales]).to(downs[0])
        mix = FACTOR_METHODS[method]
        down, up = mix(downs, roots * signs, density), mix(ups, roots, density)
    if method.endswith("svd"):
        down, up, _ = truncated(down, up, rank)
    return down.view(-1, *factors[0][0].shape[1:]), up.view(*up.shape, *factors[0][1].shape[2:])

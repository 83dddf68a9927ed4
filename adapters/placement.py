"""Where adapters sit, and how large they are."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:  # PEFT takes a second to import, which a rule over names does not need
    from peft import LoraConfig
    from peft.tuners.lora import LoraLayer

# Each placement is a rule over module names; PEFT matches it against a module's whole name.
_ATTENTION = r"q_proj|k_proj|v_proj|out_proj"
_FFN = r"ffn_in|ffn_out"
_POINTWISE = r"context\.reduce|context\.expand|context\.layers\.\d+\.(pointwise|widen|narrow)|trunk\.aggregate"
_PROJECTION = r"projection\.segments\.\d+"
_LINEAR = rf"{_ATTENTION}|{_FFN}|{_POINTWISE}|{_PROJECTION}"
_CONV = r"stem\.conv|blocks\.\d+\.(conv|conv1|conv2|other_convs\.\d+)|squeeze\.conv"
_MAPS = r"stages\.\d+\.stride|blocks\.\d+\.(pointwise|pointwise1|pointwise2|bin_gate\.\w+)|squeeze\.pointwise"
_POOLING = r"pooling\.(attention_in|context_in|attention_out)"

PLACEMENTS: dict[str, str] = {
    name: rf"(.*\.)?({rule})"
    for name, rule in {
        "attention": _ATTENTION,
        "attention+ffn": rf"{_ATTENTION}|{_FFN}",
        "pointwise": _POINTWISE,
        "projection": _PROJECTION,
        "linear": _LINEAR,
        "conv": rf"{_LINEAR}|{_CONV}",
        "all": rf"{_LINEAR}|{_CONV}|{_MAPS}|{_POOLING}",
    }.items()
}


def lora_config(
    placement: str = "linear",
    r: int = 8,
    *,
    model: nn.Module | None = None,
    segment_ranks: Sequence[int] = (),
    **options: Any,
) -> "LoraConfig":
    """A LoRA configuration for MRLReDimNetModel: rank `r` at a named placement.

    "attention": q, k, v, out; "attention+ffn": also the transformer's feed-forward; "pointwise": every 1x1 layer of the
    1-D path, which holds most of the weights; "projection": the Matryoshka segments; "linear": all of these; "conv":
    also the ungrouped 2-D convolutions; "all": also striding, 2-D pointwise and pooling layers. The last two need the
    `model`: PEFT cannot fold LoRA into grouped convolutions, so its grouped ones are left out.

    segment_ranks: a rank for each Matryoshka segment of the projection instead of `r`, shortest prefix first; its
    scaling stays that of the other layers. options: further fields of LoraConfig; lora_alpha is 2 r unless given.
    Raises ValueError for an unknown placement, and where a placement needs the model.
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement: got {placement!r}, expected one of {', '.join(PLACEMENTS)}.")
    options = {"lora_alpha": 2 * r, "task_type": "FEATURE_EXTRACTION", **options}  # loads as AutoPeftModelFor...
    if placement in ("conv", "all"):
        if model is None:
            raise ValueError(f"placement {placement!r}: pass model=, whose grouped convolutions are to be left out.")
        options["exclude_modules"] = [*grouped_convolutions(model)] or None
    if len(segment_ranks) and _PROJECTION not in PLACEMENTS[placement]:
        raise ValueError(f"segment_ranks: the placement {placement!r} does not reach the projection's segments.")
    scale = options["lora_alpha"] / r
    for index, rank in enumerate(segment_ranks):
        name = rf"projection\.segments\.{index}"
        options["rank_pattern"] = {**options.get("rank_pattern", {}), name: rank}
        options["alpha_pattern"] = {**options.get("alpha_pattern", {}), name: scale * rank}
    from peft import LoraConfig

    return LoraConfig(target_modules=PLACEMENTS[placement], r=r, **options)


def grouped_convolutions(model: nn.Module) -> Iterator[str]:
    """Names, as in the encoder, of the convolutions of `model` that mix channels only within groups."""
    parts = model.named_modules()
    return (encoder_name(name) for name, part in parts if isinstance(part, nn.Conv2d) and part.groups > 1)


def adapted_layers(model: nn.Module, adapter: str = "default") -> "dict[str, LoraLayer]":
    """The layers of `model` that carry `adapter`, by their name in the encoder ("projection.segments.0")."""
    from peft.tuners.lora import LoraLayer

    return {
        encoder_name(name): part
        for name, part in model.named_modules()
        if isinstance(part, LoraLayer) and adapter in part.r
    }


def encoder_name(name: str) -> str:
    """A module's name without the wrappers around the encoder (PEFT's, a classification head's)."""
    for wrapper in ("base_model.model.", "redimnet."):
        name = name.removeprefix(wrapper)
    return name


def adapter_report(model: nn.Module, adapter: str = "default") -> str:
    """Which layers of `model` train, with how many parameters, as a table; the last line adds up, with size on disk."""
    trained = [p for p in model.parameters() if p.requires_grad]
    total = sum(p.numel() for p in trained)
    size = sum(p.numel() * p.element_size() for p in trained)
    rows, counted = [], 0
    for name, layer in adapted_layers(model, adapter).items():
        count = sum(p.numel() for p in layer.parameters() if p.requires_grad)
        counted += count
        shape = f"{layer.in_features} -> {layer.out_features}"
        rows.append(f"  {name:<44}{shape:>14}  rank {layer.r[adapter]:>3}{count:>12,}")
    everything = sum(p.numel() for p in model.parameters())
    if counted != total:
        rows.append(f"  {'trained whole (norms, classifier ...)':<44}{'':>14}{'':>10}{total - counted:>12,}")
    share = 100 * total / (everything - counted)
    return "\n".join([*rows, f"  {total:,} trainable parameters, {share:.1f} % of the base's; {size / 1e6:.2f} MB"])

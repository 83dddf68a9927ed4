"""The reference implementations beside ours, for benchmarks that are given their checkouts."""

import contextlib
import importlib
from pathlib import Path

import torch
from torch import nn

from configuration_mrl_redimnet import SIZES
from mrl_redimnet.convert import convert_checkpoint
from mrl_redimnet.speed import speed_up

# Of each network: the wrapper's module and name, and the hop in samples, as published.
WRAPPERS = {
    "redimnet": ("redimnet.model", "ReDimNetWrap", 240),
    "redimnet2": ("redimnet2.redimnet2", "ReDimNet2Wrap", 160),
}


def network_of(size: str) -> str:
    """The network that a size in `SIZES` is of."""
    return SIZES[size].get("network", "redimnet")


def refuse_no_checkout(checkout: Path, network: str):
    """Raises ValueError unless the folder is a checkout of IDRnD/redimnet or, of "redimnet2", PalabraAI/redimnet2."""
    module = Path(*WRAPPERS[network][0].split(".")).with_suffix(".py")
    if not (checkout / module).is_file():
        raise ValueError(f"{checkout} is no checkout of the reference implementation of {network} ({module}).")


def reference_arguments(size: str) -> dict:
    """A size as the reference wrapper's keyword arguments: with the published hop, front end and head."""
    ours, network = SIZES[size], network_of(size)
    arguments = dict(
        F=ours["num_mel_bins"],
        C=ours["base_channels"],
        block_1d_type=ours["block_1d"],
        block_2d_type=ours["block_2d"],
        stages_setup=[
            (_stride(s, network), s["blocks"], s["expansion"], [(3, 3)], s["reduction"]) for s in ours["stages"]
        ],
        group_divisor=ours["group_divisor"],
        out_channels=ours.get("aggregation_channels"),
        embed_dim=192,
        hop_length=WRAPPERS[network][2],
        pooling_func="ASTP",
        global_context_att=True,
    )
    return arguments if network == "redimnet" else {**arguments, **_redimnet2_arguments(size)}


def _stride(stage: dict, network: str):
    return stage["frequency_stride"] if network == "redimnet" else (stage["frequency_stride"], stage["time_stride"])


def _redimnet2_arguments(size: str) -> dict:
    ours = SIZES[size]
    groups = ours.get("map_norm_groups")
    if groups not in (None, ours["base_channels"]):
        raise ValueError(f"{size}: {groups} groups of the maps' norms, the reference has base_channels of them.")
    tensorflow = dict(feat_type="tf", spec_params=dict(norm_signal=True)) if ours["front_end"] == "tf_mel" else {}
    return dict(tensorflow, causal="none", compress_tconvs=True, agg_gnorm=groups is not None, return_2d_output=True)


def build_pair(size: str) -> tuple[nn.Module, nn.Module]:
    """The reference with random weights and lived-in batch norms, and its conversion; a size as published.

    The reference's checkout must be on sys.path.
    """
    module, name, _ = WRAPPERS[network_of(size)]
    arguments = reference_arguments(size)
    torch.manual_seed(0)
    with contextlib.redirect_stdout(None):  # one of them prints as it is built
        reference = getattr(importlib.import_module(module), name)(**arguments).eval()
    for part in reference.modules():
        if isinstance(part, (nn.BatchNorm1d, nn.BatchNorm2d)):
            part.running_mean.normal_(0, 0.1)
            part.running_var.uniform_(0.5, 1.5)
    return reference, speed_up(convert_checkpoint({"model_config": arguments, "state_dict": reference.state_dict()}))

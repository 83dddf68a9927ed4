"""The reference implementation beside ours, for benchmarks that are given its checkout."""

import torch
from torch import nn

from configuration_mrl_redimnet import SIZES
from mrl_redimnet.convert import convert_checkpoint

HOP = 240  # samples, as published


def build_pair(size: str) -> tuple[nn.Module, nn.Module]:
    """The reference with random weights and lived-in batch norms, and its conversion; a size as published.

    Its checkout (IDRnD/redimnet) must be on sys.path.
    """
    from redimnet.model import ReDimNetWrap

    ours = dict(SIZES[size])
    stages = [(s["frequency_stride"], s["blocks"], s["expansion"], [(3, 3)], s["reduction"]) for s in ours["stages"]]
    arguments = dict(
        F=ours["num_mel_bins"],
        C=ours["base_channels"],
        block_1d_type=ours["block_1d"],
        block_2d_type=ours["block_2d"],
        stages_setup=stages,
        group_divisor=ours["group_divisor"],
        out_channels=None,
        embed_dim=192,
        hop_length=HOP,
        pooling_func="ASTP",
        global_context_att=True,
    )
    torch.manual_seed(0)
    reference = ReDimNetWrap(**arguments).eval()
    for module in reference.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    return reference, convert_checkpoint({"model_config": arguments, "state_dict": reference.state_dict()})

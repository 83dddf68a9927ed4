"""Records what the reference implementations answer, for tests/test_convert.py.

    python benchmarks/record_reference.py REFERENCE_CHECKOUT tests/data/reference_answers.json
    python benchmarks/record_reference.py REFERENCE2_CHECKOUT tests/data/reference2_answers.json --network redimnet2

REFERENCE_CHECKOUT is a checkout of https://github.com/IDRnD/redimnet, REFERENCE2_CHECKOUT one of
https://github.com/PalabraAI/redimnet2, at the commits below (they need torchaudio and scipy). Weights and waveforms are
rebuilt from names (tests/reference_weights.py), so that the files hold answers only.
"""

import argparse
import importlib
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from reference_weights import WAVEFORM_LENGTHS, nested, reference_tensor, reference_waveform, spread


def stages(*rows: tuple) -> list:
    """(stride, blocks, expansion, reduction) as the references' rows, which also name kernels."""
    return [[stride, blocks, expansion, [[3, 3]], reduction] for stride, blocks, expansion, reduction in rows]


BASE = {
    "F": 24,
    "C": 4,
    "block_1d_type": "conv+att",
    "block_2d_type": "convnext_like",
    "stages_setup": stages((1, 1, 1, None), (2, 1, 1, 8)),
    "group_divisor": 2,
    "out_channels": None,
    "embed_dim": 32,
    "hop_length": 160,
    "pooling_func": "ASTP",
    "feat_type": "pt",
    "global_context_att": True,
    "emb_bn": False,
    "spec_params": {"do_spec_aug": False, "freq_mask_width": [0, 6], "time_mask_width": [0, 8]},
}
PLAIN = {"block_1d_type": "fc", "stages_setup": stages((2, 1, 1, 8))}  # where something else is looked at
EXPANDED = stages((1, 1, 2, None), (2, 1, 2, 8))

CONFIGS = {
    # Blocks
    "convnext_convatt": {"stages_setup": stages((1, 1, 1, 4), (2, 2, 1, None), (3, 1, 1, 2))},
    "convnext_conv": {"block_1d_type": "conv", "group_divisor": 1, "stages_setup": EXPANDED},
    "convnext_conv_ungrouped": {"block_1d_type": "conv", "group_divisor": None},
    "relu_att": {
        "block_1d_type": "att",
        "block_2d_type": "convnext_like_relu",
        "group_divisor": None,
        "stages_setup": EXPANDED,
        "global_context_att": False,
    },
    "relu_fc": {"block_1d_type": "fc", "block_2d_type": "convnext_like_relu", "stages_setup": EXPANDED},
    "resnet_conv": {"block_1d_type": "conv", "block_2d_type": "basic_resnet", "stages_setup": EXPANDED},
    "resnet_att_ungrouped": {"block_1d_type": "att", "block_2d_type": "basic_resnet", "group_divisor": None},
    "fwse_fc": {
        "block_1d_type": "fc",
        "block_2d_type": "basic_resnet_fwse",
        "group_divisor": 4,
        "stages_setup": EXPANDED,
        "emb_bn": True,
    },
    "fwse_ungrouped": {
        **PLAIN,
        "block_2d_type": "basic_resnet_fwse",
        "group_divisor": None,
        "stages_setup": EXPANDED,
    },
    # Shapes
    "fractional_expansion": {"block_1d_type": "fc", "stages_setup": stages((3, 1, 1.5, 8), (2, 1, 0.5, None))},
    "single_stage": {"block_1d_type": "att", "stages_setup": stages((3, 1, 1, 8))},
    "no_1d_blocks": {"stages_setup": stages((1, 1, 1, None), (2, 1, 1, None))},
    "aggregation_att": {"block_1d_type": "att", "out_channels": 40},
    "aggregation_conv": {"block_1d_type": "conv", "block_2d_type": "basic_resnet", "out_channels": 48},
    # Pooling and head
    "pool_tstp": {**PLAIN, "pooling_func": "TSTP"},
    "pool_tap": {**PLAIN, "pooling_func": "TAP", "feat_type": "pt_mel"},
    "pool_tsdp": {**PLAIN, "pooling_func": "TSDP", "out_channels": 40},
    "embedding_norm_tap": {**PLAIN, "pooling_func": "TAP", "emb_bn": True},
    # Front ends
    "spec_mvn": {**PLAIN, "spec_params": {"norm_signal": True, "do_preemph": True, "spec_norm": "mvn"}},
    "spec_bn": {**PLAIN, "spec_params": {"spec_norm": "bn"}},
    "spec_none": {**PLAIN, "spec_params": {"spec_norm": "none"}},
    "hop_240": {**PLAIN, "hop_length": 240},
    "no_preemphasis": {**PLAIN, "spec_params": {"do_preemph": False}},
    "tf": {"feat_type": "tf", "spec_params": {}},
    "tf_mel_embedding_norm": {**PLAIN, "feat_type": "tf_mel", "emb_bn": True},
    "tf_norm_signal": {**PLAIN, "feat_type": "tf", "spec_params": {"norm_signal": True}},
    # So large an eps shows each of the places where it is used.
    "tf_eps": {**PLAIN, "feat_type": "tf", "spec_params": {"norm_signal": True, "eps": 0.03}},
    "tf_hop_240": {
        **PLAIN,
        "feat_type": "tf_mel",
        "hop_length": 240,
        "spec_params": {"do_preemph": False, "eps": 1e-6},
    },
}
# What the reference does with a file that leaves most keys out.
DEFAULTS = {"F": 24, "C": 4, "stages_setup": stages((1, 1, 1, None), (2, 1, 1, 8))}

STAGES2 = stages(([1, 1], 1, 2, 4), ([2, 1], 1, 1, None), ([1, 2], 1, 1, 4), ([2, 2], 1, 0.5, 4))
BASE2 = {
    "F": 24,
    "C": 4,
    "causal": "none",
    "spec_in_channels": 1,
    "block_1d_type": "conv+att",
    "block_2d_type": "basic_resnet",
    "compress_tconvs": True,
    "return_2d_output": True,
    "use_freq_pos_enc": False,
    "fm_weigthing_type": "NC",
    "stages_setup": STAGES2,
    "group_divisor": 1,
    "embed_dim": 32,
    "hop_length": 160,
    "pooling_func": "ASTP",
    "feat_type": "tf",
    "global_context_att": True,
    "emb_bn": False,
    "spec_params": {"do_spec_aug": False, "do_preemph": True, "norm_signal": True},
}
PLAIN2 = {"block_1d_type": "fc", "stages_setup": stages(([2, 2], 1, 1, 8))}

CONFIGS2 = {
    # Blocks
    "convatt_dual_normed": {"dual_agg": True, "agg_gnorm": True},
    "conv_convnext": {"block_1d_type": "conv", "block_2d_type": "convnext_like", "agg_gnorm": True, "out_channels": 5},
    "att_fwse": {"block_1d_type": "att", "block_2d_type": "basic_resnet_fwse", "group_divisor": 2, "dual_agg": True},
    "fc_relu_ungrouped": {"block_1d_type": "fc", "block_2d_type": "convnext_like_relu", "group_divisor": None},
    # Strides, expansions
    "ungrouped_strides": {**PLAIN2, "compress_tconvs": False, "stages_setup": STAGES2},
    "odd_groups": {**PLAIN2, "stages_setup": stages(([1, 1], 1, 0.75, 4), ([2, 3], 1, 1.25, None))},
    "one_stage": {**PLAIN2, "stages_setup": stages(([3, 4], 2, 3, 8))},
    "no_time_stride": {**PLAIN2, "stages_setup": stages(([1, 1], 1, 1, 8), ([2, 1], 1, 1, 8))},
    "kernels": {
        **PLAIN2,
        "block_2d_type": "convnext_like",
        "stages_setup": [[[1, 1], 1, 1, [[3, 5], [7, 1]], None], [[2, 2], 2, 2, [[1, 3]], 8]],
    },
    # Norms of maps, the end
    "norms_in_three_groups": {**PLAIN2, "agg_gnorm": 3, "dual_agg": True, "stages_setup": STAGES2},
    "norm_in_one_group": {**PLAIN2, "agg_gnorm": 1, "return_2d_output": False},
    "end_1d": {**PLAIN2, "return_2d_output": False, "global_context_att": False},
    "end_1d_out": {**PLAIN2, "return_2d_output": False, "out_channels": 40},
    "end_2d_tstp_embedding_norm": {**PLAIN2, "out_channels": 7, "pooling_func": "TSTP", "emb_bn": True},
    "end_2d_tap": {**PLAIN2, "pooling_func": "TAP", "feat_type": "pt", "spec_params": {"spec_norm": "mvn"}},
}
DEFAULTS2 = {"F": 24, "C": 4, "causal": "none", "stages_setup": stages(([1, 1], 1, 1, 8), ([2, 2], 1, 2, 8))}


@dataclass(frozen=True)
class Reference:
    """Where an implementation comes from, its wrapper as "module.class", and what is recorded of it."""

    url: str
    commit: str
    wrapper: str
    configs: dict[str, dict]


REFERENCES = {
    "redimnet": Reference(
        "https://github.com/IDRnD/redimnet",
        "dd9f51948fc34f5f0479527db2d19fc7088ac9ab",
        "redimnet.model.ReDimNetWrap",
        {name: {**BASE, **changes} for name, changes in CONFIGS.items()} | {"defaults": DEFAULTS},
    ),
    "redimnet2": Reference(
        "https://github.com/PalabraAI/redimnet2",
        "ffe8f272bfaf6a41efb7814b28d94377b1613ac9",
        "redimnet2.redimnet2.ReDimNet2Wrap",
        {name: {**BASE2, **changes} for name, changes in CONFIGS2.items()} | {"defaults": DEFAULTS2},
    ),
}


def build(wrapper, model_config: dict) -> tuple[nn.Module, dict[str, list[int]]]:
    """The reference model in eval mode with the weights of tests/reference_weights.py, and the weights' shapes."""
    model = wrapper(**model_config).eval()
    if isinstance(model.spec, nn.Module) and isinstance(getattr(model.spec, "spec_norm", None), str):
        # A name it does not know stays a string there, and calling that fails: this is what was meant.
        model.spec.spec_norm = nn.Identity()
    groups = model_config.get("agg_gnorm", False)
    for module in model.modules():
        # At this commit there are always C groups; later ones take a number as that of groups.
        if isinstance(module, nn.GroupNorm) and not isinstance(groups, bool):
            module.num_groups = groups
    constants = {key for key in model.state_dict() if key.startswith("spec.") and "spec_norm" not in key}
    weights = {k: reference_tensor(k, list(t.shape)) for k, t in model.state_dict().items() if k not in constants}
    wrong = set(model.load_state_dict(weights, strict=False).missing_keys) - constants
    assert not wrong, wrong
    return model, {key: list(tensor.shape) for key, tensor in weights.items()}


def rounded(values: torch.Tensor) -> list:
    """Nested lists with the nine digits that tell float32 numbers apart."""
    return json.loads(json.dumps(values.tolist()), parse_float=lambda digits: float(f"{float(digits):.9g}"))


def record(wrapper, model_config: dict) -> dict:
    """Answers of one configuration to every waveform."""
    model, shapes = build(wrapper, model_config)
    seen = {}
    model.spec.register_forward_hook(lambda module, args, output: seen.update(features=output))
    model.pool.register_forward_hook(lambda module, args, output: seen.update(pooled=output))
    answers = {}
    for length in WAVEFORM_LENGTHS:
        with torch.no_grad():
            embedding = model(reference_waveform(length))
        answers[str(length)] = {"embedding": rounded(embedding)}
        for name, value in seen.items():
            summary = {"shape": list(value.shape), "norm": rounded(value.norm()), "spread": rounded(spread(value))}
            answers[str(length)][name] = summary
    return {"model_config": model_config, "state_dict": nested(shapes), "answers": answers}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--network", choices=REFERENCES, default="redimnet")
    arguments = parser.parse_args()
    reference = REFERENCES[arguments.network]
    sys.path.insert(0, str(arguments.checkout))
    module, name = reference.wrapper.rsplit(".", 1)
    wrapper = getattr(importlib.import_module(module), name)

    torch.set_num_threads(1)
    lines = [
        f"{json.dumps(name)}: {json.dumps(record(wrapper, model_config), separators=(',', ':'))}"
        for name, model_config in reference.configs.items()
    ]
    header = json.dumps({"reference": reference.url, "commit": reference.commit})
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(header[:-1] + ', "recordings": {\n' + ",\n".join(lines) + "\n}}\n")
    print(f"{len(lines)} recordings, {arguments.out.stat().st_size / 1000:.0f} kB in {arguments.out}")


if __name__ == "__main__":
    main()

"""Published ReDimNet and ReDimNet2 checkpoints to MRL-ReDimNet models, strictly and whole.

A published file holds `model_config`, which alone decides the architecture, and `state_dict`. Every entry of the
latter is used or is on the short list of things that are recomputed; every tensor of ours is filled. Anything else
ends the conversion with the list of what is wrong.
"""

import re
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configuration_mrl_redimnet import MRLReDimNetConfig, MRLReDimNetError
from modeling_mrl_redimnet import MRLReDimNetModel


class ConversionError(MRLReDimNetError, ValueError):
    """The checkpoint cannot be converted; the message lists what is wrong."""


FRONT_ENDS = {"pt": "mel", "pt_mel": "mel", "tf": "tf_mel", "tf_mel": "tf_mel"}
FEATURE_NORMS = {"mn": "mean", "mvn": "mean_variance", "bn": "batch"}
# Keys of the wrappers that do not change what the network answers.
IGNORED_CONFIG = {"num_classes", "class_dropout", "head_activation", "return_all_outputs"}
# The reference wrappers' defaults, for keys a file leaves out: what both have, what each has.
SHARED_DEFAULTS: dict[str, Any] = {
    "F": 72,
    "out_channels": None,
    "embed_dim": 192,
    "feat_agg_dropout": 0.0,
    "hop_length": 160,
    "pooling_func": "ASTP",
    "feat_type": "pt",
    "emb_bn": False,
    "spec_params": {"do_spec_aug": False, "freq_mask_width": [0, 6], "time_mask_width": [0, 8]},
}
REFERENCE_DEFAULTS: dict[str, dict[str, Any]] = {
    "redimnet": {  # IDRnD/redimnet, dd9f519
        **SHARED_DEFAULTS,
        "C": 16,
        "block_1d_type": "att",
        "block_2d_type": "convnext_like",
        "stages_setup": [
            [1, 2, 1, None, 12],
            [2, 2, 1, None, 12],
            [1, 3, 1, None, 12],
            [2, 4, 1, None, 8],
            [1, 4, 1, None, 8],
            [2, 4, 1, None, 4],
        ],
        "group_divisor": 4,
        "global_context_att": False,
    },
    "redimnet2": {  # PalabraAI/redimnet2, ffe8f27
        **SHARED_DEFAULTS,
        "C": 24,
        "block_1d_type": "conv+att",
        "block_2d_type": "basic_resnet",
        "stages_setup": [
            [[1, 1], 2, 4, [[3, 3]], 24],
            [[2, 1], 3, 3, [[3, 3]], 24],
            [[1, 2], 4, 2, [[3, 3]], 24],
            [[2, 1], 5, 1, [[3, 3]], 24],
            [[1, 2], 4, 1, [[3, 3]], 24],
            [[2, 1], 3, 1, [[3, 3]], 24],
        ],
        "group_divisor": 1,
        "global_context_att": True,
        "return_2d_output": False,
        "compress_tconvs": True,
        "dual_agg": False,
        "agg_gnorm": False,
    },
}
# Options of the reference that no published file uses: the values that leave them out.
UNUSED_OPTIONS: dict[str, dict[str, tuple]] = {
    "redimnet": {"tf_optimized_arch": (False, None)},
    "redimnet2": {
        "causal": (False, None, "none"),
        "spec_in_channels": (1,),
        "fm_weigthing_type": ("NC",),
        "use_freq_pos_enc": (False,),
        "pad_right_samples": (None, 0),
        "before_pool_offset": (None, 0),
        "is_subnet": (False,),
        "offset_fm_weights": (0,),
    },
}
SPEC_PARAMS = {  # reference name -> (our field, reference default)
    "norm_signal": ("normalize_signal", False),
    "do_preemph": ("preemphasis", True),
    "do_spec_aug": ("spec_augment", False),
    "num_apply_spec_aug": ("spec_augment_repeats", 1),
    "freq_mask_width": ("freq_mask_width", [0, 8]),
    "time_mask_width": ("time_mask_width", [0, 10]),
    "freq_start_bin": ("freq_mask_start", 0),
    "eps": ("front_end_eps", 1e-8),
}
# What may have been around a network that was saved: the first part of its tensors' names -> what puts it there.
WRAPPERS = {"module": "DistributedDataParallel", "_orig_mod": "torch.compile"}
# Front-end constants the reference takes as parameters; we have one value of each.
FIXED_SPEC_PARAMS = {"sample_rate": 16000, "n_fft": 512, "win_length": 400, "f_min": 20, "f_max": 7600}


def convert_checkpoint(checkpoint: str | Path | dict, embedding_size: int | None = None) -> MRLReDimNetModel:
    """A published checkpoint, as a path or as the loaded dict, to a model in eval mode that answers as it does.

    embedding_size: more dimensions than the checkpoint's head has; the new rows are zero and change no cosine.
    Raises ConversionError listing unknown configuration keys and left-over, missing, misshapen or damaged tensors, and
    naming what the checkpoint is wrapped in.
    """
    checkpoint = _read(checkpoint)
    model_config = checkpoint["model_config"]
    model = MRLReDimNetModel(convert_config(model_config, embedding_size))
    model.load_state_dict(convert_state_dict(checkpoint["state_dict"], model, model_config))
    return model.eval()


def which_network(model_config: dict) -> str:
    """The name "redimnet2" where a stage strides over two axes or, without stages, a key is of that network alone.

    Else "redimnet".
    """
    if "stages_setup" in model_config:
        pairs = any(isinstance(row[0], (list, tuple)) for row in model_config["stages_setup"])
        return "redimnet2" if pairs else "redimnet"
    first, second = ({*REFERENCE_DEFAULTS[name], *UNUSED_OPTIONS[name]} for name in ("redimnet", "redimnet2"))
    return "redimnet2" if (second - first) & set(model_config) else "redimnet"


def convert_config(model_config: dict, embedding_size: int | None = None) -> MRLReDimNetConfig:
    """The reference wrapper's keyword arguments as a configuration; unknown keys and values are refused by name."""
    network = which_network(model_config)
    unused = UNUSED_OPTIONS[network]
    defaults = REFERENCE_DEFAULTS[network]
    known = {**defaults, **{k: v for k, v in model_config.items() if k not in IGNORED_CONFIG | set(unused)}}
    problems = [f"model_config.{key}: unknown key" for key in sorted(set(known) - set(defaults))]
    for key, without in unused.items():
        if model_config.get(key, without[0]) not in without:
            problems.append(f"model_config.{key}: {model_config[key]!r} is not supported (no published file has it)")
    if known["feat_type"] not in FRONT_ENDS:
        problems.append(f"model_config.feat_type: {known['feat_type']!r} is none of {', '.join(FRONT_ENDS)}")
    stages, stage_problems = _convert_stages(known, network)
    front_end, spec_problems = _convert_spec_params(known["spec_params"], FRONT_ENDS.get(known["feat_type"], "mel"))
    problems += stage_problems + spec_problems
    if problems:
        raise ConversionError("This checkpoint's model_config cannot be converted:\n  " + "\n  ".join(problems))
    size = known["embed_dim"] if embedding_size is None else embedding_size
    if size < known["embed_dim"]:
        raise ConversionError(
            f"embedding_size: {size} is less than the checkpoint's {known['embed_dim']}; shorter embeddings are "
            "prefixes of the full one (truncate_dim), best after a rotation."
        )
    try:
        return MRLReDimNetConfig(
            network=network,
            num_mel_bins=known["F"],
            base_channels=known["C"],
            block_1d=known["block_1d_type"],
            block_2d=known["block_2d_type"],
            stages=stages,
            group_divisor=known["group_divisor"],
            aggregation_channels=known["out_channels"],
            map_dropout=known["feat_agg_dropout"],
            hop_length=known["hop_length"],
            pooling=known["pooling_func"],
            pooling_context=bool(known["global_context_att"]),
            embedding_norm=bool(known["emb_bn"]),
            embedding_size=size,
            matryoshka_dims=default_dims(size),
            **front_end,
            **(_redimnet2_fields(known) if network == "redimnet2" else {}),
        )
    except ValueError as error:
        raise ConversionError(f"This checkpoint's model_config cannot be converted: {error}") from error


def _redimnet2_fields(known: dict) -> dict:
    norm = known["agg_gnorm"]
    return {
        "grouped_strides": bool(known["compress_tconvs"]),
        "dual_maps": bool(known["dual_agg"]),
        "map_norm_groups": (known["C"] if norm else None) if isinstance(norm, bool) else norm,
        "aggregation_per_bin": bool(known["return_2d_output"]) and known["out_channels"] is not None,
    }


def default_dims(size: int) -> list[int]:
    """Matryoshka prefixes for an embedding of `size`: the multiples of 64 below it, and itself."""
    return [*range(64, size, 64), size]


def _convert_stages(known: dict, network: str) -> tuple[list[dict], list[str]]:
    stages, problems = [], []
    # ReDimNet builds 3x3 kernels whatever its stages say, and so are the residual blocks of both.
    uses_kernels = network == "redimnet2" and str(known["block_2d_type"]).startswith("convnext")
    wanted = "stride" if network == "redimnet" else "(bins' stride, frames' stride)"
    for i, row in enumerate(known["stages_setup"]):
        strides = row[0] if network == "redimnet2" and isinstance(row[0], (list, tuple)) else row[:1]
        if len(row) != 5 or len(strides) != (2 if network == "redimnet2" else 1) or not _whole(strides):
            problems.append(
                f"model_config.stages_setup[{i}]: {row!r} is not ({wanted}, blocks, expansion, kernels, reduction)"
            )
            continue
        _, blocks, expansion, kernels, reduction = row
        stages.append(dict(frequency_stride=strides[0], blocks=blocks, expansion=expansion, reduction=reduction))
        if len(strides) == 2:
            stages[-1]["time_stride"] = strides[1]
        if uses_kernels:
            stages[-1]["kernels"] = kernels
    return stages, problems


def _whole(numbers: Iterable) -> bool:
    return all(isinstance(number, int) for number in numbers)


def _convert_spec_params(spec_params: dict, front_end: str) -> tuple[dict, list[str]]:
    ours: dict[str, Any] = {"front_end": front_end}
    problems = []
    for name, (field, default) in SPEC_PARAMS.items():
        value = spec_params.get(name, default)
        ours[field] = list(value) if isinstance(value, (list, tuple)) else value
    norm = spec_params.get("spec_norm", "mn")
    if front_end == "mel":
        # Whatever the reference does not know, it leaves out: features stay as they are.
        ours["feature_norm"] = FEATURE_NORMS.get(norm, "none")
    elif "spec_norm" in spec_params:
        problems.append("model_config.spec_params.spec_norm: the TensorFlow-style front end has none")
    for name, value in FIXED_SPEC_PARAMS.items():
        if spec_params.get(name, value) != value:
            problems.append(f"model_config.spec_params.{name}: {spec_params[name]!r}, only {value} is supported")
    for name in sorted(set(spec_params) - set(SPEC_PARAMS) - set(FIXED_SPEC_PARAMS) - {"spec_norm"}):
        problems.append(f"model_config.spec_params.{name}: unknown key")
    return ours, problems


# ----------------------------------------------------------------------------------------------------------------------
# Tensors


@dataclass(frozen=True)
class Rule:
    """One reference tensor and where it goes: `place(tensor)` gives {our name: tensor}."""

    key: str
    place: Callable[[torch.Tensor], dict[str, torch.Tensor]]


def _same(key: str, ours: str) -> Rule:
    return Rule(key, lambda t: {ours: t})


def _image(key: str, ours: str) -> Rule:
    """A kernel over (bins, frames) to one over (frames, bins)."""
    return Rule(key, lambda t: {ours: t.transpose(2, 3).contiguous()})


def _linear(key: str, ours: str) -> Rule:
    """A 1x1 convolution's kernel to a linear layer's matrix."""
    return Rule(key, lambda t: {ours: t.flatten(1)})


def _stride(key: str, ours: str) -> Rule:
    """A kernel over (bins, frames) that strides by its size to a matrix: bins side by side, frames outside them."""
    return Rule(key, lambda t: {ours: t.permute(0, 3, 2, 1).flatten(1)})


def _time(key: str, ours: str) -> Rule:
    """A kernel over frames [out, in, k] to an image kernel of height one [out, in, 1, k]."""
    return Rule(key, lambda t: {ours: t.unsqueeze(2)})


def _both(rule: Callable[[str, str], Rule], key: str, ours: str) -> Iterator[Rule]:
    """A layer with weight and bias, the weight by `rule`."""
    yield rule(f"{key}.weight", f"{ours}.weight")
    yield _same(f"{key}.bias", f"{ours}.bias")


def _batch_norm(key: str, ours: str) -> Iterator[Rule]:
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        yield _same(f"{key}.{name}", f"{ours}.{name}")


def _block_2d(config: MRLReDimNetConfig, kernels: int, key: str, ours: str) -> Iterator[Rule]:
    if config.block_2d.startswith("convnext"):
        yield from _both(_image, f"{key}.dwconvs.0", f"{ours}.conv")
        for i in range(1, kernels):
            yield from _both(_image, f"{key}.dwconvs.{i}", f"{ours}.other_convs.{i - 1}")
        yield from _batch_norm(f"{key}.norm", f"{ours}.norm")
        yield from _both(_linear, f"{key}.pwconv1", f"{ours}.pointwise")
        return
    for i in (1, 2):
        yield _image(f"{key}.conv{i}.weight", f"{ours}.conv{i}.weight")
        if config.group_divisor is not None:
            yield from _both(_linear, f"{key}.conv{i}pw", f"{ours}.pointwise{i}")
        yield from _batch_norm(f"{key}.bn{i}", f"{ours}.norm{i}")
    if config.block_2d == "basic_resnet_fwse":
        yield from _both(_same, f"{key}.se.squeeze", f"{ours}.bin_gate.squeeze")
        yield from _both(_same, f"{key}.se.exitation", f"{ours}.bin_gate.excite")


def _conv_unit(key: str, ours: str, kernels: int) -> Iterator[Rule]:
    for i in range(kernels):
        yield from _both(_time, f"{key}.dwconvs.{i}", f"{ours}.convs.{i}")
    yield from _batch_norm(f"{key}.norm", f"{ours}.norm")
    yield from _both(_linear, f"{key}.pwconv1", f"{ours}.pointwise")


def _transformer(key: str, ours: str) -> Iterator[Rule]:
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        yield from _both(_same, f"{key}.attention.{name}", f"{ours}.{name}")
    yield from _both(_same, f"{key}.layer_norm", f"{ours}.attention_norm")
    yield from _both(_same, f"{key}.feed_forward.intermediate_dense", f"{ours}.ffn_in")
    yield from _both(_same, f"{key}.feed_forward.output_dense", f"{ours}.ffn_out")
    yield from _both(_same, f"{key}.final_layer_norm", f"{ours}.ffn_norm")


def _block_1d(config: MRLReDimNetConfig, key: str, ours: str) -> Iterator[Rule]:
    yield from _both(_linear, f"{key}.red_dim_conv.0", f"{ours}.reduce")
    yield from _both(_same, f"{key}.red_dim_conv.1", f"{ours}.norm")
    tcm, layers = f"{key}.tcm", f"{ours}.layers"
    if config.block_1d == "fc":
        yield from _both(_linear, f"{tcm}.0", f"{layers}.0.widen")
        yield from _both(_same, f"{tcm}.1", f"{layers}.0.norm")
        yield from _both(_linear, f"{tcm}.3", f"{layers}.0.narrow")
    elif config.block_1d == "att":
        yield from _both(_time, f"{tcm}.0.conv", f"{layers}.0.conv")
        yield from _both(_same, f"{tcm}.0.norm", f"{layers}.0.norm")
        yield from _transformer(f"{tcm}.1", f"{layers}.1")
    else:
        for i in range(4):
            yield from _conv_unit(f"{tcm}.{i}", f"{layers}.{i}", kernels=3 if config.block_1d == "conv" else 1)
        if config.block_1d == "conv+att":
            yield from _transformer(f"{tcm}.4", f"{layers}.4")
    yield from _both(_linear, f"{key}.exp_dim_conv", f"{ours}.expand")


def _stage(config: MRLReDimNetConfig, index: int) -> Iterator[Rule]:
    key, ours, stage = f"backbone.stage{index}", f"trunk.stages.{index}", config.stages[index]
    dual = config.dual_maps and stage["reduction"] is not None
    position = yield from _stage_2d(config, index, f"{key}_pre" if dual else key, ours)
    # Then follow the reshape to 1-D, the 1-D block, the upsampling and the norm; of a dual stage, apart.
    if stage["reduction"] is not None:
        position += 1
        yield from _block_1d(config, f"{key}_1d" if dual else f"{key}.{position}", f"{ours}.context")
    if config.map_norm_groups is not None:
        norms = [f"{key}_up_2d.1", f"{key}_up_1d.1"] if dual else [f"{key}.{position + 2}"]
        for i, norm in enumerate(norms):
            yield from _both(_same, norm, f"{ours}.norms.{i}")


def _stage_2d(config: MRLReDimNetConfig, index: int, key: str, ours: str) -> Generator[Rule, None, int]:
    """Rules up to the reshape to 1-D, whose position is returned."""
    stage = config.stages[index]
    if index == 0:
        yield Rule(f"{key}.0.w", lambda t: {})  # a softmax over one map: it weighs nothing
    else:
        yield Rule(f"{key}.0.w", lambda t: {f"{ours}.mix.logits": t[0, :, :, 0]})
    yield from _both(_image if config.stride_groups(index) > 1 else _stride, f"{key}.2", f"{ours}.stride")
    position = 3
    for block in range(stage["blocks"]):
        kernels = len(stage.get("kernels", [[3, 3]]))
        yield from _block_2d(config, kernels, f"{key}.{position}.conv_block", f"{ours}.blocks.{block}")
        position += 1
    if stage["expansion"] != 1:
        squeeze = f"{ours}.squeeze"
        if config.network == "redimnet":
            yield from _both(_image, f"{key}.{position}.0", f"{squeeze}.conv")
            yield from _both(_linear, f"{key}.{position}.3", f"{squeeze}.pointwise")
        else:
            yield from _both(_linear, f"{key}.{position}.0", f"{squeeze}.pointwise")
        yield from _batch_norm(f"{key}.{position}.1", f"{squeeze}.norm")
        position += 1
    return position


def _pooling(config: MRLReDimNetConfig) -> Iterator[Rule]:
    if config.pooling != "ASTP":
        return
    width = config.pooling_input

    def split_context(t: torch.Tensor) -> dict[str, torch.Tensor]:  # the columns of (frame, mean, deviation)
        flat = t.flatten(1)
        ours = {"pooling.attention_in.weight": flat[:, :width].contiguous()}
        if config.pooling_context:
            ours["pooling.context_in.weight"] = flat[:, width:].contiguous()
        return ours

    yield Rule("pool.linear1.weight", split_context)
    yield _same("pool.linear1.bias", "pooling.attention_in.bias")
    yield from _both(_linear, "pool.linear2", "pooling.attention_out")


def _head(config: MRLReDimNetConfig, embed_dim: int) -> Iterator[Rule]:
    starts = [0, *config.matryoshka_dims[:-1]]

    def grown(t: torch.Tensor, value: float) -> torch.Tensor:
        if t.shape[:1] != (embed_dim,):
            raise IndexError("not the number of rows that model_config says")
        return torch.cat([t, t.new_full((config.embedding_size - embed_dim, *t.shape[1:]), value)])

    def segments(kind: str) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
        def place(t: torch.Tensor) -> dict[str, torch.Tensor]:  # rows the checkpoint does not have start at zero
            rows = grown(t, 0.0)
            return {
                f"projection.segments.{i}.{kind}": rows[start:end].clone()
                for i, (start, end) in enumerate(zip(starts, config.matryoshka_dims, strict=True))
            }

        return place

    def embedding_norm(name: str, value: float) -> Callable[[torch.Tensor], dict[str, torch.Tensor]]:
        return lambda t: {f"projection.embedding_norm.{name}": grown(t, value)}

    yield from _batch_norm("bn", "projection.norm")
    yield Rule("linear.weight", segments("weight"))
    yield Rule("linear.bias", segments("bias"))
    if config.embedding_norm:
        fill = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}  # of rows that are zero
        for name, value in fill.items():
            yield Rule(f"bn2.{name}", embedding_norm(name, value))
        yield _same("bn2.num_batches_tracked", "projection.embedding_norm.num_batches_tracked")


def _rules(config: MRLReDimNetConfig, model_config: dict) -> Iterator[Rule]:
    embed_dim: int = {**SHARED_DEFAULTS, **model_config}["embed_dim"]
    if config.feature_norm == "batch":
        yield from _batch_norm("spec.spec_norm", "front_end.norm")
    yield from _both(_image, "backbone.stem.0", "trunk.stem.conv")
    yield from _both(_same, "backbone.stem.1", "trunk.stem.norm")
    if config.map_norm_groups is not None:
        yield from _both(_same, "backbone.stem_gnorm", "trunk.stem.map_norm")
    for index in range(len(config.stages)):
        yield from _stage(config, index)
    yield Rule("backbone.fin_wght1d.w", lambda t: {"trunk.mix.logits": t[0, :, :, 0]})
    if config.aggregation_channels is not None:
        if config.network == "redimnet":
            yield from _both(_linear, "backbone.mfa.0", "trunk.aggregate")
            yield from _batch_norm("backbone.mfa.1", "trunk.aggregate_norm")
        else:
            yield from _both(_linear, "backbone.head", "trunk.aggregate")
    yield from _pooling(config)
    yield from _head(config, embed_dim)


def _is_recomputed(key: str) -> bool:
    """Front-end constants, and a classifier of training time."""
    return key.startswith("cls_head.") or (key.startswith("spec.") and not key.startswith("spec.spec_norm."))


def convert_state_dict(
    state_dict: dict[str, torch.Tensor], model: MRLReDimNetModel, model_config: dict
) -> dict[str, torch.Tensor]:
    """Reference tensors as the model's; ConversionError lists every one left over, missing or misshapen.

    model_config: the checkpoint's; the model's head may have more rows.
    """
    rules = list(_rules(model.config, model_config))
    _refuse_prefix(state_dict, [rule.key for rule in rules])
    left = {key: value for key, value in state_dict.items() if not _is_recomputed(key)}
    expected = model.state_dict()
    converted, problems = {}, []
    for rule in rules:
        if rule.key not in left:
            problems.append(f"missing: {rule.key}")
            continue
        tensor = left.pop(rule.key)
        if damage := _damage(rule.key, tensor):
            problems.append(damage)
        try:
            placed = rule.place(tensor)
        except (IndexError, RuntimeError):
            problems.append(f"misshapen: {rule.key} {tuple(tensor.shape)}")
            continue
        for name, value in placed.items():
            if value.shape != expected[name].shape:
                problems.append(
                    f"misshapen: {rule.key} {tuple(tensor.shape)} gives {name} {tuple(value.shape)}, "
                    f"expected {tuple(expected[name].shape)}"
                )
            converted[name] = value
    problems += [f"left over: {key} {tuple(value.shape)}" for key, value in left.items()]
    if not problems:
        problems += [f"not filled: {name}" for name in sorted(set(expected) - set(converted))]
    if problems:
        raise ConversionError(
            f"The checkpoint does not fit its own model_config ({len(problems)} problems):\n  " + "\n  ".join(problems)
        )
    return {name: _bins_outermost(name, value, model.config, model_config) for name, value in converted.items()}


def _refuse_prefix(state_dict: dict[str, torch.Tensor], keys: list[str]) -> None:
    """Raises ConversionError where the tensors have names that a wrapper has put something before."""
    present = [key for key in keys if any(name.endswith(f".{key}") for name in state_dict)]
    prefixes = {name.removesuffix(key) for key in present[:1] for name in state_dict if name.endswith(f".{key}")}
    for prefix in prefixes:
        if all(prefix + key in state_dict for key in present) and not set(keys) & set(state_dict):
            by = WRAPPERS.get(prefix.split(".")[0], "a model around it")
            raise ConversionError(
                f"The names of the checkpoint's tensors begin with {prefix!r} ({prefix}{present[0]}), which {by} has "
                f"put there. Save it again without: checkpoint['state_dict'] = {{name.removeprefix({prefix!r}): tensor "
                "for name, tensor in checkpoint['state_dict'].items()}."
            )


def _damage(key: str, tensor: torch.Tensor) -> str | None:
    """What is wrong with a tensor's numbers, if anything."""
    if bad := int((~torch.isfinite(tensor)).sum()):
        return f"damaged: {key} {tuple(tensor.shape)} has {bad} numbers that are NaN or infinite"
    if key.endswith(".running_var") and bool((tensor < 0).any()):
        return f"damaged: {key} {tuple(tensor.shape)} has negative variances"
    return None


# Where the pooling's channels are an axis of our tensors, once or for several statistics in a row.
POOLED_AXES = (
    (r"pooling\.(attention|context)_in\.weight|projection\.segments\.\d+\.weight", 1),
    (r"pooling\.attention_out\..*|projection\.norm\.(weight|bias|running_.*)", 0),
)


def _bins_outermost(name: str, value: torch.Tensor, config: MRLReDimNetConfig, model_config: dict) -> torch.Tensor:
    """The reference pools 2-D maps with channels outermost; ours are what they are in memory, bins outermost."""
    axis = next((axis for names, axis in POOLED_AXES if re.fullmatch(names, name)), None)
    if axis is None or not model_config.get("return_2d_output"):
        return value
    *_, bins = config.stage_shapes()[-1]
    return (
        value.unflatten(axis, (-1, config.pooling_input // bins, bins))
        .transpose(axis + 1, axis + 2)
        .flatten(axis, axis + 2)
    )


def _read(checkpoint: str | Path | dict) -> dict:
    if not isinstance(checkpoint, dict):
        path = Path(checkpoint)
        if not path.is_file():
            raise ConversionError(f"No checkpoint file at {path}.")
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch.load raises whatever the unpickler meets
            raise ConversionError(
                f"{path} cannot be read as a PyTorch checkpoint of weights only ({type(error).__name__}): it is "
                "damaged, not whole, no checkpoint, or holds code."
            ) from error
    if not isinstance(checkpoint, dict) or not {"model_config", "state_dict"} <= set(checkpoint):
        raise ConversionError(f"Expected a checkpoint with 'model_config' and 'state_dict', got {_told(checkpoint)}.")
    for key in ("model_config", "state_dict"):
        if not isinstance(checkpoint[key], dict):
            raise ConversionError(f"{key}: expected a dict, got {type(checkpoint[key]).__name__}.")
    for key, value in checkpoint["state_dict"].items():
        if not isinstance(value, torch.Tensor):
            raise ConversionError(
                f"state_dict: {key!r} is a {type(value).__name__}, expected tensors alone: the weights may lie deeper, "
                "or other things among them."
            )
    return checkpoint


def _told(checkpoint: object) -> str:
    """What was found in the place of a published checkpoint, and where the weights may be."""
    if not isinstance(checkpoint, dict):
        return type(checkpoint).__name__
    found = str(sorted(map(str, checkpoint))[:5])
    for key, value in checkpoint.items():
        if isinstance(value, dict) and {"model_config", "state_dict"} <= set(value):
            return f"{found}; they are one level deeper: give what is under {key!r}"
    if checkpoint and all(isinstance(value, torch.Tensor) for value in checkpoint.values()):
        return (
            f"{found}: weights alone, {len(checkpoint)} tensors. The network's settings must come with them: save "
            "{'model_config': the keyword arguments of the reference's ReDimNetWrap, 'state_dict': these}"
        )
    return found

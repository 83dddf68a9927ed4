"""Names for weights: by them adapters know their base, and thresholds and embeddings the model that they are of."""

import hashlib
import json
import re

import torch
from torch import nn


def fingerprint(model: nn.Module) -> str:
    """A hash of the encoder's own weights and batch-norm statistics and one of its configuration,
    "sha256:...+config:...".

    The same with and without a classification head or exits, with any adapters attached (merged ones excepted), on any
    device, and in float32 and bfloat16: numbers are hashed as bfloat16. (What embeds at an exit is a model of its own,
    `MRLReDimNetModel.at_depth`, with its own fingerprint.) Of the configuration, what changes an embedding counts
    (ANSWERING). Compare with `same_weights`: what was saved before the configuration counted has no second hash.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # a PeftModel's
    encoder = model.base_model
    tensors = {}
    for name, tensor in encoder.state_dict().items():
        parts = name.split(".")
        if tensor.is_floating_point() and parts[0] != "exits" and not ADAPTER_PARTS.intersection(parts):
            tensors[".".join(part for part in parts if part not in WRAPPER_PARTS)] = tensor
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to(device="cpu", dtype=torch.bfloat16).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    settings = json.dumps({name: getattr(encoder.config, name) for name in ANSWERING}, sort_keys=True)
    return f"sha256:{digest.hexdigest()}{CONFIG_PART}{hashlib.sha256(settings.encode()).hexdigest()[:16]}"


def same_weights(saved: str, found: str) -> bool:
    """Whether a saved fingerprint, of a model or of one with an adapter (`SpeakerEncoder.fingerprint`), names the
    weights whose own is `found`.

    One that was saved before fingerprints knew the configuration is compared by the weights alone.
    """
    return saved == (found if CONFIG_PART in saved else re.sub(rf"{re.escape(CONFIG_PART)}[0-9a-f]+", "", found))


CONFIG_PART = "+config:"  # stands before the second hash
# The fields of the configuration that change an embedding. A field that is new here may count only where it is not the
# value that leaves embeddings as they were, or fingerprints that were saved would not be found again.
ANSWERING = (
    "front_end", "num_mel_bins", "hop_length", "normalize_signal", "preemphasis", "feature_norm", "front_end_eps",
    "network", "base_channels", "stages", "block_1d", "block_2d", "group_divisor", "grouped_strides", "dual_maps",
    "map_norm_groups", "aggregation_channels", "aggregation_per_bin", "pooling", "pooling_context",
    "pooling_bottleneck", "embedding_size", "embedding_norm", "matryoshka_dims", "window_seconds",
)  # fmt: skip
# How PEFT names, inside an adapted model, what it added and what it wrapped.
ADAPTER_PARTS = frozenset(
    {"lora_A", "lora_B", "lora_E", "ranknum", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector",
     "modules_to_save"}
)  # fmt: skip
WRAPPER_PARTS = frozenset({"base_layer", "original_module"})

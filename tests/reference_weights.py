"""Weights and waveforms that anyone can rebuild: what `benchmarks/record_reference.py` recorded answers for.

A tensor's value depends on its key and shape alone, so that the recordings need not store it.
"""

import hashlib

import numpy as np
import torch

WAVEFORM_LENGTHS = (16_000, 12_345)


def _generator(text: str) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64(int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")))


def reference_tensor(key: str, shape: list[int]) -> torch.Tensor:
    """One entry of the reference's state dict, at a scale that keeps a forward pass well behaved."""
    name = key.rsplit(".", 1)[-1]
    if name == "num_batches_tracked":
        return torch.tensor(7)
    values = _generator(key).standard_normal(shape)
    if name == "running_var":
        values = 0.5 + np.abs(values)
    elif name == "w":  # weights of the feature maps, behind a softmax
        values = 0.5 * values
    elif len(shape) == 1:  # gains around 1; biases and running means around 0
        values = 0.1 * values + (name == "weight")
    else:
        values = values / np.sqrt(np.prod(shape[1:]))
    return torch.from_numpy(np.asarray(values, dtype=np.float32))


def reference_waveform(length: int) -> torch.Tensor:
    """Two utterances of noise whose loudness moves, [2, length] float32."""
    noise = _generator(f"waveform {length}").standard_normal((2, length))
    loudness = 0.1 * (1.1 + np.sin(np.linspace([0.0, 1.0], [20.0, 31.0], length))).T
    return torch.from_numpy((noise * loudness).astype(np.float32))


def spread(values: torch.Tensor, count: int = 16) -> torch.Tensor:
    """`count` values spread over a tensor: enough to notice a transposed or shifted one, without storing it."""
    flat = values.flatten()
    return flat[torch.linspace(0, len(flat) - 1, count, dtype=torch.float64).long()]


def nested(flat: dict) -> dict:
    """{"a.b": 1, "a.c": 2} to {"a": {"b": 1, "c": 2}}: names of tensors in half the space."""
    tree: dict = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    return tree


def flattened(tree: dict, prefix: str = "") -> dict:
    """The inverse of `nested`."""
    flat = {}
    for name, value in tree.items():
        flat |= flattened(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat

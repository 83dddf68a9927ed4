"""Memory of the backward pass: what is cheap to compute again from what is kept anyway is not kept."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import torch

_on = contextvars.ContextVar("recomputing", default=True)


@contextlib.contextmanager
def recomputing(on: bool) -> Iterator[None]:
    """Within, `recomputed` does so or not. Gradient checkpointing frees what it could not with what is kept here."""
    token = _on.set(on and _on.get())
    try:
        yield
    finally:
        _on.reset(token)


def recomputed(function: Callable, x: torch.Tensor, again: Callable[[], torch.Tensor]) -> torch.Tensor:
    """function(x), for whose backward pass `again()` computes x anew instead of x being kept.

    `again` must give x, in the same memory layout.
    """
    if torch.compiler.is_compiling() or not (torch.is_grad_enabled() and _on.get()):
        return function(x)
    storage = x.untyped_storage().data_ptr()
    device = x.device.type
    autocast = dict(dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device))

    def pack(kept: torch.Tensor) -> object:
        if kept.untyped_storage().data_ptr() != storage:
            return kept
        return kept.size(), kept.stride(), kept.storage_offset()

    def unpack(kept: Any) -> torch.Tensor:
        if isinstance(kept, torch.Tensor):
            return kept
        with torch.no_grad(), torch.autocast(device, **autocast):  # the backward pass may come when autocast is over
            return again().as_strided(*kept)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        return function(x)

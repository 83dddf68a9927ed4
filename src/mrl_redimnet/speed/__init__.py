"""Faster and leaner forms of the network's modules, in their places: the same answers and gradients, other kernels.

`modeling_mrl_redimnet.py` is the definition of the network. `speed_up(model)` gives each module that has a faster form
here that form's class: parameters, buffers, hooks and names stay as they are, so it may be called at any time, before
or after adapters are put on, and a model is saved as before. `as_defined(model)` takes it back.

    linear       1x1 layers on CPUs by oneDNN's convolutions
    norms        batch norms: kernels for CPUs, output that can be computed again, statistics of all processes together
    recompute    activations that are cheap to compute again are not kept for the backward pass
    blocks       the blocks of the trunk, made of these three; a norm that does not learn is folded into the layer
                 before it
    maps         feature maps: sums in place, norms that keep less
    loss         the loss of all Matryoshka prefixes in one pass over the classifier's rows, on CPUs
    threads      several passes over a network at once, on CPUs
"""

import os
from typing import TypeVar

from torch import nn

from masking_mrl_redimnet import BatchNorm
from modeling_mrl_redimnet import MatryoshkaMarginClassifier
from mrl_redimnet.speed import blocks, linear, loss, maps, norms

# oneDNN keeps what it has made for the last 1,024 layers and shapes. Every length and number of utterances in a batch
# is a shape: with recordings of all lengths that holds gigabytes. One pass of the largest network has about 70 of them,
# and to make one again takes well under a millisecond. oneDNN reads this at its first use; a value set outside is kept.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")

Model = TypeVar("Model", bound=nn.Module)

# Of each class of the definition, the faster one.
FAST: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: linear.FastLinear,
    BatchNorm: norms.FastBatchNorm,
    MatryoshkaMarginClassifier: loss.FusedClassifier,
    **blocks.FAST,
    **maps.FAST,
}
DEFINED = {fast: defined for defined, fast in FAST.items()}


def speed_up(model: Model) -> Model:
    """Gives the modules of `model` their faster forms, in place; modules of other classes stay. Returns the model."""
    return _exchange(model, FAST)


def as_defined(model: Model) -> Model:
    """Takes `speed_up` back, in place. Returns the model."""
    return _exchange(model, DEFINED)


def _exchange(model: Model, classes: dict[type[nn.Module], type[nn.Module]]) -> Model:
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
    return model

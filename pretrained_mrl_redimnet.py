"""What the models have from transformers, and what is different: weights that are wholly those of the model, checked
when they are read and before they are written; gradient checkpointing that batch norms can take; inputs that are
checked before the network sees them.

This file travels beside the weights to the Hub, as `modeling_mrl_redimnet.py` does, which is the network itself.
"""

import contextlib
import copy
import functools
import os
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.utils import has_file

# As in modeling_mrl_redimnet.py.
try:
    if not __package__:
        raise ImportError("not part of a package")
    from .configuration_mrl_redimnet import MRLReDimNetError
except ImportError:
    if __package__:
        raise
    from configuration_mrl_redimnet import MRLReDimNetError


class WeightsError(MRLReDimNetError, ValueError, RuntimeError):
    """Weights that are not those of the model they are loaded into, or saved from; the message names the tensors.

    A RuntimeError, too, because that is what transformers raises for a wrong shape.
    """


def refuse_wrapped(model: PreTrainedModel, names: Iterable[str] | None = None) -> None:
    """Raises WeightsError where the tensors' names are not those of a plain model: no class could load such a file.

    names: of the tensors to be saved, by default the model's own. Adapters (PEFT) and torch.compile wrap layers, and
    DistributedDataParallel the whole model.
    """
    names, plain = set(model.state_dict() if names is None else names), _plain_names(model)
    if names != plain:
        problems, cause = _name_problems(plain - names, names - plain)
        raise WeightsError(
            f"This {type(model).__name__} cannot be saved, because nothing could load it again: {problems}. {cause}"
        )


def _plain_names(model: PreTrainedModel) -> set[str]:
    """The names of the tensors of a model of this configuration, with nothing around its layers."""
    with torch.device("meta"):
        return set(type(model)(copy.deepcopy(model.config)).state_dict())


def _name_problems(missing: set[str], unknown: set[str]) -> tuple[str, str]:
    """What is wrong with the names of some tensors, and a sentence on where that comes from and what to do."""
    problems = []
    if missing:
        problems.append(f"{_counted(missing)} missing ({_some(missing)})")
    if unknown:
        problems.append(f"{_counted(unknown)} unknown to it ({_some(unknown)})")
    parts = {part for name in unknown for part in name.split(".")}
    wrapper = next((part for part in WRAPPERS if part in parts), None)
    if ADAPTER_NAMES & parts:
        cause = (
            "Layers of adapters (PEFT) are in it. Save the plain model before adapters are put on it, or a copy with "
            "the adapter folded in (AdapterBank.merged, PEFT's merge_and_unload); adapters are saved by themselves "
            "(AdapterBank.save, PEFT's save_pretrained)."
        )
    elif wrapper is not None:
        cause = (
            f"{WRAPPERS[wrapper]} puts {wrapper + '.'!r} into names: save the model that it wraps. A file is repaired "
            f"by from_pretrained(..., key_mapping={{'{wrapper}[.]': ''}}), then save_pretrained(...)."
        )
    elif prefix := _common_prefix(missing, unknown):
        cause = f"All names begin with {prefix!r}: take that away."
    else:
        cause = "The weights are not whole, or were renamed, or are another network's: save them, or get them, again."
    return " and ".join(problems), cause


def _common_prefix(missing: set[str], unknown: set[str]) -> str:
    """What stands before every missing name in an unknown one, "" where that is not one and the same."""
    if not missing:
        return ""
    some = min(missing)
    found = {name.removesuffix(some) for name in unknown if name.endswith(f".{some}")}
    return next((prefix for prefix in sorted(found) if {prefix + name for name in missing} <= unknown), "")


def _misshapen(info: dict) -> dict[str, tuple]:
    """Of transformers' loading info, {name: (shape in the file, shape in the model)}."""
    return {name: (tuple(found), tuple(wanted)) for name, found, wanted in info["mismatched_keys"]}


def _counted(names: Collection[str]) -> str:
    return "1 tensor is" if len(names) == 1 else f"{len(names)} tensors are"


def _some(names: Iterable[str]) -> str:
    first, *more = sorted(names)
    return ", ".join([first, *more[:2]]) + (", ..." if len(more) > 2 else "")


# The parts that PEFT, and what wraps a model or a part of it, put into the names of tensors.
ADAPTER_NAMES = frozenset({"base_model", "base_layer", "modules_to_save", "original_module", "lora_A", "lora_B"})
WRAPPERS = {
    "module": "DistributedDataParallel",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FullyShardedDataParallel",
}


class CheckedModel(PreTrainedModel):
    """A `PreTrainedModel` that is loaded and saved whole, or not at all.

    Modules whose forward pass moves statistics have an attribute `keeps_statistics`, which gradient checkpointing sets.
    """

    auto_classes: dict[str, str] = {}  # of transformers, and which class of which Hub file each one loads
    has_own_pipeline = True  # False for a model that one of transformers' own pipelines runs

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike | None, *model_args: Any, **kwargs: Any
    ) -> Any:
        """As in transformers, but every tensor must be what was saved: nothing is drawn at random without being asked.

        A new head is allowed on a model that was saved without one, and with ignore_mismatched_sizes=True in the place
        of any other; it replaces the head alone. Exits that are asked for (`exits=[1, 2]`) are new where the model was
        saved without them, and are to be trained. Weights are read from safetensors unless use_safetensors=False.

        Raises WeightsError, which names the tensors, for weights that lack some, have others or other shapes, and for
        a damaged file; OSError as transformers does, and for weights that exist as pickle only.
        """
        source, with_info = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        new_head = kwargs.get("ignore_mismatched_sizes", False)
        options = {"use_safetensors": True, **kwargs, "ignore_mismatched_sizes": True, "output_loading_info": True}
        try:
            model, info = super().from_pretrained(source, *model_args, **options)
            base, of_base, adapter = source or "state_dict", info, hasattr(model, "peft_config")
            if adapter:  # then info tells of that alone
                base, plain = model.name_or_path, {"config": model.config, "adapter_kwargs": {}}
                _, of_base = super().from_pretrained(base, *model_args, **options | plain)
        except SafetensorError as error:
            raise WeightsError(
                f"{source}: the weights cannot be read ({error}): the file is damaged, not whole, or only a pointer of "
                "Git LFS. Get or save it again."
            ) from error
        except OSError as error:
            if options["use_safetensors"] and _has_pickle(source, kwargs):
                raise OSError(
                    f"{source} has its weights as pickle only (pytorch_model.bin), which may run code when it is read. "
                    "Ask its owner for safetensors, or, if you trust it, convert it: "
                    "from_pretrained(..., use_safetensors=False), then save_pretrained(...)."
                ) from error
            raise
        cls._check_loaded(base, model, of_base, new_head, kwargs)
        if adapter and (lost := {*info["missing_keys"], *info["unexpected_keys"], *_misshapen(info)}):
            raise WeightsError(
                f"The adapter {'' if source == base else f'in {source} '}does not fit its base {base}: "
                f"{_counted(lost)} in one of the two alone, or of another shape ({_some(lost)})."
            )
        return (model, info) if with_info else model

    @classmethod
    def _check_loaded(
        cls,
        source: str | os.PathLike | None,
        model: PreTrainedModel,
        info: dict,
        new_head: bool,
        asked: Collection[str],
    ) -> None:
        """Raises WeightsError unless all of the model came from the file, but for what is new because it was asked for.

        info: transformers' loading info; asked: the names of from_pretrained's arguments.
        """
        shapes = _misshapen(info)
        missing, unknown = set(info["missing_keys"]) - shapes.keys(), set(info["unexpected_keys"])
        names = set() if model.base_model is model else _plain_names(model)
        head = {name for name in names if not name.startswith(f"{cls.base_model_prefix}.")}
        if new_head or (head <= missing and cls.__name__ not in (model.config.architectures or ())):
            missing, shapes = missing - head, {name: both for name, both in shapes.items() if name not in head}
            unknown = {name for name in unknown if not name.startswith("classifier.")}
        if "loss" in asked:  # what it learns beside the rows starts at its own value, not at random
            missing -= {"classifier.bias"}
        if "exits" in asked:
            missing, unknown = ({n for n in names if "exits" not in n.split(".")} for names in (missing, unknown))
        if not (missing or unknown or shapes):
            return
        problems, cause = _name_problems(missing, unknown)
        if shapes:
            shown = [f"{name} {found}, expected {wanted}" for name, (found, wanted) in shapes.items()]
            problems = " and ".join(filter(None, [problems, f"{_counted(shapes)} of another shape ({_some(shown)})"]))
        if head and head >= missing | shapes.keys():
            cause = "It is the head alone: ignore_mismatched_sizes=True puts a new one in its place."
        raise WeightsError(f"{source} does not hold the weights of {cls.__name__}: {problems}. {cause}")

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:
        """As in transformers; the saved configuration names all the auto classes that can load it, and the pipeline
        that can run it.

        Raises WeightsError, before anything is written, for a model whose layers are wrapped, as by PEFT. (Adapters of
        transformers' own add_adapter and load_adapter are saved as adapters, as transformers does.)
        """
        if kwargs.get("is_main_process", True) and not self._has_own_adapters():
            refuse_wrapped(self, kwargs.get("state_dict"))
        self.config.auto_map = dict(self.auto_classes)
        # Imported here, because few need it; relatively, because transformers takes along what is imported so, and in a
        # `try`, because it wants everything to be installed that a file from the Hub imports outside of one.
        try:
            if not __package__:
                raise ImportError("not part of a package")
            from .pipeline_mrl_redimnet import CUSTOM_PIPELINES
        except ImportError:
            if __package__:
                raise
            from pipeline_mrl_redimnet import CUSTOM_PIPELINES
        self.config.custom_pipelines = CUSTOM_PIPELINES if self.has_own_pipeline else {}
        super().save_pretrained(save_directory, **kwargs)

    def _has_own_adapters(self) -> bool:
        """Whether adapters were put on by transformers' own methods."""
        try:
            return bool(self.active_adapters())
        except ValueError:  # there are none
            return False

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, **kwargs: Any
    ) -> None:
        """As in transformers; the second forward pass leaves the batch norms' running statistics alone.

        Overridden here because all of transformers' public ways to switch it on and off end here.
        """
        options = dict(getattr(gradient_checkpointing_func, "keywords", {}))
        if enable and options.get("use_reentrant"):
            warnings.warn(
                "use_reentrant=True: reentrant checkpointing would leave most weights without a gradient and count the "
                "batch norms' statistics twice, so this model is checkpointed with use_reentrant=False. Gradients are "
                "the same as without checkpointing.",
                stacklevel=2,
            )
        options["use_reentrant"] = False
        options.setdefault("context_fn", self._checkpointing_contexts)  # a method, which a copy of the model has anew
        super()._set_gradient_checkpointing(enable, functools.partial(gradient_checkpointing_func, **options), **kwargs)

    def _checkpointing_contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Around the first and the second forward pass, as torch's checkpointing asks for them."""
        return contextlib.nullcontext(), self._counted_batch()

    @contextlib.contextmanager
    def _counted_batch(self) -> Iterator[None]:
        """Around the second forward pass of gradient checkpointing: batch norms keep their running statistics."""
        norms = [module for module in self.modules() if hasattr(module, "keeps_statistics")]
        for norm in norms:
            norm.keeps_statistics = True
        try:
            yield
        finally:
            for norm in norms:
                norm.keeps_statistics = False

    @property
    def is_gradient_checkpointing(self) -> bool:
        """As in transformers, which from 5.24 on warns whoever reads it: PEFT does, for every model."""
        return any(getattr(module, "gradient_checkpointing", False) for module in self.modules())

    def check_waveforms(self, input_values: torch.Tensor) -> None:
        """Raises ValueError for anything but waveforms [B, T] that are long enough."""
        if input_values.dim() != 2 or not input_values.is_floating_point():
            raise ValueError(
                f"input_values: expected floating point [batch, samples], got {input_values.dtype} of shape "
                f"{tuple(input_values.shape)}. MRLReDimNetFeatureExtractor makes such a batch from arrays."
            )
        if input_values.shape[1] < self.config.min_samples:
            raise ValueError(
                f"input_values: {input_values.shape[1]} samples, the model needs at least {self.config.min_samples}."
            )

    def check_prefix(self, truncate_dim: int | None) -> None:
        """Raises ValueError for a prefix that the model was not built for; None is the whole embedding."""
        if truncate_dim is not None and truncate_dim not in self.config.matryoshka_dims:
            raise ValueError(f"truncate_dim: got {truncate_dim}, the model has {self.config.matryoshka_dims}.")

    def check_depth(self, depth: int | None) -> None:
        """Raises ValueError for a depth that is no exit of the model; None is the whole network."""
        exits = self.config.exits or ()
        if depth is not None and str(depth) not in map(str, exits):
            there = f"exits after the stages {exits}" if exits else "no exits"
            raise ValueError(f"depth: got {depth}, the model has {there}; None is the whole network.")

    def check_weights(self, weights: torch.Tensor | None, input_values: torch.Tensor) -> torch.Tensor | None:
        """Weights of frames [B, n] or [B, S, n] for input_values [B, T] -> [B, S, n]; None where all are ones.

        Raises ValueError for another shape, and for weights that are negative or not finite.
        """
        if weights is None:
            return None
        if weights.dim() not in (2, 3) or weights.shape[0] != input_values.shape[0] or 0 in weights.shape:
            raise ValueError(
                f"frame_weights: expected [batch, parts] or [batch, embeddings, parts] for a batch of "
                f"{input_values.shape[0]}, got shape {tuple(weights.shape)}."
            )
        if torch.compiler.is_compiling():  # looking at values would break the graph
            return weights if weights.dim() == 3 else weights[:, None]
        if not bool((weights.isfinite() & (weights >= 0)).all()):
            raise ValueError("frame_weights: expected finite numbers of at least 0.")
        if bool((weights == 1).all()):
            return None
        return weights if weights.dim() == 3 else weights[:, None]

    def lengths_of(self, input_values: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor | None:
        """input_values [B, T], attention_mask [B, T] -> samples of each utterance [B], or None when nothing is padded.

        Raises ValueError for another shape, for padding in front of audio, and for too short an utterance.
        """
        if attention_mask is None:
            return None
        if attention_mask.shape != input_values.shape:
            raise ValueError(
                f"attention_mask: shape {tuple(attention_mask.shape)} differs from input_values' "
                f"{tuple(input_values.shape)}."
            )
        mask = attention_mask.bool()
        lengths = mask.sum(1)
        if torch.compiler.is_compiling():
            return lengths  # looking at values would break the graph; the mask is then always used
        in_order = (mask[:, 1:] <= mask[:, :-1]).all()
        *ends, in_order = torch.cat([lengths, in_order[None]]).tolist()  # the one time that a GPU is waited for
        if min(ends, default=input_values.shape[1]) == input_values.shape[1]:
            return None
        if not in_order:
            raise ValueError("attention_mask: padding must follow the audio (ones, then zeros, in every row).")
        if min(ends) < self.config.min_samples:
            raise ValueError(
                f"attention_mask: utterance {ends.index(min(ends))} has {min(ends)} samples, the model needs "
                f"{self.config.min_samples}."
            )
        return lengths

    @staticmethod
    def share_of_items(loss: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor:
        """A batch's mean loss as its share in the mean over `num_items` utterances of several batches (transformers'
        Trainer, accumulating gradients); as it is for None.
        """
        return loss if num_items is None else loss * (len(labels) / num_items)

    @staticmethod
    def refuse_extras(kwargs: dict) -> None:
        """Callers such as PEFT pass unused arguments as None or False; one with a value is refused, not ignored."""
        ignorable = ("return_dict", "output_attentions", "output_hidden_states")
        given = [n for n, value in kwargs.items() if not (value is None or value is False or n in ignorable)]
        if given:
            raise TypeError(
                f"forward() got arguments this model has no use for: {', '.join(given)}. truncate_dim and "
                "depth belong to MRLReDimNetModel (heads take the whole embedding), adapter_names to a PeftModel."
            )


def _has_pickle(source: str | os.PathLike | None, options: dict) -> bool:
    """Whether a folder or Hub repository has weights in PyTorch's own format."""
    where = {name: options[name] for name in ("revision", "token", "cache_dir", "local_files_only") if name in options}
    try:
        return any(has_file(source, name, **where) for name in ("pytorch_model.bin", "pytorch_model.bin.index.json"))
    except OSError:  # no such repository, or no connection: what was raised before says so
        return False

"""Life with adapters: one base in memory, several adapters on it, a choice at every call.

    bank = AdapterBank.load("me/base", {"telephony": "me/telephony-adapter", "gender": "runs/gender"})
    bank.embed(input_values, adapter="telephony")               # None: the base itself
    bank.embed(input_values, adapter=["telephony", None])       # row by row, in one forward pass
    bank.classify(input_values, adapter="gender")               # {"female": ..., "male": ...}

Underneath is ordinary PEFT (`bank.peft`), whose choice of an adapter is a state of the modules. Several threads may use
a bank: a lock holds from choosing to the end of a forward pass, so each gets the weights it asked for.
"""

import contextlib
import copy
import math
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from peft import AdaLoraConfig, LoraConfig, PeftConfig, PeftModel, PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils import merge_utils
from peft.utils.constants import DUMMY_TARGET_MODULES
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file, save_file
from torch import nn

from configuration_mrl_redimnet import SAMPLING_RATE
from modeling_mrl_redimnet import MRLReDimNetModel
from mrl_redimnet.adapters.facts import ADAPTER_PARTS, AdapterFacts, Base, fingerprint
from mrl_redimnet.adapters.placement import adapted_layers, encoder_name, lora_config
from mrl_redimnet.adapters.strategies import truncated, with_ranks
from mrl_redimnet.folders import replace_folder

ACTIVE = "__active__"
BASE = "__base__"  # PEFT's word for no adapter; here also an adapter without layers, so that a bank may be empty
HEADS = ("classifier", "score")  # what PEFT saves beside every adapter of a sequence classification
# Initialisations that take weights out of the base: such an adapter fits only a base that was changed the same way.
MUTATING = ("pissa", "olora", "corda", "loftq", "lora_ga")
FACTOR_METHODS = {
    "linear": lambda tensors, weights, density: merge_utils.task_arithmetic(tensors, weights),
    "ties": merge_utils.ties,
    "dare_linear": merge_utils.dare_linear,
    "dare_ties": merge_utils.dare_ties,
    "magnitude_prune": merge_utils.magnitude_prune,
}
METHODS = ("cat", "svd", *FACTOR_METHODS, *(f"{name}_svd" for name in FACTOR_METHODS if name != "linear"))


@dataclass(frozen=True)
class Adapter:
    """An adapter as its folder holds it, all names as in the encoder.

    tensors: "projection.segments.0.lora_A.weight" and so on; empty once they are in a model. head: the classifier of an
    embedding. slot: whether `hot_swap` may replace it.
    """

    config: LoraConfig
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    head: nn.Linear | None = None
    facts: AdapterFacts | None = None
    slot: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is pairs of matrices and nothing else; DoRA and norms of its own are more than that."""
        return not (self.config.use_dora or self.config.modules_to_save or self.config.lora_bias)


class AdapterBank:
    """A base and its adapters, in eval mode. Adapters that classify share the encoder and keep their own classifiers.

    `peft` and `model` (the encoder, with the adapters' layers in it) are there to be looked at, and `model.compile()`
    compiles in place what the bank runs; what is active is chosen through the bank alone.
    """

    def __init__(self, model: MRLReDimNetModel, name: str, revision: str | None = None, token: str | None = None):
        """Takes over `model`: its weights are frozen, layers of it wrapped. name: for messages and saved adapters."""
        if any(isinstance(part, BaseTunerLayer) for part in model.modules()):
            raise ValueError("base: it carries adapters already. Give the plain model, then add them to the bank.")
        self.base = Base(name, revision, fingerprint(model))  # once: adapters do not change it
        self._token = token
        self.peft = PeftModel(model, LoraConfig(target_modules=DUMMY_TARGET_MODULES), adapter_name=BASE).eval()
        self._adapters: dict[str, Adapter] = {}
        self._active: str | None = None
        self._lock = threading.RLock()

    @classmethod
    def load(
        cls,
        base: str | Path | MRLReDimNetModel,
        adapters: dict[str, str | Path] | None = None,
        *,
        revision: str | None = None,
        token: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        any_base: bool = False,
    ) -> "AdapterBank":
        """A bank over `base` (folder, Hub id, or a model, which it takes over), `adapters` {name: folder or Hub id}.

        revision: of the base. dtype: to load the base in; a model keeps its own. None of the adapters is active at
        first. Raises as `add` does, FileNotFoundError for a folder that is not there.
        """
        if isinstance(base, str | Path):
            folder = local_folder(base, revision, token)
            model = MRLReDimNetModel.from_pretrained(folder, dtype=dtype or "auto")
            name = str(base)
        elif dtype is None:
            model = getattr(base, "redimnet", base)  # a head stays outside
            name = base.config.name_or_path or "a model in memory"
        else:
            raise ValueError("dtype: is for a base that is loaded here; this one is a model already.")
        name = Path(name).resolve().name if Path(name).is_dir() else name  # paths are nobody else's business
        bank = cls(model if device is None else model.to(device), name, revision, token)
        for adapter, source in (adapters or {}).items():
            bank.add(adapter, source, any_base=any_base)
        return bank

    @property
    def model(self) -> MRLReDimNetModel:
        """The encoder, with the adapters' layers in it."""
        return self.peft.get_base_model()

    @property
    def names(self) -> list[str]:
        """Of the adapters, oldest first."""
        return list(self._adapters)

    @property
    def active(self) -> str | None:
        """The adapter that `embed` uses when it is told none; None: the base itself."""
        return self._active

    def facts(self, name: str) -> AdapterFacts | None:
        """What the adapter's folder said of it; None for one made with PEFT alone."""
        return self._get(name).facts

    def add(self, name: str, source: str | Path, *, revision: str | None = None, any_base: bool = False):
        """Loads the adapter of a folder or Hub repository and calls it `name`. It does not become active.

        Raises ValueError for a name that will not do, a file that does not fit the model completely, or a kind of
        adapter that would change the base; WrongBaseError, unless any_base, where it was trained on another base. The
        bank is then as it was.
        """
        self._check_name(name)
        adapter = self._fetch(source, revision, any_base)
        with self._lock:
            self._attach(name, adapter)

    def set_adapter(self, name: str | None):
        """What `embed` uses, in all threads, when it is told none; None: the base itself."""
        with self._lock:
            if name is not None:
                self._get(name)
            self._active = name
            self._select(name)

    def disable(self):
        """Back to the base itself, bit for bit."""
        self.set_adapter(None)

    def delete(self, name: str):
        """Forgets an adapter. Was it the active one, the base is active then, and no other adapter."""
        with self._lock:
            self._get(name)
            if self._active == name:
                self.disable()
            del self._adapters[name]
            self._detach(name)

    def embed(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        adapter: str | None | Sequence[str | None] = ACTIVE,
        truncate_dim: int | None = None,
    ) -> torch.Tensor:
        """input_values [B, T] at 16 kHz, attention_mask [B, T] -> embeddings [B, D] or their first `truncate_dim`.

        adapter: a name, None for the base, or a list with one of them for each row. A list costs one forward pass;
        one per adapter in it where an adapter is DoRA or has norms of its own, or where T exceeds the model's window.
        What is active stays so, whatever happens. Raises ValueError for unknown adapters and as the model does.
        """
        with self._lock, torch.inference_mode():
            if isinstance(adapter, list | tuple):
                return self._embed_rows(input_values, attention_mask, adapter, truncate_dim)
            with self._using(self._active if adapter == ACTIVE else adapter):
                return self.model(input_values, attention_mask, truncate_dim).embeddings

    def classify(
        self, input_values: torch.Tensor, attention_mask: torch.Tensor | None = None, *, adapter: str
    ) -> dict[str, torch.Tensor] | torch.Tensor:
        """input_values [B, T], attention_mask [B, T] -> {label: probabilities [B]}, in the order of the classes.

        A regression adapter gives values [B], in the unit of its training. Without facts, labels are "0", "1" ... and
        one output is a regression. Raises ValueError for an adapter without a classifier and as `embed` does.
        """
        with self._lock, torch.inference_mode():
            known = self._get(adapter)
            if known.head is None:
                raise ValueError(f"The adapter {adapter!r} has no classifier: it is for embeddings.")
            embeddings = self.embed(input_values, attention_mask, adapter)
            logits = known.head.to(embeddings.device)(embeddings.float())
        if logits.shape[1] == 1:
            return logits[:, 0]
        labels = (known.facts and known.facts.labels) or map(str, range(logits.shape[1]))
        return dict(zip(labels, logits.softmax(-1).unbind(-1), strict=True))

    def merged(self, name: str) -> MRLReDimNetModel:
        """A plain model of its own with the adapter folded into its weights: no PEFT is needed to run, save or load it.

        The bank stays as it is; for a moment all of it is in memory twice. Raises NotImplementedError where PEFT cannot
        fold (LoRA of grouped convolutions).
        """
        with self._using(name):
            copied = copy.deepcopy(self.peft)
        model = copied.merge_and_unload(adapter_names=[name])
        return model.requires_grad_(True).eval()

    def combine(
        self,
        name: str,
        weights: dict[str, float],
        method: str = "svd",
        *,
        rank: int | None = None,
        density: float | None = None,
    ):
        """Adds the adapter `name`, made of loaded ones by {adapter: weight}.

        "cat" is exactly the weighted sum of what they add to each layer's weight, at the sum of their ranks; "svd" the
        nearest to it at `rank` (by default each layer's largest). "linear", "ties", "dare_linear", "dare_ties" and
        "magnitude_prune" mix the two factors each by itself, which needs equal ranks; with "_svd" behind (not
        "linear") they mix what is added, at any ranks, and then take the nearest at `rank`. All but the first three
        keep a share `density` of the numbers; dare chooses them by torch's random generator. A layer that only some
        adapters have is mixed of those. Classifiers are not combined.

        Raises ValueError, and leaves nothing behind, for settings that do not fit together or adapters that are more
        than plain LoRA.
        """
        with self._lock:
            self._check_name(name)
            self._check_combination(weights, method, rank, density)
            factors = {source: lora_factors(self.model, source) for source in weights}
        tensors, ranks = {}, {}
        for layer in sorted(set().union(*factors.values())):
            found = {source: factors[source][layer] for source in weights if layer in factors[source]}
            try:
                down, up = combined([*found.values()], [weights[source] for source in found], method, rank, density)
            except ValueError as error:
                raise ValueError(f"method {method!r}: {layer} of {', '.join(found)}: {error}") from error
            tensors[f"{layer}.lora_A.weight"], tensors[f"{layer}.lora_B.weight"] = down, up
            ranks[layer] = len(down)
        recipe = " + ".join(f"{weight:g} x {source}" for source, weight in weights.items())
        facts = AdapterFacts("+".join(weights), self.base, training=f"Made of others, not trained: {recipe}, {method}.")
        with self._lock:
            self._attach(name, Adapter(explicit_config(ranks), tensors, facts=facts))

    def save(self, name: str, folder: str | Path):
        """Writes an adapter folder: PEFT's two files, and the facts if there are. What was there before is replaced."""
        with self._lock:
            known = self._get(name)
            found = {key: tensor.cpu().clone() for key, tensor in adapter_tensors(self.model, name).items()}
            layers = {layer: part.r[name] for layer, part in adapted_layers(self.model, name).items()}
        config, inner = copy.copy(known.config), ""
        if known.head is not None:  # as PEFT saves it from MRLReDimNetForSequenceClassification
            config.modules_to_save, inner = [HEADS[0], *(config.modules_to_save or [])], "redimnet."
        tensors = {f"base_model.model.{inner}{key}": tensor for key, tensor in found.items()}
        if known.head is not None:
            head = known.head.state_dict()
            tensors |= {f"base_model.model.{HEADS[0]}.{key}": tensor.cpu() for key, tensor in head.items()}
        if known.facts is not None:
            config.base_model_name_or_path = known.facts.base.repository

        def write(target: Path):
            config.save_pretrained(target)
            save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
            if known.facts is not None:
                replace(known.facts, layers=layers).save(target)

        replace_folder(Path(folder), write)

    def prepare_hot_swap(self, rank: int, *, placement: str = "linear", name: str = "hot"):
        """Adds an adapter without effect at the layers of `placement`, as room for others up to `rank`.

        A compiled model notices new layers, but not new numbers in them: compile after this, then `hot_swap`.
        """
        self._check_name(name)
        with self._lock:
            config = lora_config(placement, rank, model=self.model, lora_alpha=rank, inference_mode=True)  # scaling 1
            self._attach(name, Adapter(config, slot=True))

    def hot_swap(self, source: str | Path, *, name: str = "hot", revision: str | None = None, any_base: bool = False):
        """Fills the room of `prepare_hot_swap` with another adapter, in place: a compiled model is not compiled again.

        Raises ValueError for layers outside the room, a rank above its own, DoRA and adapters with norms; otherwise as
        `add`. What was in the room is then still there. Rows of several adapters in one batch do recompile.
        """
        adapter = self._fetch(source, revision, any_base)
        with self._lock:
            slot = self._get(name)
            if not slot.slot:
                raise ValueError(f"{name!r} is an adapter like others, no room made by prepare_hot_swap.")
            room = adapter_tensors(self.model, name)
            fill(room, fitted(adapter, room))
            self._adapters[name] = replace(slot, head=adapter.head, facts=adapter.facts)

    def _get(self, name: str) -> Adapter:
        try:
            return self._adapters[name]
        except KeyError:
            raise ValueError(f"There is no adapter {name!r}; loaded are: {', '.join(self.names) or 'none'}.") from None

    def _check_name(self, name: str):
        if not name or "." in name or name in ("default", BASE, ACTIVE) or hasattr(nn.ModuleDict(), name):
            raise ValueError(f"adapter name: {name!r} means something to PEFT or torch; take a word without dots.")
        if name in self._adapters:
            raise ValueError(f"adapter name: there is a {name!r} already. Delete it, or take another name.")

    def _check_combination(self, weights: dict, method: str, rank: int | None, density: float | None):
        if method not in METHODS:
            raise ValueError(f"method: got {method!r}, expected one of {', '.join(METHODS)}.")
        if not weights:
            raise ValueError("weights: no adapter is named.")
        for source in weights:
            if not self._get(source).plain:
                raise ValueError(f"{source!r} is more than plain LoRA (DoRA, norms of its own) and cannot be combined.")
        if rank is not None and (rank < 1 or not method.endswith("svd")):
            raise ValueError(f"rank: got {rank} for {method!r}; it is a positive number, and for svd methods.")
        if method in ("cat", "svd", "linear") and density is not None:
            raise ValueError(f"density: got {density} for {method!r}, which keeps all numbers.")
        if method not in ("cat", "svd", "linear") and not 0 < (density or 0) <= 1:
            raise ValueError(f"density: got {density} for {method!r}, expected a share above 0 and up to 1.")

    def _fetch(self, source: str | Path, revision: str | None, any_base: bool) -> Adapter:
        adapter = read_adapter(local_folder(source, revision, self._token), self.model)
        facts = adapter.facts
        if facts is not None and not any_base and facts.base.fingerprint != self.base.fingerprint:
            with self._lock:
                facts.check_base(self.model, self.base.repository, self.base.revision)  # says so
        return adapter

    def _attach(self, name: str, adapter: Adapter):
        """Puts the adapter into the model and into the list, or leaves both as they were. Under the lock."""
        self._check_name(name)  # again: another thread may have been faster
        try:
            self.peft.add_adapter(name, copy.deepcopy(adapter.config))  # PEFT writes into it
            if not adapter.slot:
                fill(adapter_tensors(self.model, name), adapter.tensors)
        except BaseException:
            self.peft.peft_config.setdefault(name, adapter.config)  # PEFT deletes only what is listed
            self._detach(name)
            raise
        self.peft.eval()  # new dropouts begin in training mode
        self._adapters[name] = replace(adapter, tensors={})

    def _detach(self, name: str):
        self._select(None)  # otherwise PEFT activates an adapter of its own choice
        self.peft.base_model.delete_adapter(name)
        self._select(self._active)

    def _select(self, name: str | None):
        self.peft.set_adapter(name or BASE, inference_mode=True)

    @contextlib.contextmanager
    def _using(self, name: str | None):
        """Within, the model computes with `name`, and no other thread changes that."""
        with self._lock:
            if name is not None:
                self._get(name)
            if name == self._active:
                yield
                return
            self._select(name)
            try:
                yield
            finally:
                self._select(self._active)

    def _embed_rows(self, input_values, attention_mask, names, truncate_dim):
        if len(names) != len(input_values):
            raise ValueError(f"adapter: {len(names)} names for a batch of {len(input_values)}.")
        if attention_mask is not None and attention_mask.shape != input_values.shape:
            raise ValueError(f"attention_mask: {tuple(attention_mask.shape)} for {tuple(input_values.shape)} samples.")
        chosen = [self._get(name) for name in set(names) if name is not None]
        windowed = input_values.shape[1] > int(self.model.config.window_seconds * SAMPLING_RATE)  # row by row
        if len(set(names)) != 1 and all(adapter.plain for adapter in chosen) and not windowed:
            with self._using(None), adapters_by_row(self.model, names):
                return self.model(input_values, attention_mask, truncate_dim).embeddings
        order, parts = [], []
        for name in dict.fromkeys(names):
            rows = [row for row, other in enumerate(names) if other == name]
            mask = None if attention_mask is None else attention_mask[rows]
            with self._using(name):
                parts.append(self.model(input_values[rows], mask, truncate_dim).embeddings)
            order += rows
        back = torch.tensor(order, device=input_values.device).argsort()
        return torch.cat(parts)[back]


# ----------------------------------------------------------------------------------------------------------------------
# Files and tensors of adapters


def local_folder(source: str | Path, revision: str | None, token: str | None) -> Path:
    """`source` itself where it is a folder, else the snapshot of that Hub repository."""
    if Path(source).is_dir():
        return Path(source)
    if isinstance(source, Path) or source.startswith(("/", ".", "~")):
        raise FileNotFoundError(f"{source} is not a folder: give a saved folder, or a Hub id.")
    from mrl_redimnet.adapters.hub import pull  # here, because folders need no Hub

    return pull(source, revision=revision, token=token)


def read_adapter(folder: Path, encoder: nn.Module) -> Adapter:
    """An adapter folder that PEFT wrote, over the encoder or a model with a head, as plain LoRA where it is AdaLoRA.

    Raises ValueError for what a bank cannot hold.
    """
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise ValueError(f"{folder} is no adapter: it has no {file}.")
    config, facts = PeftConfig.from_pretrained(folder), AdapterFacts.load(folder)
    tensors = {encoder_name(key): tensor for key, tensor in load_file(folder / "adapter_model.safetensors").items()}
    if config.peft_type not in (PeftType.LORA, PeftType.ADALORA):
        raise ValueError(f"{folder} is a {config.peft_type.value} adapter, expected LORA or ADALORA.")
    if config.bias != "none":
        raise ValueError(f"{folder}: trained with bias={config.bias!r}, which changes the base.")
    if str(config.init_lora_weights).lower().startswith(MUTATING):
        raise ValueError(
            f"{folder}: initialised by {config.init_lora_weights}, which changes the base. Save it as plain LoRA, by "
            "PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    config.init_lora_weights = True  # the cheapest: all of it is overwritten
    config.modules_to_save = [encoder_name(m) for m in config.modules_to_save or () if m not in HEADS] or None
    for attribute in ("target_modules", "exclude_modules"):
        names = getattr(config, attribute)
        if not isinstance(names, str | None):
            setattr(config, attribute, {encoder_name(name) for name in names})
    if isinstance(config, AdaLoraConfig):
        try:
            config, tensors = as_plain_lora(config, tensors, encoder)
        except (AttributeError, KeyError) as error:
            raise ValueError(f"{folder} does not fit this model: {error}") from error
    for attribute in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, attribute).items()
        setattr(config, attribute, {re.sub(r"^redimnet\\?\.", "", key): value for key, value in patterns})
    head = None
    if {f"{HEADS[0]}.weight", f"{HEADS[0]}.bias"} <= tensors.keys():
        weight, bias = tensors.pop(f"{HEADS[0]}.weight"), tensors.pop(f"{HEADS[0]}.bias")
        if weight.shape[1] != encoder.config.embedding_size or (
            facts and facts.labels and len(facts.labels) != len(bias)
        ):
            raise ValueError(
                f"{folder}: its classifier {tuple(weight.shape)} fits neither this model nor its own facts: expected "
                f"(labels, {encoder.config.embedding_size}){f', labels {facts.labels}' if facts else ''}."
            )
        head = nn.Linear(*weight.T.shape)
        head.load_state_dict({"weight": weight, "bias": bias})
    return Adapter(config, tensors, head, facts)


def as_plain_lora(config: AdaLoraConfig, tensors: dict[str, torch.Tensor], encoder: nn.Module):
    """AdaLoRA as equal LoRA with a rank per layer: PEFT cannot mix, combine or swap it, or have it beside LoRA."""
    scale, ranks, changed = config.lora_alpha / (config.init_r + 1e-5), {}, dict(tensors)
    for layer in [key.removesuffix(".lora_E") for key in tensors if key.endswith(".lora_E")]:
        down, up, values = (changed.pop(f"{layer}.lora_{part}") for part in "ABE")
        shape = encoder.get_submodule(layer).weight.shape
        if len(values):  # AdaLoRA prunes some layers altogether
            changed[f"{layer}.lora_A.weight"] = (down * values).view(-1, *shape[1:])
            changed[f"{layer}.lora_B.weight"] = (up * scale).view(*up.shape, *[1] * (len(shape) - 2))
            ranks[layer] = len(values)
    if not ranks:
        raise ValueError("The adapter has learnt nothing: AdaLoRA has pruned all of it.")
    return explicit_config(ranks, task_type=config.task_type, modules_to_save=config.modules_to_save), changed


def explicit_config(ranks: dict[str, int], task_type: str = "FEATURE_EXTRACTION", **options) -> LoraConfig:
    """LoRA of scaling 1 at the layers of `ranks`, each with its rank."""
    top = max(ranks.values())
    return with_ranks(LoraConfig(task_type=task_type, r=top, lora_alpha=top, inference_mode=True, **options), ranks)


def adapter_tensors(encoder: nn.Module, name: str) -> dict[str, torch.Tensor]:
    """The tensors of one adapter in the model, not copies, by their names in an adapter's file.

    By whole parts of names: PEFT's own functions search for the adapter's name in them, and "proj" is in "projection".
    """
    found = {}
    for key, tensor in encoder.state_dict().items():
        parts = key.split(".")
        for i, (kind, owner) in enumerate(zip(parts, parts[1:], strict=False)):
            if kind in ADAPTER_PARTS and owner == name:
                kept = parts[:i] if kind == "modules_to_save" else parts[: i + 1]
                rest = [] if kind == "lora_magnitude_vector" else parts[i + 2 :]
                found[".".join(kept + rest)] = tensor
    return found


@contextlib.contextmanager
def adapters_by_row(encoder: nn.Module, names: Sequence[str | None]):
    """Within, row i of a batch goes through the adapter names[i], by PEFT's mixed batches.

    Their front door, adapter_names of PeftModel's forward, leaves hooks behind when a forward raises, and is closed as
    soon as any loaded adapter has norms of its own.
    """
    names = [name or BASE for name in names]

    def add_names(layer, args, kwargs):
        return args, {**kwargs, "adapter_names": names}

    layers = [part for part in encoder.modules() if isinstance(part, LoraLayer)]
    hooks = [layer.register_forward_pre_hook(add_names, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def fill(room: dict[str, torch.Tensor], tensors: dict[str, torch.Tensor]):
    """Copies `tensors` into those of the model; ValueError unless both have the same names and shapes."""
    problems = [f"{key} has no place in the model" for key in tensors.keys() - room.keys()]
    problems += [f"{key} is not in the file" for key in room.keys() - tensors.keys()]
    problems += [
        f"{key} is {tuple(tensor.shape)} in the file, {tuple(room[key].shape)} in the model"
        for key, tensor in tensors.items()
        if key in room and room[key].shape != tensor.shape
    ]
    if problems:
        shown = "; ".join(sorted(problems)[:3])
        raise ValueError(f"The adapter does not fit this model, {len(problems)} tensors differ: {shown} ...")
    for key, tensor in tensors.items():
        room[key].copy_(tensor)


def fitted(adapter: Adapter, room: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The adapter in the shapes of `room`: zeros where it has less, and its scaling in B, as the room's own is 1."""
    if not adapter.plain:
        raise ValueError("Only plain LoRA can be swapped in, no DoRA or norms of its own: use add.")
    layers = {key: key.rsplit(".lora_", 1)[0] for key in room.keys() | adapter.tensors.keys()}
    wanted = {key for key in room if check_target_module_exists(adapter.config, layers[key])}
    if wanted != adapter.tensors.keys():
        outside, absent = (adapter.tensors.keys() - room.keys()), sorted(wanted - adapter.tensors.keys())
        what = f"outside the room: {sorted({layers[key] for key in outside})[:3]}; not in its file: {absent[:3]}"
        raise ValueError(f"The adapter does not fit what prepare_hot_swap made room for ({what}).")
    filling = {key: torch.zeros_like(tensor) for key, tensor in room.items()}
    for key, tensor in adapter.tensors.items():
        dim = 0 if ".lora_A." in key else 1
        rank, most = tensor.shape[dim], filling[key].shape[dim]
        if rank > most:
            raise ValueError(f"{layers[key]} has rank {rank}, prepare_hot_swap made room for {most}.")
        space = filling[key].narrow(dim, 0, rank)
        fill({key: space}, {key: tensor if dim == 0 else tensor * scaling(adapter.config, layers[key], rank)})
    return filling


def scaling(config: LoraConfig, layer: str, rank: int) -> float:
    """What PEFT multiplies the B A of a layer with."""
    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, layer), config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)


# ----------------------------------------------------------------------------------------------------------------------
# Combinations


def lora_factors(encoder: nn.Module, name: str) -> dict[str, tuple[torch.Tensor, torch.Tensor, float]]:
    """Copies of each layer's A [r, in, ...] and B [out, r, ...], and its scaling."""
    return {
        layer: (
            part.lora_A[name].weight.detach().clone(),
            part.lora_B[name].weight.detach().clone(),
            part.scaling[name],
        )
        for layer, part in adapted_layers(encoder, name).items()
    }


def combined(
    factors: list[tuple[torch.Tensor, torch.Tensor, float]],
    weights: list[float],
    method: str,
    rank: int | None,
    density: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One layer's A and B, scaling 1, of several adapters'; see `AdapterBank.combine`."""
    if any(len(down) != up.shape[1] for down, up, _ in factors):
        raise ValueError("convolutions in groups cannot be combined.")
    scales = [weight * scale for weight, (*_, scale) in zip(weights, factors, strict=True)]
    downs, ups = [down.flatten(1) for down, *_ in factors], [up.flatten(1) for _, up, _ in factors]
    rank = rank or max(map(len, downs))
    if method in ("cat", "svd"):
        down, up = torch.cat(downs), torch.cat([up * scale for up, scale in zip(ups, scales, strict=True)], dim=1)
    elif method.endswith("_svd"):
        products = [scale * (up @ down) for up, down, (*_, scale) in zip(ups, downs, factors, strict=True)]
        up = FACTOR_METHODS[method.removesuffix("_svd")](products, torch.tensor(weights).to(products[0]), density)
        down = torch.eye(up.shape[1]).to(up)
    elif len({len(down) for down in downs}) > 1:
        ranks = ", ".join(str(len(down)) for down in downs)
        raise ValueError(f"ranks {ranks} differ; cat, svd and the methods with _svd behind take any.")
    else:  # as PEFT: a root of the weight on either factor, its sign on one
        roots = torch.tensor([abs(scale) ** 0.5 for scale in scales]).to(downs[0])
        signs = torch.tensor([math.copysign(1.0, scale) for scale in scales]).to(downs[0])
        mix = FACTOR_METHODS[method]
        down, up = mix(downs, roots * signs, density), mix(ups, roots, density)
    if method.endswith("svd"):
        down, up, _ = truncated(down, up, rank)
    return down.view(-1, *factors[0][0].shape[1:]), up.view(*up.shape, *factors[0][1].shape[2:])

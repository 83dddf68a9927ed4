"""Life with adapters: one base in memory, several adapters on it, a choice at every call.

    bank = AdapterBank.load("me/base", {"telephony": "me/telephony-adapter", "gender": "runs/gender"})
    bank.embed(input_values, adapter="telephony")               # None: the base itself
    bank.embed(input_values, adapter=["telephony", None])       # row by row, in one forward pass
    bank.classify(input_values, adapter="gender")               # {"female": ..., "male": ...}

Underneath is ordinary PEFT (`bank.peft`), whose choice of an adapter is a state of the modules. Several threads may use
a bank: a lock holds from choosing to the end of a forward pass, so each gets the weights it asked for. Where nothing is
to be chosen, because rows name their adapters, forward passes of several threads run at once.
"""

import contextlib
import copy
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.constants import DUMMY_TARGET_MODULES
from safetensors.torch import save_file
from torch import nn
from torch.utils.hooks import RemovableHandle

from configuration_mrl_redimnet import SAMPLING_RATE
from modeling_mrl_redimnet import MRLReDimNetModel
from mrl_redimnet.adapters.combining import METHODS, combined, lora_factors
from mrl_redimnet.adapters.facts import AdapterFacts, Base, labelled
from mrl_redimnet.adapters.hub import local_folder
from mrl_redimnet.adapters.locks import SharedLock
from mrl_redimnet.adapters.placement import adapted_layers, lora_config
from mrl_redimnet.adapters.stored import (
    HEADS,
    Adapter,
    adapter_tensors,
    cut,
    fill,
    fitted,
    read_adapter,
)
from mrl_redimnet.adapters.strategies import explicit_config
from mrl_redimnet.files import replace_folder
from mrl_redimnet.fingerprints import fingerprint, same_weights
from mrl_redimnet.saving import resolve_model
from mrl_redimnet.speed import speed_up

ACTIVE = "__active__"
BASE = "__base__"  # PEFT's word for no adapter; here also an adapter without layers, so that a bank may be empty


class AdapterBank:
    """A base and its adapters, in eval mode. Adapters that classify share the encoder and keep their own classifiers.

    `peft` and `model` (the encoder, with the adapters' layers in it) are there to be looked at, and `model.compile()`
    compiles in place what the bank runs; what is active is chosen through the bank alone.
    """

    def __init__(
        self, model: MRLReDimNetModel, name: str, revision: str | None = None, token: str | None = None
    ) -> None:
        """Takes over `model`: its weights are frozen, layers of it wrapped. name: for messages and saved adapters."""
        if any(isinstance(part, BaseTunerLayer) for part in model.modules()):
            raise ValueError("base: it carries adapters already. Give the plain model, then add them to the bank.")
        self.base = Base(name, revision, fingerprint(model))  # once: adapters do not change it
        self._token = token
        speed_up(model)
        self.peft = PeftModel(
            speed_up(model), LoraConfig(target_modules=DUMMY_TARGET_MODULES), adapter_name=BASE
        ).eval()
        self._adapters: dict[str, Adapter] = {}
        self._active: str | None = None
        self._lock = SharedLock()
        self._rows = RowsByAdapter()

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
        """A bank over `base` (as of `mrl_redimnet.saving.resolve_model`, or a model, which it takes over), `adapters`
        {name: folder or Hub id}.

        revision: of the base. dtype: to load the base in; a model keeps its own. None of the adapters is active at
        first. Raises as `add` does, FileNotFoundError for a folder that is not there.
        """
        if isinstance(base, str | Path):
            folder = local_folder(resolve_model(base), revision, token)
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

    def fingerprint(self, name: str | None) -> str:
        """Names the weights that embed with an adapter, or with None, as `SpeakerEncoder.fingerprint` does.

        One that was combined here and is in no file has a name that nothing saved is for.
        """
        if name is None:
            return self.base.fingerprint
        return f"{self.base.fingerprint}+{self._get(name).digest or 'unsaved'}"

    def add(
        self,
        name: str,
        source: str | Path,
        *,
        rank: int | None = None,
        revision: str | None = None,
        any_base: bool = False,
    ) -> None:
        """Loads the adapter of a folder or Hub repository and calls it `name`. It does not become active.

        rank: to cut it to, in every layer: a smaller adapter, which answers a little differently. One that was trained
        with the strategy matryoshka gives its first components, any other what is nearest to it by SVD.

        Raises ValueError for a name that will not do, a file that does not fit the model completely, a rank it does
        not have, or a kind of adapter that would change the base; WrongBaseError, unless any_base, where it was trained
        on another base. The bank is then as it was.
        """
        self._check_name(name)
        adapter = self._fetch(source, revision, any_base)
        if rank is not None:
            adapter = cut(adapter, rank)
        with self._lock:
            self._attach(name, adapter)

    def set_adapter(self, name: str | None) -> None:
        """What `embed` uses, in all threads, when it is told none; None: the base itself."""
        with self._lock:
            if name is not None:
                self._get(name)
            self._active = name
            self._select(name)

    def disable(self) -> None:
        """Back to the base itself, bit for bit."""
        self.set_adapter(None)

    def delete(self, name: str) -> None:
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
        On a GPU that one pass waits for the host at every adapted layer (see `adapters_by_row`): for large batches of
        few adapters a call for each may be faster.
        What is active stays so, whatever happens. Raises ValueError for unknown adapters and as the model does.
        """
        if isinstance(adapter, list | tuple):
            with self.held(adapter, input_values.shape[1]), torch.inference_mode():
                return self._embed_rows(input_values, attention_mask, adapter, truncate_dim)
        with self._lock.shared(), torch.inference_mode():
            if adapter in (ACTIVE, self._active):  # nothing is to be chosen
                return self.model(input_values, attention_mask, truncate_dim).embeddings
        with self._using(cast("str | None", adapter)), torch.inference_mode():
            return self.model(input_values, attention_mask, truncate_dim).embeddings

    def classify(
        self, input_values: torch.Tensor, attention_mask: torch.Tensor | None = None, *, adapter: str
    ) -> dict[str, torch.Tensor] | torch.Tensor:
        """input_values [B, T], attention_mask [B, T] -> {label: probabilities [B]}, in the order of the classes.

        A regression adapter gives values [B], in the unit of its training. Without facts, labels are "0", "1" ... and
        one output is a regression. Raises ValueError for an adapter without a classifier and as `embed` does.
        """
        with self._lock, torch.inference_mode():
            self._head(adapter)  # before the network runs
            return self.classify_embeddings(self.embed(input_values, attention_mask, adapter), adapter)

    def classify_embeddings(self, embeddings: torch.Tensor, adapter: str) -> dict[str, torch.Tensor] | torch.Tensor:
        """As `classify`, from what `embed` gave for this adapter: whole embeddings [B, D]."""
        with self._lock, torch.inference_mode():
            head, facts = self._head(adapter), self._get(adapter).facts
            logits = head.to(embeddings.device)(embeddings.float())
        labels = (facts and facts.labels) or [str(number) for number in range(logits.shape[1])]
        return labelled(logits, labels)

    @contextlib.contextmanager
    def held(self, names: Sequence[str | None], samples: int) -> Iterator[None]:
        """Within, no other thread adds, removes or chooses adapters: several calls see the same ones.

        names, samples: of the batch that `embed` is given within, the adapters of its rows and its length. Where such
        rows can name their adapters in one pass, other threads may embed meanwhile; else they wait.
        """
        with self._lock.shared():
            if self._active is None and self._in_one_pass(names, samples):
                yield
                return
        with self._lock:
            yield

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
    ) -> None:
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

    def save(self, name: str, folder: str | Path) -> None:
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

        def write(target: Path) -> None:
            config.save_pretrained(target)
            save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
            if known.facts is not None:
                replace(known.facts, layers=layers).save(target)

        replace_folder(Path(folder), write)

    def prepare_hot_swap(self, rank: int, *, placement: str = "linear", name: str = "hot") -> None:
        """Adds an adapter without effect at the layers of `placement`, as room for others up to `rank`.

        A compiled model notices new layers, but not new numbers in them: compile after this, then `hot_swap`.
        """
        self._check_name(name)
        with self._lock:
            config = lora_config(placement, rank, model=self.model, lora_alpha=rank, inference_mode=True)  # scaling 1
            self._attach(name, Adapter(config, slot=True))

    def hot_swap(
        self, source: str | Path, *, name: str = "hot", revision: str | None = None, any_base: bool = False
    ) -> None:
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
            self._adapters[name] = replace(slot, head=adapter.head, facts=adapter.facts, digest=adapter.digest)

    def _get(self, name: str) -> Adapter:
        try:
            return self._adapters[name]
        except KeyError:
            raise ValueError(f"There is no adapter {name!r}; loaded are: {', '.join(self.names) or 'none'}.") from None

    def _head(self, name: str) -> nn.Module:
        head = self._get(name).head
        if head is None:
            raise ValueError(f"The adapter {name!r} has no classifier: it is for embeddings.")
        return head

    def _check_name(self, name: str) -> None:
        if not name or "." in name or name in ("default", BASE, ACTIVE) or hasattr(nn.ModuleDict(), name):
            raise ValueError(f"adapter name: {name!r} means something to PEFT or torch; take a word without dots.")
        if name in self._adapters:
            raise ValueError(f"adapter name: there is a {name!r} already. Delete it, or take another name.")

    def _check_combination(self, weights: dict, method: str, rank: int | None, density: float | None) -> None:
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
        if facts is not None and not any_base and not same_weights(facts.base.fingerprint, self.base.fingerprint):
            with self._lock:
                facts.check_base(self.model, self.base.repository, self.base.revision)  # says so
        return adapter

    def _attach(self, name: str, adapter: Adapter) -> None:
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

    def _detach(self, name: str) -> None:
        self._select(None)  # otherwise PEFT activates an adapter of its own choice
        self.peft.base_model.delete_adapter(name)
        self._select(self._active)

    def _select(self, name: str | None) -> None:
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

    def _embed_rows(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None,
        names: Sequence[str | None],
        truncate_dim: int | None,
    ) -> torch.Tensor:
        if len(names) != len(input_values):
            raise ValueError(f"adapter: {len(names)} names for a batch of {len(input_values)}.")
        if attention_mask is not None and attention_mask.shape != input_values.shape:
            raise ValueError(f"attention_mask: {tuple(attention_mask.shape)} for {tuple(input_values.shape)} samples.")
        for name in names:
            if name is not None:
                self._get(name)
        if self._in_one_pass(names, input_values.shape[1]):
            if self._active is None and set(names) == {None}:  # nothing is to be chosen
                return self.model(input_values, attention_mask, truncate_dim).embeddings
            # Also for rows of one adapter, unless it is in use: to choose it and go back costs more with more loaded.
            if set(names) != {self._active}:
                with contextlib.nullcontext() if self._active is None else self._using(None):
                    with self._rows.named(self.model, names):
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

    def _in_one_pass(self, names: Sequence[str | None], samples: int) -> bool:
        """Whether rows of these adapters, padded to so many samples, can go through the network together: not with
        adapters that are more than layers of LoRA, nor beyond the window, where the model takes row by row.
        """
        known = [self._adapters[name] for name in names if name in self._adapters]
        return all(adapter.plain for adapter in known) and samples <= self.model.config.window_seconds * SAMPLING_RATE


class RowsByAdapter:
    """Sends row i of a batch through the adapter names[i], by PEFT's mixed batches, in several threads at once.

    In each layer PEFT sends the row numbers of each adapter to the device and waits for them, however the rows are
    sorted; it has no way to be given them.

    Their front door, adapter_names of PeftModel's forward, leaves hooks behind when a forward raises, and is closed as
    soon as any loaded adapter has norms of its own. The hooks here are there while any thread is within `named`.
    """

    def __init__(self) -> None:
        self._changing = threading.Lock()
        self._inside = 0  # threads
        self._hooks: list[RemovableHandle] = []
        self._own = threading.local()

    @contextlib.contextmanager
    def named(self, encoder: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
        """Within, for this thread's forward passes of `encoder`, whose layers must stay the same ones meanwhile."""
        self._own.names = [name or BASE for name in names]
        with self._changing:
            if not self._inside:
                layers = [part for part in encoder.modules() if isinstance(part, LoraLayer)]
                self._hooks = [layer.register_forward_pre_hook(self._add_names, with_kwargs=True) for layer in layers]
            self._inside += 1
        try:
            yield
        finally:
            self._own.names = None
            with self._changing:
                self._inside -= 1
                if not self._inside:
                    for hook in self._hooks:
                        hook.remove()

    def _add_names(self, layer: nn.Module, args: tuple, kwargs: dict | None = None) -> tuple[tuple, dict] | None:
        # A thread that has named no rows is not within `named`, and can meet the hooks while they come or go: for a
        # moment torch then gives them no keyword arguments. It goes on as if they were not there.
        names = getattr(self._own, "names", None)
        return None if names is None else (args, {**(kwargs or {}), "adapter_names": names})

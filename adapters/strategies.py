"""How an adapter's ranks come about during training: the four strategies of arXiv 2401.10447, and MatryoshkaLoRA of
arXiv 2605.07850, one class each.

A strategy puts a trainable adapter on a model and follows it through the run; the loop calls it at fixed points:

    strategy = STRATEGIES[name](host, plan, probe)      PEFT layers are in, only they train
    loss + strategy.penalty()                           every micro-batch
    strategy.after_step(step, skipped)                  after every optimiser step, gradients still there
    strategy.cut()                                      at step `plan.cut_step` if `changes_ranks`: new layers, so a new
                                                        optimiser; returns what to print
    strategy.save(folder)                               an ordinary LoRA adapter, whatever the strategy
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import AdaLoraConfig, EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import get_eva_state_dict, initialize_lora_eva_weights
from peft.utils import ModulesToSaveWrapper, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import save_file
from torch import nn

from mrl_redimnet.adapters.placement import adapted_layers, encoder_name, lora_config

ADAPTER = "default"  # PEFT writes the adapter of this name to the top of a folder
# Initialisations that move weights into the adapter, out of the base; saved adapters are turned back into plain ones.
MUTATING = ("pissa", "olora")


@dataclass(frozen=True)
class AdapterPlan:
    """What an adapter is to be.

    steps: of the run, from first_step on when it is resumed. start_rank: of dynamic and warm_up. cut_step: where
    warm_up cuts; a run that begins there or later begins with the final ranks. norms: batch norms of the encoder adapt
    as well. options: of `lora_config`. known_ranks: of an earlier part of the run, where they came from the data.
    """

    steps: int
    placement: str = "linear"
    rank: int = 8
    segment_ranks: list[int] = field(default_factory=list)
    start_rank: int = 16
    cut_step: int = 0
    first_step: int = 0
    norms: bool = False
    task_type: str = "FEATURE_EXTRACTION"
    options: dict = field(default_factory=dict)
    known_ranks: dict[str, int] | None = None


@dataclass(frozen=True)
class Probe:
    """A few training batches, to look at the data before training: the same ones at each call of `batches`.

    loss: of one batch, by the model with its head.
    """

    batches: Callable[[], list[dict]]
    loss: Callable[[dict], torch.Tensor]


class Vanilla:
    """One rank, from the first step to the last; with PEFT's initialisations."""

    ranks_from_data = False  # whether they have to be kept for a resumed run

    def __init__(self, host: nn.Module, plan: AdapterPlan, probe: Probe) -> None:
        """host: what PEFT is to wrap, in place: the encoder, or a model whose head is to travel with the adapter."""
        self.host, self.plan, self.probe = host, plan, probe
        self.peft = self._wrap(self._config())
        if isinstance(init := self.config.init_lora_weights, str):
            self._initialise(init)

    @property
    def config(self) -> LoraConfig:
        """PEFT's configuration of the adapter as it now is."""
        return self.peft.peft_config[ADAPTER]

    @property
    def changes_ranks(self) -> bool:
        """Whether a `cut`, a method of strategies that have one, is still to come."""
        return False

    @property
    def nested_ranks(self) -> list[int]:
        """The ranks that the saved adapter can be cut to by its first components, the largest last; else none."""
        return []

    def settled(self, step: int) -> bool:
        """Whether the ranks after `step` steps are final: only then a model may be chosen as the best."""
        return not self.changes_ranks

    def penalty(self) -> torch.Tensor | float:
        """What is added to the loss."""
        return 0.0

    def after_step(self, step: int, skipped: bool = False) -> None:
        """Called after optimiser step `step`, before gradients are cleared; skipped: they were not finite, and the
        step was left out.
        """

    def state(self) -> object | None:
        """An object with state_dict and load_state_dict that checkpoints must hold, besides tensors."""
        return None

    def ranks(self) -> dict[str, int]:
        """The rank of every adapted layer, by its name in the encoder."""
        return {name: layer.r[ADAPTER] for name, layer in adapted_layers(self.peft).items()}

    def save(self, folder: Path) -> None:
        """Writes adapter_config.json and adapter_model.safetensors to `folder`."""
        start = getattr(self, "start_folder", None)
        self.peft.save_pretrained(folder, path_initial_model_for_weight_conversion=start, save_embedding_layers=False)
        (folder / "README.md").unlink(missing_ok=True)  # PEFT's card; ours states what was measured

    def _write_pairs(self, folder: Path, pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Saves, instead of PEFT's own tensors, `pairs` of A and B by layer, scaling 1; with what is trained whole."""
        state = get_peft_model_state_dict(self.peft, save_embedding_layers=False)
        whole = {key: value for key, value in state.items() if ".lora_" not in key}
        write_plain_lora(folder, pairs, whole, self.config, self.host)

    def _config(self) -> LoraConfig:
        return self._lora(self.plan.rank)

    def _lora(self, rank: int, **options: Any) -> LoraConfig:
        plan = self.plan
        options = {"task_type": plan.task_type, **plan.options, **options}
        if isinstance(options.get("eva_config"), dict):
            options["eva_config"] = EvaConfig(**options["eva_config"])
        if plan.norms:
            options["modules_to_save"] = [*(options.get("modules_to_save") or []), *batch_norms(self.host)]
        config = lora_config(plan.placement, rank, model=self.host, segment_ranks=plan.segment_ranks, **options)
        return config if plan.known_ranks is None else with_ranks(config, plan.known_ranks)

    def _wrap(self, config: LoraConfig) -> PeftModel:
        peft = get_peft_model(self.host, config, adapter_name=ADAPTER)
        if not adapted_layers(peft):
            raise ValueError(f"placement {self.plan.placement}: no layer of this model is reached.")
        return peft

    def _initialise(self, init: str) -> None:
        """What an initialisation needs beyond the weights: batches, or a copy of the adapter's first state."""
        if init == "eva":
            self.ranks_from_data = True
            batches = [{"input_values": batch["input_values"]} for batch in self.probe.batches()]
            rows, wanted = len(batches[0]["input_values"]), self.plan.rank * self.config.eva_config.rho
            if rows < wanted and "projection" in str(self.config.target_modules):
                raise ValueError(
                    f"init_lora_weights eva: the projection sees one row per crop; batch_size {rows} is below rank x "
                    f"rho = {wanted:g}, and PEFT would wait for ever. Use larger batches, or a lower rank or rho."
                )
            self.peft.eval()  # what layers see in use
            state = get_eva_state_dict(
                self.peft,
                batches,
                forward_fn=lambda model, batch: model(**batch),
                prepare_model_inputs_fn=None,
                prepare_layer_inputs_fn=lambda inputs, model, name: inputs[0].flatten(0, -2),
                gather_distributed_inputs=False,  # they are the same in every process
                show_progress_bar=False,
            )
            state = of_first_process({name: directions.cpu() for name, directions in state.items()})
            initialize_lora_eva_weights(self.peft, eva_state_dict=state)

    def keep_start(self, folder: Path) -> None:
        """Writes the adapter's first state to `folder`, where the initialisation has moved the base's weights."""
        if str(self.config.init_lora_weights).startswith(MUTATING):
            if not (folder / "adapter_config.json").is_file():
                self.peft.save_pretrained(folder, save_embedding_layers=False)
            self.start_folder = str(folder)


class WarmUp(Vanilla):
    """A high rank first; then each pair is replaced by its best approximation of the final rank, by SVD."""

    @property
    def changes_ranks(self) -> bool:
        """Whether the ranks are still those of the start, with the step of the cut to come."""
        return self.plan.first_step < self.plan.cut_step and self.config.r == self.plan.start_rank

    def _config(self) -> LoraConfig:
        return self._lora(self.plan.rank if self.plan.first_step >= self.plan.cut_step else self.plan.start_rank)

    def cut(self) -> str:
        """Every pair B A becomes its truncated SVD; reports how much of it, and of the embeddings, that keeps."""
        batch = {"input_values": self.probe.batches()[0]["input_values"]}
        before = self._answers(batch)
        state = get_peft_model_state_dict(self.peft, save_embedding_layers=False)
        kept, products = {}, lora_products(self.peft)
        originals = {n: part.original_module for n, part in self.host.named_modules() if is_saved_whole(part)}
        self.peft.unload()
        for name, module in originals.items():  # in whose places PEFT leaves the trained copies
            self.host.set_submodule(name, module)
        self.peft = self._wrap(self._lora(self.plan.rank))
        for name, layer in adapted_layers(self.peft).items():
            down, up, kept[name] = truncated(*products[name], layer.r[ADAPTER])
            scale = layer.scaling[ADAPTER]
            layer.lora_A[ADAPTER].weight.data.copy_(down.view_as(layer.lora_A[ADAPTER].weight))
            layer.lora_B[ADAPTER].weight.data.copy_((up / scale).view_as(layer.lora_B[ADAPTER].weight))
        whole = {key: value for key, value in state.items() if ".lora_" not in key}  # modules_to_save
        if whole:
            set_peft_model_state_dict(self.peft, whole)
        after = self._answers(batch)
        cosine = float(torch.cosine_similarity(before, after).mean())
        worst = min(kept, key=kept.__getitem__)
        return (
            f"Rank {self.plan.start_rank} cut to {self.plan.rank}: on average {sum(kept.values()) / len(kept):.1%} of "
            f"the energy of a layer's change is kept, at least {kept[worst]:.1%} ({worst}); embeddings before and "
            f"after have a mean cosine of {cosine:.5f}."
        )

    @torch.no_grad()
    def _answers(self, batch: dict) -> torch.Tensor:
        model = self.peft.get_base_model()
        training = model.training
        answers = model.eval()(**batch).embeddings.float()
        model.train(training)
        return answers


class Dynamic(Vanilla):
    """AdaLoRA (arXiv 2303.10512): starts at `start_rank`, prunes singular directions to `rank` on average."""

    def _config(self) -> AdaLoraConfig:
        plan, lora = self.plan, self._lora(self.plan.start_rank)
        if lora.rank_pattern or lora.use_dora or lora.use_rslora or plan.placement in ("conv", "all"):
            raise ValueError(
                "strategy dynamic finds ranks itself, of linear layers: leave out segment_ranks, rank_pattern, "
                "use_dora, use_rslora and the placements conv and all."
            )
        return AdaLoraConfig(
            task_type=plan.task_type,
            target_modules=lora.target_modules,
            exclude_modules=lora.exclude_modules,
            modules_to_save=lora.modules_to_save,
            lora_alpha=lora.lora_alpha,
            lora_dropout=lora.lora_dropout,
            init_r=plan.start_rank,
            target_r=plan.rank,
            tinit=plan.steps // 10,
            tfinal=3 * plan.steps // 10,
            deltaT=max(1, plan.steps // 100),
            total_step=plan.steps,
        )

    def settled(self, step: int) -> bool:
        """Whether AdaLoRA has done its last pruning by `step`."""
        return step > self.config.total_step - self.config.tfinal

    def penalty(self) -> torch.Tensor:
        """The orthogonality term, which PEFT adds only to a loss that its own forward computes."""
        terms = []
        for name, weight in self.peft.named_parameters():
            if f"lora_A.{ADAPTER}" in name or f"lora_B.{ADAPTER}" in name:
                square = weight @ weight.T if "lora_A" in name else weight.T @ weight
                terms.append(torch.dist(square, torch.eye(len(square), device=square.device)))
        return self.config.orth_reg_weight * torch.stack(terms).mean()

    def after_step(self, step: int, skipped: bool = False) -> None:
        """Lets AdaLoRA weigh the singular directions by their gradients, and prune them where it is time to."""
        # Gradients that are not finite would stay in PEFT's running averages for good. From the last allocation on it
        # looks at the averages alone, and must not miss that step.
        if not skipped or step >= self.config.total_step - self.config.tfinal:
            self.peft.base_model.update_and_allocate(step)

    def state(self) -> object:
        """AdaLoRA's running averages of the directions' importance."""
        return _AllocatorState(self.peft)

    def ranks(self) -> dict[str, int]:
        """How many directions of every adapted layer are in use, by the layer's name in the encoder."""
        return {name: int(self._kept(layer).sum()) for name, layer in adapted_layers(self.peft).items()}

    @staticmethod
    def _kept(layer: nn.Module) -> torch.Tensor:
        """Which of a layer's directions are in use: pruned ones have a singular value of exactly zero."""
        return layer.lora_E[ADAPTER].detach()[:, 0] != 0

    def save(self, folder: Path) -> None:
        """As plain LoRA with a rank per layer: unlike AdaLoRA's own file it can be mixed, combined and hot-swapped."""
        pairs = {}
        for name, layer in adapted_layers(self.peft).items():
            keep, scale = self._kept(layer), layer.scaling[ADAPTER] / (float(layer.ranknum[ADAPTER]) + 1e-5)
            if keep.any():
                down = (layer.lora_A[ADAPTER] * layer.lora_E[ADAPTER]).detach()[keep]
                pairs[name] = (down, layer.lora_B[ADAPTER].detach()[:, keep] * scale)
        if not pairs:
            raise ValueError("The adapter has learnt nothing yet: all its singular values are zero.")
        self._write_pairs(folder, pairs)


class Mixed(Vanilla):
    """A rank per layer, set before training by what a short probe of the data says each layer has to learn.

    The gradient of the loss with respect to a layer's weight, summed over the probe, is decomposed; its squared k-th
    singular value over the parameters of one more rank is what the k-th rank of this layer is worth. Ranks are handed
    out by worth until there are as many parameters as one rank everywhere would have.
    """

    ranks_from_data = True

    def _config(self) -> LoraConfig:
        uniform = self._lora(self.plan.rank)
        if uniform.rank_pattern and self.plan.known_ranks is None:
            raise ValueError("strategy mixed finds ranks itself: leave out segment_ranks and rank_pattern.")
        if self.plan.known_ranks is not None:
            return uniform
        gradients = probe_gradients(self.host, uniform, self.probe)
        return with_ranks(uniform, of_first_process(ranks_by_worth(gradients, self.plan.rank)))


class Matryoshka(Vanilla):
    """One adapter for several ranks (MatryoshkaLoRA, arXiv 2605.07850): its first k components are one of rank k.

    The ranks k are 1, 2, 4 ... and `rank` itself. A fixed diagonal between A and B makes of their product the mean of
    the nested adapters, each scaled by rank / k as usual: what is trained is all of them, at the price of one. Early
    components are in most of them, and have the largest part in each. The diagonal is saved in A.
    """

    def __init__(self, host: nn.Module, plan: AdapterPlan, probe: Probe) -> None:
        super().__init__(host, plan, probe)
        for layer in adapted_layers(self.peft).values():
            down = layer.lora_A[ADAPTER]
            diagonal = nested_weights(self.nested_ranks, layer.r[ADAPTER]).to(down.weight.device)
            # Along the components of its output: the last axis, of a convolution the channels.
            diagonal = diagonal.view(-1, *[1] * (down.weight.dim() - 2))
            down.register_buffer("diagonal", diagonal, persistent=False)  # moves with the layer, is in no checkpoint
            down.register_forward_hook(weighed)

    @property
    def nested_ranks(self) -> list[int]:
        """Powers of two below the largest rank of a layer, and that rank."""
        most = max(self.ranks().values())
        return [*(1 << power for power in range(most.bit_length()) if 1 << power < most), most]

    def _config(self) -> LoraConfig:
        lora = super()._config()
        if lora.use_dora or lora.lora_bias or str(lora.init_lora_weights).startswith(MUTATING):
            raise ValueError(
                "strategy matryoshka: an adapter for several ranks is A and B alone, and begins without effect: leave "
                "out use_dora, lora_bias and init_lora_weights pissa and olora."
            )
        return lora

    def save(self, folder: Path) -> None:
        """As plain LoRA, whose first k components of each layer are the adapter of rank k, up to a factor."""
        pairs = {}
        for name, layer in adapted_layers(self.peft).items():
            down, up = layer.lora_A[ADAPTER], layer.lora_B[ADAPTER].weight.detach()
            weighted = down.weight.detach() * down.diagonal.view(-1, *[1] * (down.weight.dim() - 1))
            pairs[name] = (weighted, up * layer.scaling[ADAPTER])
        self._write_pairs(folder, pairs)


STRATEGIES: dict[str, type[Vanilla]] = {
    "vanilla": Vanilla,
    "dynamic": Dynamic,
    "warm_up": WarmUp,
    "mixed": Mixed,
    "matryoshka": Matryoshka,
}


# ----------------------------------------------------------------------------------------------------------------------
# In the order of use


def of_first_process(found: Any) -> Any:
    """The first process's value in all. What is found in data may differ in rounding, and so in ranks, from one GPU to
    another, and processes can only train layers of the same shapes.
    """
    return broadcast_object_list([found])[0]


def nested_weights(ranks: list[int], size: int) -> torch.Tensor:
    """[size]: what `Matryoshka` weighs a layer's components with, for adapters of these `ranks`, in falling order.

    The nested adapter of rank k has its first k components at size / k each, one that is larger than the layer all
    `size` at 1. The mean of these over the ranks is what a component has.
    """
    of_ranks = [min(rank, size) for rank in ranks]
    return torch.tensor([sum(size / k for k in of_ranks if k > i) / len(ranks) for i in range(size)])


def weighed(down: nn.Module, inputs: tuple, components: torch.Tensor) -> torch.Tensor:
    """A hook of A: its output with each component times its entry of the diagonal."""
    return components * down.diagonal.to(components.dtype)


def is_saved_whole(part: nn.Module) -> bool:
    """Whether a module is one of PEFT's modules_to_save."""
    return isinstance(part, ModulesToSaveWrapper)


def batch_norms(host: nn.Module) -> list[str]:
    """Encoder-level names of all batch norms."""
    return [encoder_name(name) for name, part in host.named_modules() if isinstance(part, nn.BatchNorm1d)]


def with_ranks(config: LoraConfig, ranks: dict[str, int]) -> LoraConfig:
    """`config` at exactly the layers of `ranks` (encoder-level names), each with its rank and the same alpha / r."""
    changed = copy.copy(config)
    scale = config.lora_alpha / config.r
    escaped = {name.replace(".", r"\."): rank for name, rank in ranks.items()}
    changed.target_modules = set(ranks)
    changed.rank_pattern = escaped
    changed.alpha_pattern = {name: scale * rank for name, rank in escaped.items()}
    return changed


def explicit_config(ranks: dict[str, int], task_type: str = "FEATURE_EXTRACTION", **options: Any) -> LoraConfig:
    """LoRA of scaling 1 at the layers of `ranks`, each with its rank."""
    top = max(ranks.values())
    return with_ranks(LoraConfig(task_type=task_type, r=top, lora_alpha=top, inference_mode=True, **options), ranks)


def lora_products(peft: PeftModel) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Each layer's pair as matrices, scaling in B: A [r, in], B [out, r]."""
    return {
        name: (
            layer.lora_A[ADAPTER].weight.detach().flatten(1),
            layer.lora_B[ADAPTER].weight.detach().flatten(1) * layer.scaling[ADAPTER],
        )
        for name, layer in adapted_layers(peft).items()
    }


def truncated(down: torch.Tensor, up: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """The pair of `rank` nearest to B A in the Frobenius norm (Eckart, Young 1936), and its share of the energy.

    down: A [r, in], up: B [out, r]. The SVD is taken of the small core between the two QR factors.
    """
    q_up, r_up = torch.linalg.qr(in_double(up))
    q_down, r_down = torch.linalg.qr(in_double(down).T)
    left, values, right = torch.linalg.svd(r_up @ r_down.T, full_matrices=False)
    energy = values.square()
    kept = float(energy[:rank].sum() / energy.sum()) if energy.sum() > 0 else 1.0
    root = values[:rank].sqrt()
    new_up, new_down = (q_up @ left[:, :rank]) * root, root[:, None] * (right[:rank] @ q_down.T)
    return new_down.to(down.dtype).to(down.device), new_up.to(up.dtype).to(up.device), kept


def in_double(tensor: torch.Tensor) -> torch.Tensor:
    """A copy in float64, on the CPU: not every device has that precision."""
    return tensor.cpu().double()


def probe_gradients(host: nn.Module, config: LoraConfig, probe: Probe) -> dict[str, torch.Tensor]:
    """The loss's gradient with respect to each target layer's weight [out, in], summed over the probe's batches."""
    names = adapted_layers(get_peft_model(copy.deepcopy(host), copy.deepcopy(config), adapter_name=ADAPTER))
    weights = {encoder_name(n): m.weight for n, m in host.named_modules() if encoder_name(n) in names}
    training = host.training
    host.eval()  # batch norms stay as they are
    total = {name: torch.zeros_like(weight).flatten(1) for name, weight in weights.items()}
    for batch in probe.batches():
        for name, gradient in zip(total, torch.autograd.grad(probe.loss(batch), list(weights.values())), strict=True):
            total[name] += gradient.flatten(1)
    host.train(training)
    return total


def ranks_by_worth(gradients: dict[str, torch.Tensor], rank: int) -> dict[str, int]:
    """Ranks per layer as `Mixed` hands them out, within the parameters that `rank` everywhere would have.

    Layers that get none are left out.
    """
    sizes = {name: sum(gradient.shape) for name, gradient in gradients.items()}
    budget = rank * sum(sizes.values())
    worths = [
        (float(value) ** 2 / sizes[name], name)
        for name, gradient in gradients.items()
        for value in torch.linalg.svdvals(in_double(gradient))
    ]
    ranks: dict[str, int] = {}
    for _, name in sorted(worths, reverse=True):
        if budget >= sizes[name]:
            ranks[name], budget = ranks.get(name, 0) + 1, budget - sizes[name]
    return ranks


def write_plain_lora(folder: Path, pairs: dict, whole: dict, like: LoraConfig, host: nn.Module) -> None:
    """An ordinary LoRA adapter folder of `pairs` (A [k, in], B [out, k]; scaling 1) and tensors trained `whole`."""
    kept = {name: getattr(like, name) for name in ("modules_to_save", "base_model_name_or_path", "revision")}
    ranks = {name: len(down) for name, (down, _) in pairs.items()}
    explicit_config(ranks, like.task_type, **kept).save_pretrained(folder)
    inner = "redimnet." if hasattr(host, "redimnet") else ""
    tensors = {key: value.contiguous() for key, value in whole.items()}
    for name, (down, up) in pairs.items():
        for part, value in (("lora_A", down), ("lora_B", up)):
            tensors[f"base_model.model.{inner}{name}.{part}.weight"] = value.contiguous()
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


class _AllocatorState:
    """What AdaLoRA's rank allocation remembers, for checkpoints."""

    def __init__(self, peft: PeftModel) -> None:
        self.peft = peft

    def state_dict(self) -> dict:
        allocator = self.peft.base_model.rankallocator
        kept = {name: dict(getattr(allocator, name)) for name in ("ipt", "exp_avg_ipt", "exp_avg_unc")}
        return {**kept, "rank_pattern": self.peft.peft_config[ADAPTER].rank_pattern}

    def load_state_dict(self, state: dict) -> None:
        allocator = self.peft.base_model.rankallocator
        devices = {name: parameter.device for name, parameter in self.peft.base_model.model.named_parameters()}
        for name in ("ipt", "exp_avg_ipt", "exp_avg_unc"):  # Accelerate loads them to the CPU
            setattr(allocator, name, {key: tensor.to(devices[key]) for key, tensor in state[name].items()})
        self.peft.peft_config[ADAPTER].rank_pattern = state["rank_pattern"]

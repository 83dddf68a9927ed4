"""What an adapter's folder says beside PEFT's two files: its base, its domain, what it answers."""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import nn

from configuration_mrl_redimnet import MRLReDimNetError
from mrl_redimnet.files import replace_text

FACTS_FILE = "mrl_redimnet_adapter.json"
TASKS = ("verification", "classification", "regression")


class WrongBaseError(MRLReDimNetError, ValueError):
    """An adapter meets another base than the one it was trained on."""


@dataclass(frozen=True)
class Base:
    """The model an adapter belongs to.

    repository: Hub id, or the name of a base that was never pushed. revision: commit, tag or branch, None where
    unknown. fingerprint: of its weights, see `fingerprint`.
    """

    repository: str
    revision: str | None
    fingerprint: str

    def __str__(self) -> str:
        revision = "" if self.revision is None else f" at {self.revision}"
        weights, *config = self.fingerprint.split(CONFIG_PART)
        return f"{self.repository}{revision} ({CONFIG_PART.join([f'{weights[:19]}...', *config])})"


@dataclass(frozen=True)
class AdapterFacts:
    """The content of mrl_redimnet_adapter.json.

    domain: a short name such as "telephony". task: what the adapter was trained for. labels: the classes of a
    classification, in the order of its logits. training: a sentence for the card. layers: per adapted layer, its rank.
    """

    domain: str
    base: Base
    task: str = "verification"
    labels: list[str] = field(default_factory=list)
    training: str = ""
    layers: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise ValueError(f"task: got {self.task!r}, expected one of {', '.join(TASKS)}.")

    def save(self, folder: str | Path) -> None:
        """Writes `folder`/mrl_redimnet_adapter.json, whole or not at all."""
        replace_text(Path(folder) / FACTS_FILE, json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> "AdapterFacts | None":
        """What `save` wrote; None where there is no such file (an adapter made with PEFT alone).

        Raises ValueError, naming the file, when it is not what `save` writes.
        """
        file = Path(folder) / FACTS_FILE
        if not file.is_file():
            return None
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            known = {f.name for f in fields(cls)}  # a later version's additions are not ours to judge
            return cls(**{k: v for k, v in content.items() if k in known and k != "base"}, base=Base(**content["base"]))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file} is not a description of an adapter: {error!r}") from error

    def check_base(self, model: nn.Module, name: str, revision: str | None = None) -> None:
        """Raises WrongBaseError, showing both, unless `model`, called `name`, is the base that the adapter fits."""
        found = Base(name, revision, fingerprint(model))
        if not same_weights(self.base.fingerprint, found.fingerprint):
            raise WrongBaseError(
                f"The adapter {self.domain!r} was trained on {self.base}, this base is {found}: other weights or "
                "another configuration, so its answers would be meaningless. Load the base it names (in float32 or "
                "bfloat16; other precisions round the weights to others), or pass any_base=True to use it all the same."
            )


def fingerprint(model: nn.Module) -> str:
    """A hash of the encoder's own weights and batch-norm statistics and one of its configuration,
    "sha256:...+config:...".

    The same with and without a classification head, with any adapters attached (merged ones excepted), on any device,
    and in float32 and bfloat16: numbers are hashed as bfloat16. Of the configuration, what changes an embedding counts
    (ANSWERING). Compare with `same_weights`: what was saved before the configuration counted has no second hash.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model  # a PeftModel's
    encoder = getattr(model, model.base_model_prefix, model)
    tensors = {}
    for name, tensor in encoder.state_dict().items():
        parts = name.split(".")
        if tensor.is_floating_point() and not ADAPTER_PARTS.intersection(parts):
            tensors[".".join(part for part in parts if part not in WRAPPER_PARTS)] = tensor
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().to(device="cpu", dtype=torch.bfloat16).contiguous()
        digest.update(f"{name} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    settings = json.dumps({name: getattr(encoder.config, name) for name in ANSWERING}, sort_keys=True)
    return f"sha256:{digest.hexdigest()}{CONFIG_PART}{hashlib.sha256(settings.encode()).hexdigest()[:16]}"


def same_weights(saved: str, found: str) -> bool:
    """Whether a saved fingerprint (or `calibration.weights_of`) names the weights whose own is `found`.

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

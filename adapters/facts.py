"""What an adapter's folder says beside PEFT's two files: its base, its domain, what it answers."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch
from torch import nn

from configuration_mrl_redimnet import MRLReDimNetError
from mrl_redimnet.files import replace_text
from mrl_redimnet.fingerprints import CONFIG_PART, fingerprint, same_weights

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
    nested_ranks: those that its first components were trained to be good at, rising; none of most adapters.
    """

    domain: str
    base: Base
    task: str = "verification"
    labels: list[str] = field(default_factory=list)
    training: str = ""
    layers: dict[str, int] = field(default_factory=dict)
    nested_ranks: list[int] = field(default_factory=list)

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


def adapter_digest(folder: str | Path) -> str:
    """The hash "sha256:..." of the tensors in an adapter's folder, for `SpeakerEncoder.fingerprint`.

    Raises FileNotFoundError for a folder that holds no adapter.
    """
    tensors = Path(folder) / "adapter_model.safetensors"
    if not tensors.is_file():
        raise FileNotFoundError(f"no {tensors.name} in {folder}: not an adapter's folder")
    return f"sha256:{hashlib.sha256(tensors.read_bytes()).hexdigest()}"


def labelled(logits: torch.Tensor, labels: Sequence[str]) -> dict[str, torch.Tensor] | torch.Tensor:
    """What a classifier's logits [B, classes] say: {label: probabilities [B]}; of a single output, values [B]."""
    if logits.shape[1] == 1:
        return logits[:, 0]
    return dict(zip(labels, logits.softmax(-1).unbind(-1), strict=True))

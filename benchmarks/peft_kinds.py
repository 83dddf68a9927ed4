"""PEFT's kinds of adapters on a model, by PEFT's plain calls: what each of them can do there, and why not.

    python benchmarks/peft_kinds.py nano --out docs/results/peft_kinds

For each kind: an adapter on the linear layers learns in a few steps that two recordings are of one speaker and a third
is not; it is saved, and loaded on a fresh base; a second one joins it; both are chosen in turn; it is switched off, and
merged into the weights. The last column is training and a reload with convolutions among its layers.

A failure that `REASONS` does not name, and one that is there but does not happen, make the command fail.
"""

import argparse
import copy
import re
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import peft
import torch
from peft import PeftModel, get_peft_model
from timing import machine
from torch import nn

from mrl_redimnet import recordings
from mrl_redimnet.adapters.placement import PLACEMENTS, grouped_convolutions
from mrl_redimnet.audio.io import read_audio
from mrl_redimnet.saving import load_model
from mrl_redimnet.tables import markdown_table

Batch = dict[str, torch.Tensor]

# The name of a kind, the class of its configuration, options beside the layers. Sizes fit layers of a few channels.
KINDS: dict[str, tuple[str, dict]] = {
    "LoRA": ("LoraConfig", {}),
    "LoRA, rank-stabilised": ("LoraConfig", {"use_rslora": True}),
    "LoRA, DoRA": ("LoraConfig", {"use_dora": True}),
    "LoRA, from PiSSA": ("LoraConfig", {"init_lora_weights": "pissa"}),
    "LoRA, from OLoRA": ("LoraConfig", {"init_lora_weights": "olora"}),
    "LoRA, orthogonal": ("LoraConfig", {"init_lora_weights": "orthogonal"}),
    "LoRA, MiCA": ("LoraConfig", {"init_lora_weights": "mica"}),
    "AdaLoRA": ("AdaLoraConfig", {"total_step": 100}),
    "AdaMSS": ("AdamssConfig", {"r": 4, "num_subspaces": 2}),
    "BEFT": ("BeftConfig", {}),
    "BOFT": ("BOFTConfig", {}),
    "C3A": ("C3AConfig", {"block_size": 4}),
    "DEFT": ("DeftConfig", {}),
    "DeLoRA": ("DeloraConfig", {}),
    "FourierFT": ("FourierFTConfig", {"n_frequency": 64}),
    "FRoD": ("FrodConfig", {"progressbar": False}),
    "GLoRA": ("GloraConfig", {}),
    "GraLoRA": ("GraloraConfig", {"r": 4}),
    "HiRA": ("HiraConfig", {}),
    "HRA": ("HRAConfig", {}),
    "IA3": ("IA3Config", {"feedforward_modules": []}),
    "Lily": ("LilyConfig", {}),
    "LN tuning": ("LNTuningConfig", {}),
    "LoHa": ("LoHaConfig", {}),
    "LoKr": ("LoKrConfig", {}),
    "MiSS": ("MissConfig", {"r": 4}),
    "OFT": ("OFTConfig", {"oft_block_size": 4}),
    "OSF": ("OSFConfig", {}),
    "PEANuT": ("PeanutConfig", {}),
    "PSOFT": ("PsoftConfig", {"r": 4}),
    "PVeRA": ("PveraConfig", {"r": 16}),
    "RandLoRA": ("RandLoraConfig", {"r": 4}),
    "RoAd": ("RoadConfig", {"group_size": 4}),
    "SHiRA": ("ShiraConfig", {"r": 4}),
    "Supertuning": ("SupertuningConfig", {}),
    "TinyLoRA": ("TinyLoraConfig", {}),
    "UniLoRA": ("UniLoraConfig", {}),
    "VB-LoRA": ("VBLoRAConfig", {"num_vectors": 32, "vector_length": 4}),
    "VeRA": ("VeraConfig", {"r": 16}),
    "WaveFT": ("WaveFTConfig", {"n_frequency": 64}),
}
CHECKS = ("trains", "loads", "swaps", "switches off", "merges", "convolutions")
# Which kinds fail a check, why, and whose reason it is. Checks that need one that failed are not tried.
REASONS: list[tuple[str, tuple[str, ...], str, str]] = [
    ("swaps", ("LoRA, from PiSSA", "LoRA, from OLoRA"), "It takes its start out of the base's weights, so the base is "
     "another one for each of two adapters. PEFT saves it as plain LoRA when told where it started "
     "(`path_initial_model_for_weight_conversion`); `train_hf.py` does.", "PEFT"),
    ("switches off", ("LoRA, from PiSSA", "LoRA, from OLoRA"), "For the same reason what is left without it is not the "
     "base.", "PEFT"),
    ("merges", ("Lily",), "Its layers share matrices with each other; PEFT says that it cannot merge it.", "PEFT"),
    ("convolutions", ("AdaMSS", "BEFT", "C3A", "DEFT", "DeLoRA", "FourierFT", "GLoRA", "GraLoRA", "Lily", "MiSS",
     "PEANuT", "PSOFT", "PVeRA", "RandLoRA", "RoAd", "SHiRA", "Supertuning", "UniLoRA", "VB-LoRA", "VeRA", "WaveFT"),
     "It is for linear layers, and says so.", "PEFT"),
    ("convolutions", ("FRoD", "TinyLoRA"), "It is for linear layers, and ends in a KeyError at others.", "PEFT"),
    ("convolutions", ("OSF",), "It passes over layers that are not linear.", "PEFT"),
    ("convolutions", ("LN tuning",), "It trains norms, not layers.", "not applicable"),
    ("convolutions", ("LoRA, from PiSSA", "LoRA, from OLoRA", "LoRA, orthogonal", "LoRA, MiCA"), "PEFT has this start "
     "for linear layers alone, and says so.", "PEFT"),
    ("convolutions", ("BOFT",), "Blocks of 4 do not divide the 9 weights of the first kernel; all layers have "
     "blocks of one size.", "PEFT"),
    ("convolutions", ("HRA",), 'It takes the padding "same" of a convolution for a number.', "PEFT"),
]  # fmt: skip
NOT_TRIED = "not tried"
FAR = 1e-4  # how far embeddings may be from those that they should be, relative to their length
STEPS, LEARNING_RATE = 5, 1e-2
LEARNING_RATES = {"RandLoRA": 1e-3}  # of kinds that diverge at the usual one


def main():
    """Parses the command line, examines every kind, writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=[*KINDS], metavar="KIND")
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    arguments = parser.parse_args()
    base = load_model(arguments.model).base_model
    files = (recordings.FIRST, recordings.SAME_SPEAKER, recordings.OTHER_SPEAKER)
    batch = {"input_values": torch.stack([torch.from_numpy(read_audio(file)[16_000:32_000]) for file in files])}
    found = {kind: examine(kind, base, batch) for kind in arguments.kinds}
    arguments.out.with_suffix(".md").write_text(page(arguments.model, found))
    if faults := judge(found):
        sys.exit("\n".join(faults))


def page(model: str, found: dict[str, dict[str, str]]) -> str:
    """The table of all kinds, and one of the reasons."""
    lines = [["kind", "parameters", *CHECKS]]
    for kind, outcomes in found.items():
        marks = {"": "yes", NOT_TRIED: "-"}
        lines.append([kind, outcomes["parameters"], *(marks.get(outcomes[check], "no") for check in CHECKS)])
    why = [["check", "kinds", "reason", "whose"]]
    why += [[check, "; ".join(kinds), reason, whose] for check, kinds, reason, whose in REASONS]
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    return "\n".join(
        [
            f"# PEFT's kinds of adapters on `{model}`",
            "",
            f"```bash\npython benchmarks/peft_kinds.py {model} --out docs/results/peft_kinds\n```",
            "",
            " ".join(__doc__.split("\n\n")[2].split()),
            "",
            f"Embeddings count as equal up to {FAR:g} of their length. The model is in evaluation mode, so that its "
            "batch norms stay as they are; PEFT leaves that to whoever trains. Prompts and prefixes need tokens, and "
            f"are left out. {versions}, {machine()}.",
            "",
            markdown_table(lines, left=(0, *range(2, len(lines[0]))), aligned=False),
            "",
            "## Why not",
            "",
            markdown_table(why, left=(0, 1, 2, 3), aligned=False),
            "",
        ]
    )


def judge(found: dict[str, dict[str, str]]) -> list[str]:
    """What is wrong with the list of reasons, a sentence each."""
    faults = []
    known = {(kind, check) for check, kinds, *_ in REASONS for kind in kinds}
    for kind, outcomes in found.items():
        for check in CHECKS:
            failed = outcomes[check] not in ("", NOT_TRIED)
            if failed and (kind, check) not in known:
                faults.append(f"{kind}, {check}: no reason is listed for: {outcomes[check]}")
            if not failed and (kind, check) in known:
                faults.append(f"{kind}, {check}: does not fail, but is listed: take it off the list.")
    return faults


# ----------------------------------------------------------------------------------------------------------------------
# The checks


def examine(kind: str, base: nn.Module, batch: Batch) -> dict[str, str]:
    """Why each of `CHECKS` fails for a kind, "" where it does not, and the adapter's number of parameters.

    batch: three utterances, two of them of one speaker. base: is not changed.
    """
    outcomes = dict.fromkeys(CHECKS, NOT_TRIED) | {"parameters": ""}
    plain = embeddings(base, batch)

    def holds(check: str, run: Callable[[], None]) -> bool:
        try:
            run()
        except Exception as error:  # whatever a kind raises is what is to be found out
            text = " ".join(str(error).split()) or "no message"
            outcomes[check] = f"{type(error).__name__}: {text}"
        else:
            outcomes[check] = ""
        return not outcomes[check]

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made: dict[str, PeftModel] = {}

        def train() -> None:
            for seed, adapter in enumerate(("one", "two")):
                made[adapter] = trained(kind, base, batch, seed)
            trainable = sum(p.numel() for p in made["one"].parameters() if p.requires_grad)
            outcomes["parameters"] = f"{trainable:,}"

        if not holds("trains", train):
            return outcomes
        expected = {adapter: embeddings(model, batch) for adapter, model in made.items()}

        def load() -> None:
            for adapter, model in made.items():
                model.save_pretrained(folder / adapter)
                loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder / adapter).eval()
                must_be_near(embeddings(loaded, batch), expected[adapter], "the loaded adapter's embeddings")

        if holds("loads", load):
            holds("swaps", lambda: swap(base, folder, batch, expected))
        holds("switches off", lambda: switch_off(made["one"], batch, plain))
        holds("merges", lambda: merge(made["two"], batch, expected["two"]))
        holds("convolutions", lambda: with_convolutions(kind, base, batch, folder / "convolutions"))
    return outcomes


def adapted(kind: str, base: nn.Module, placement: str, seed: int) -> PeftModel:
    """A copy of the base with a fresh adapter."""
    name, options = KINDS[kind]
    options = {"target_modules": PLACEMENTS[placement], "task_type": "FEATURE_EXTRACTION", **options}
    if name == "LNTuningConfig":  # it trains norms, whole
        norms = [key for key, part in base.named_modules() if isinstance(part, nn.LayerNorm | nn.BatchNorm1d)]
        options["target_modules"] = norms
    elif placement == "conv":
        excluded = [*grouped_convolutions(base)]
        options["target_modules"] = rf"(?!({'|'.join(map(re.escape, excluded))})$)({PLACEMENTS['conv']})"
    torch.manual_seed(seed)
    return get_peft_model(copy.deepcopy(base), getattr(peft, name)(**options)).eval()


def trained(kind: str, base: nn.Module, batch: Batch, seed: int, placement: str = "linear") -> PeftModel:
    """A copy of the base with an adapter that has learnt a little: that the first and the second utterance are of one
    speaker, where the seed is odd the first and the third. Norms are those of evaluation, as they are frozen.

    Raises ValueError where it has not learnt, or the base's own weights moved.
    """
    model = adapted(kind, base, placement, seed)
    frozen = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    learnt = [value for value in model.parameters() if value.requires_grad]
    optimizer = torch.optim.AdamW(learnt, LEARNING_RATES.get(kind, LEARNING_RATE), weight_decay=0.0)
    losses = []
    for _ in range(STEPS + 1):
        first, same, other = model(**batch).embeddings
        same, other = (other, same) if seed % 2 else (same, other)
        loss = torch.cosine_similarity(first, other, dim=0) - torch.cosine_similarity(first, same, dim=0)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if not min(losses[1:]) < losses[0] - 1e-4:
        raise ValueError(f"the loss did not fall: {', '.join(f'{loss:.4f}' for loss in losses)}")
    now = dict(model.named_parameters())
    if moved := [name for name, value in frozen.items() if not torch.equal(now[name], value)]:
        raise ValueError(f"weights of the base moved: {', '.join(moved[:3])}")
    return model


def swap(base: nn.Module, folder: Path, batch: Batch, expected: dict[str, torch.Tensor]) -> None:
    """Two adapters on one base, chosen in turn."""
    both = PeftModel.from_pretrained(copy.deepcopy(base), folder / "one", adapter_name="one").eval()
    both.load_adapter(folder / "two", adapter_name="two")
    both.eval()
    for adapter in ("two", "one", "two"):
        both.set_adapter(adapter)
        must_be_near(embeddings(both, batch), expected[adapter], f"the embeddings by adapter {adapter}")
    if (expected["one"] - expected["two"]).norm() < FAR * expected["one"].norm():
        raise ValueError("two adapters that learnt different things are the same")


def switch_off(model: PeftModel, batch: Batch, plain: torch.Tensor) -> None:
    """Without the adapter the model is the base."""
    with model.disable_adapter():
        must_be_near(embeddings(model, batch), plain, "the embeddings without the adapter")


def merge(model: PeftModel, batch: Batch, expected: torch.Tensor) -> None:
    """With the adapter in the weights the model is what it was with the adapter beside them."""
    merged = model.merge_and_unload().eval()
    if left := [name for name, part in merged.named_modules() if hasattr(part, "base_layer")]:
        raise ValueError(f"layers of the adapter are left: {', '.join(left[:3])}")
    must_be_near(embeddings(merged, batch), expected, "the embeddings after merging")


def with_convolutions(kind: str, base: nn.Module, batch: Batch, folder: Path) -> None:
    """Ungrouped convolutions among the adapted layers: it trains, and comes back from its file."""
    model = trained(kind, base, batch, 0, "conv")
    if not any(hasattr(part, "base_layer") and isinstance(part.base_layer, nn.Conv2d) for part in model.modules()):
        raise ValueError("no convolution was adapted")
    model.save_pretrained(folder)
    loaded = PeftModel.from_pretrained(copy.deepcopy(base), folder).eval()
    must_be_near(embeddings(loaded, batch), embeddings(model, batch), "the loaded adapter's embeddings")


def embeddings(model: nn.Module, batch: Batch) -> torch.Tensor:
    """[B, D]."""
    with torch.inference_mode():
        return model(**batch).embeddings.clone()


def must_be_near(found: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Raises ValueError where they are not the same up to rounding."""
    differ = float((found - expected).norm() / expected.norm())
    if not differ <= FAR:
        raise ValueError(f"{what} differ by {differ:.2g} of their length")


if __name__ == "__main__":
    main()

"""What adapters cost beside full fine-tuning: parameters, files, training steps, embeddings, swaps.

    python benchmarks/adapter_costs.py --sizes nano b0 b2 --out docs/results/adapter_costs [--quick]

Weights are random and audio is noise: neither matters for time or size. What is compared takes turns, in an order drawn
anew each round, so that drift hits all alike; a ratio is the median over rounds of one's time by the reference's in the
same round. Peak memory is measured in a process of its own per system. OUT.md and OUT.json are rewritten after each
size. Run it while nothing else runs.
"""

import argparse
import copy
import json
import random
import shlex
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from memory import in_fresh_process, peak_resident, resident
from timing import machine
from torch import nn
from transformers.utils.logging import disable_progress_bar

from configuration_mrl_redimnet import SAMPLING_RATE, SIZES, MRLReDimNetConfig
from modeling_mrl_redimnet import MRLReDimNetForXVector, MRLReDimNetModel
from mrl_redimnet.adapters import AdapterFacts, Base, fingerprint
from mrl_redimnet.adapters.bank import AdapterBank
from mrl_redimnet.adapters.placement import adapted_layers
from mrl_redimnet.adapters.strategies import ADAPTER, AdapterPlan, Dynamic, Probe, Vanilla
from mrl_redimnet.training.optimizer import build_optimizer
from mrl_redimnet.training.reading import make_recipe

SPEAKERS, CROP_SECONDS = 5994, 2.0  # VoxCeleb2's training speakers
SHAPES = {"1 x 3 s": (1, 3.0), "8 x 3 s": (8, 3.0)}  # batch, seconds
FULL, BASE, TWIN = "full fine-tuning", "base", "base again"
ADAPTERS = {
    **{f"{name}, r=8": AdapterPlan(1, name) for name in ("attention", "attention+ffn", "pointwise", "projection")},
    "linear, r=8": AdapterPlan(1, "linear"),
    "linear, r=64": AdapterPlan(1, "linear", rank=64),
    "linear, r=8, DoRA": AdapterPlan(1, "linear", options={"use_dora": True}),
}
# Strategies whose training differs from that of the adapter they end as: AdaLoRA, and warm_up before its cut.
IN_TRAINING = {
    "linear, dynamic from r=12": (Dynamic, AdapterPlan(1000, "linear", start_rank=12)),
    "linear, warm_up at r=16": (Vanilla, AdapterPlan(1, "linear", rank=16)),
}
TRAINED = {name: (Vanilla, plan) for name, plan in ADAPTERS.items()} | IN_TRAINING
SWAPPED = "linear, r=8"  # the adapter of the swaps and the goals
FILE_GOAL_BYTES, SWAP_GOAL_MS = 2_000_000, 10.0
RECIPE = make_recipe(learning_rate=1e-5, final_learning_rate=1e-5)  # so low that weights hardly move
LIBRARIES = ["mrl_redimnet.training.checkpoints", "mrl_redimnet.adapters.bank"]
NO_DATA = Probe(list, lambda batch: torch.zeros(()))  # none of the adapters here is initialised from data


@dataclass(frozen=True)
class Effort:
    """How much is measured: crops per training step, seconds of timed steps per size and of embeddings per size and
    input shape, the fewest and most rounds of either, swaps (an even number)."""

    batch: int
    seconds: float
    fewest: int = 3
    most: int = 30
    swaps: int = 50


def main():
    """Measures size by size; prints and writes what is known after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["nano", "b0", "b2"])
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    parser.add_argument("--batch", type=int, default=16, help="crops of 2 s per training step [16]")
    parser.add_argument("--seconds", type=float, default=30.0, help="of rounds of steps, and per input shape [30]")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one round of all, at most 4 crops: to see that it runs")
    arguments = parser.parse_args()
    if arguments.batch < 2:
        parser.error("--batch: batch norms in training need at least 2 crops")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)  # now, not after minutes
    effort = Effort(arguments.batch, arguments.seconds)
    if arguments.quick:
        effort = Effort(min(arguments.batch, 4), seconds=0.0, fewest=1, swaps=2)
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()

    record = {"command": f"python benchmarks/adapter_costs.py {shlex.join(sys.argv[1:])}", "machine": machine()}
    record |= {"threads": arguments.threads, "torch": torch.__version__, "batch": effort.batch, "sizes": {}}
    for size in arguments.sizes:
        began = time.perf_counter()
        record["sizes"][size] = measure(size, effort, arguments.threads)
        record["goals"] = goals(record["sizes"])
        arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(report(record))
        print(f"{size}: measured in {time.perf_counter() - began:.0f} s", flush=True)
    print(report(record))


def measure(size: str, effort: Effort, threads: int) -> dict:
    """Everything of one base size."""
    base = build_base(size)
    with tempfile.TemporaryDirectory() as folder:
        saved = save_all(size, base, Path(folder))
        found = {"base_parameters": count(base.parameters()), **saved, **training(size, effort, threads)}
        folders = {name: Path(folder) / name for name in ADAPTERS}
        return found | inference(base, folders, effort) | swapping(base, folders[SWAPPED], effort)


# ----------------------------------------------------------------------------------------------------------------------
# Sizes


def build_base(size: str) -> MRLReDimNetModel:
    """The base of a size with random weights, always the same."""
    torch.manual_seed(0)
    return MRLReDimNetModel(MRLReDimNetConfig.from_size(size)).eval()


def count(parameters) -> int:
    """Numbers in `parameters`."""
    return sum(parameter.numel() for parameter in parameters)


def save_all(size: str, base: MRLReDimNetModel, folder: Path) -> dict:
    """Saves the base and its adapters below `folder`: bytes of their weight files, trained parameters of each."""
    base.save_pretrained(folder / BASE)
    parameters = {FULL: count(base.parameters())}
    sizes = {FULL: (folder / BASE / "model.safetensors").stat().st_size}
    facts = AdapterFacts("noise", Base(size, None, fingerprint(base)))
    for seed, (name, plan) in enumerate([*ADAPTERS.items(), (f"{SWAPPED}, other", ADAPTERS[SWAPPED])]):
        strategy = Vanilla(copy.deepcopy(base), plan, NO_DATA)
        give_effect(strategy, seed)
        strategy.save(folder / name)
        facts.save(folder / name)
        parameters[name] = count(p for p in strategy.peft.parameters() if p.requires_grad)
        sizes[name] = (folder / name / "adapter_model.safetensors").stat().st_size
    return {"trained_parameters": parameters, "file_bytes": sizes}


@torch.no_grad()
def give_effect(strategy: Vanilla, seed: int):
    """Fills the adapter's B, which are zero at the start of a training, so that it changes embeddings."""
    generator = torch.Generator().manual_seed(seed)
    for layer in adapted_layers(strategy.peft).values():
        layer.lora_B[ADAPTER].weight.normal_(std=0.02, generator=generator)


# ----------------------------------------------------------------------------------------------------------------------
# Training steps


class Trainer:
    """A system in training, with a batch of noise; a call is a step of `train_hf.py`."""

    def __init__(self, size: str, system: str, batch: int):
        torch.manual_seed(0)
        self.model = MRLReDimNetForXVector(MRLReDimNetConfig.from_size(size, num_speakers=SPEAKERS))
        self.strategy, self.steps = None, 0
        if system != FULL:  # the classifier stays outside, and trains as well
            strategy, plan = TRAINED[system]
            self.strategy = strategy(self.model.redimnet, plan, NO_DATA)
        self.model.train()
        self.waveforms = 0.1 * torch.randn(batch, int(CROP_SECONDS * SAMPLING_RATE))
        self.labels = torch.randint(SPEAKERS, (batch,))
        self.optimizer = build_optimizer(self.model, RECIPE)

    def __call__(self):
        self.backward(len(self.labels))
        nn.utils.clip_grad_norm_(self.model.parameters(), RECIPE.optimizer.max_gradient_norm)
        self.optimizer.step()
        if self.strategy is not None:
            self.strategy.after_step(self.steps)
        self.optimizer.zero_grad()
        self.steps += 1

    def backward(self, crops: int):
        """Gradients of the first `crops` of the batch."""
        loss = self.model(self.waveforms[:crops], labels=self.labels[:crops]).loss
        (loss if self.strategy is None else loss + self.strategy.penalty()).backward()


def training(size: str, effort: Effort, threads: int) -> dict:
    """Step times in ms and peak memory in MiB, per system."""
    systems, batch = (FULL, *TRAINED), effort.batch
    memory = {
        system: in_fresh_process(peak_memory, size, system, batch, threads, preload=LIBRARIES) for system in systems
    }
    trainers = {system: Trainer(size, system, batch) for system in systems}
    return {"step_ms": in_turns(trainers, effort), "step_memory_mib": memory}


def peak_memory(size: str, system: str, batch: int, threads: int) -> float:
    """What two steps add to the memory of a process with model and batch, at their peak: MiB."""
    torch.set_num_threads(threads)
    trainer = Trainer(size, system, batch)
    trainer.backward(2)  # pages of the libraries come in; two, as batch norms need
    trainer.optimizer.zero_grad()
    before = resident()
    return (peak_resident(lambda: [trainer() for _ in range(2)]) - before) / 2**20  # the second has momentum at once


def in_turns(calls: dict[str, Callable], effort: Effort) -> dict[str, list[float]]:
    """Milliseconds of each call, round by round, after a first round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for call in calls.values():
        call()
    end, rounds = time.perf_counter() + effort.seconds, 0
    while rounds < effort.fewest or (rounds < effort.most and time.perf_counter() < end):
        for name in order.sample(list(calls), len(calls)):
            times[name].append(milliseconds(calls[name]))
        rounds += 1
    return times


def milliseconds(call: Callable, *arguments) -> float:
    """How long a call takes."""
    start = time.perf_counter()
    call(*arguments)
    return round(1000 * (time.perf_counter() - start), 4)


# ----------------------------------------------------------------------------------------------------------------------
# Embeddings


def inference(base: MRLReDimNetModel, folders: dict[str, Path], effort: Effort) -> dict:
    """Times of embeddings in ms: per shape, of the base, a copy of it, and each adapter as it is and merged.

    merged_is_base: per adapter, whether the merged model consists of the same modules and tensor shapes as the base.
    merged_error: per adapter, how far merged embeddings are from unmerged ones, relative.
    """
    systems: dict[str, Callable] = {BASE: embedding_of(base), TWIN: embedding_of(copy.deepcopy(base))}
    equal, errors = {}, {}
    waveform = noise(*SHAPES["1 x 3 s"])
    for name, folder in folders.items():
        bank = AdapterBank.load(copy.deepcopy(base), {"adapter": folder})
        bank.set_adapter("adapter")
        merged = bank.merged("adapter")
        equal[name] = layout(merged) == layout(base)
        systems[name], systems[f"{name}, merged"] = bank.embed, embedding_of(merged)
        expected, answer = (system(waveform) for system in (bank.embed, systems[f"{name}, merged"]))
        errors[name] = float((answer - expected).norm() / expected.norm())
    times = {}
    for shape, (batch, seconds) in SHAPES.items():
        waveform = noise(batch, seconds)
        calls = {name: lambda system=system, x=waveform: system(x) for name, system in systems.items()}
        times[shape] = in_turns(calls, effort)
    modules, tensors = layout(base)
    sizes = {"modules": len(modules), "tensors": len(tensors)}
    return {"embed_ms": times, "merged_is_base": equal, "merged_error": errors, "base_layout": sizes}


def noise(batch: int, seconds: float) -> torch.Tensor:
    """Waveforms [batch, samples], always the same."""
    return 0.1 * torch.randn(batch, int(seconds * SAMPLING_RATE), generator=torch.Generator().manual_seed(1))


def embedding_of(model: MRLReDimNetModel) -> Callable:
    """Waveforms [B, T] -> embeddings [B, D] of a plain model."""
    return torch.inference_mode()(lambda waveform: model(waveform).embeddings)


def layout(model: nn.Module) -> tuple[dict, dict]:
    """What decides which operations run: modules by name with their class, parameters and buffers with shape, dtype."""
    modules = {name: type(part) for name, part in model.named_modules()}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return modules, {name: (tensor.shape, tensor.dtype) for name, tensor in tensors}


# ----------------------------------------------------------------------------------------------------------------------
# Swaps


def swapping(base: MRLReDimNetModel, folder: Path, effort: Effort) -> dict:
    """Times of a bank's choice between two adapters, of adding and of hot swaps, in ms, and whether answers are right.

    first_add_ms: includes hashing the base, once in a bank's life. parity: after each change, whether the embedding is
    that of a bank with this adapter alone (or of the base) to the last bit. hot_swap_error, adapter_change: relative.
    """
    sources = {"one": folder, "other": folder.with_name(f"{folder.name}, other")}
    waveform = noise(2, 1.0)
    plain, alone = embedding_of(base)(waveform), {}
    for name, source in sources.items():
        alone[name] = AdapterBank.load(copy.deepcopy(base), {name: source}).embed(waveform, adapter=name)
    bank = AdapterBank(copy.deepcopy(base), "base")
    first_add = milliseconds(bank.add, "one", sources["one"])
    bank.add("other", sources["other"])
    turns = list(sources) * (effort.swaps // 2)
    swaps, adds, parity = [milliseconds(bank.set_adapter, name) for name in turns], [], {}
    for name in sources:
        bank.set_adapter(name)
        parity[f"set_adapter {name}"] = torch.equal(bank.embed(waveform), alone[name])
    bank.disable()
    parity["disable"] = torch.equal(bank.embed(waveform), plain)
    for _ in range(min(effort.swaps, 10)):
        adds.append(milliseconds(bank.add, "more", sources["one"]))
        bank.delete("more")
    bank.prepare_hot_swap(ADAPTERS[SWAPPED].rank, placement=ADAPTERS[SWAPPED].placement)
    hot_swaps = [milliseconds(bank.hot_swap, sources[name]) for name in turns[:10]]
    hot = bank.embed(waveform, adapter="hot")  # the last of an even number of turns
    parity["hot_swap other"] = torch.equal(hot, alone["other"])
    error, change = (float((x - alone["other"]).norm() / alone["other"].norm()) for x in (hot, plain))
    times = {"swap_ms": swaps, "first_add_ms": first_add, "add_ms": adds, "hot_swap_ms": hot_swaps}
    return times | {"parity": parity, "hot_swap_error": error, "adapter_change": change}


# ----------------------------------------------------------------------------------------------------------------------
# Report


def quartiles(values) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    return tuple(float(value) for value in np.quantile(values, (0.25, 0.5, 0.75)))


def ratio(times: dict[str, list[float]], name: str, reference: str) -> tuple[float, float, float]:
    """Quartiles over rounds of a call's time by the reference's in the same round."""
    return quartiles(np.array(times[name]) / np.array(times[reference]))


def goals(sizes: dict[str, dict]) -> list[dict]:
    """Each goal, what was measured, and whether that passes."""
    found = []
    for size, row in sizes.items():
        if size == "b2":
            size_bytes = row["file_bytes"][SWAPPED]
            text = f"b2, {SWAPPED}: adapter file {size_bytes / 1e6:.2f} MB, below {FILE_GOAL_BYTES / 1e6:g} MB"
            found.append({"goal": text, "passes": size_bytes < FILE_GOAL_BYTES})
        slow = float(np.quantile(row["swap_ms"], 0.95))
        text = f"{size}: swap of a loaded adapter {slow:.2f} ms (95th percentile), below {SWAP_GOAL_MS:g} ms"
        found.append({"goal": text, "passes": slow < SWAP_GOAL_MS})
        parity = all(row["parity"].values())
        text = f"{size}: swapped adapters answer as alone, a switched-off one leaves the base, bit by bit"
        found.append({"goal": text, "passes": parity})
        equal = all(row["merged_is_base"].values())
        text = f"{size}: merged models are the base's modules and tensors"
        found.append({"goal": text, "passes": equal})
        for shape, times in row["embed_ms"].items():
            low, median, high = ratio(times, f"{SWAPPED}, merged", BASE)
            twin_low, _, twin_high = ratio(times, TWIN, BASE)
            text = f"{size}, {shape}: merged ({SWAPPED}) takes {median:.3f} [{low:.3f}, {high:.3f}] of the base's time,"
            text += f" within the spread of the base's own copy [{twin_low:.3f}, {twin_high:.3f}]"
            found.append({"goal": text, "passes": low <= twin_high and twin_low <= high})
    return found


def report(record: dict) -> str:
    """Markdown: the command, how to read it, a table per size, the goals."""
    text = ["# What adapters cost", "", f"```bash\n{record['command']}\n```", ""]
    text += [
        paragraph(
            f"{record['machine']}, threads: {record['threads']}, torch {record['torch']}, float32. Random weights "
            "and noise: neither matters for time or size. Ratios: median [quartiles] over rounds of all taking turns."
        ),
        "",
        paragraph("- parameters, file: the adapter's, and the share of the base's; full fine-tuning: the base's own."),
        paragraph(
            f"- step: forward, margin loss over {SPEAKERS:,} speakers, backward, clipping and AdamW, on "
            f"{record['batch']} crops of {CROP_SECONDS:g} s, by a full step's time. The classifier trains in all of "
            "them and is in no file."
        ),
        paragraph(
            "- step memory: what two steps add, at their peak, to a process with the model loaded, by a full step's; a "
            "process for each, set to return freed blocks at once."
        ),
        paragraph(
            "- adapter, merged: time of an embedding by the base's. Merging adds LoRA into the weights: the same "
            "modules run on tensors of the same shapes, so what differs from 1 is noise, as it is for the row "
            f"`{TWIN}`, a copy of the base."
        ),
    ]
    for size, row in record["sizes"].items():
        text += ["", *size_report(size, row)]
    text += ["", "## Goals", ""]
    text += [f"- {'pass' if goal['passes'] else '**FAIL**'}: {goal['goal']}" for goal in record["goals"]]
    return "\n".join(text) + "\n"


def size_report(size: str, row: dict) -> list[str]:
    """The section of one size."""
    embeds = row["embed_ms"]
    columns = ["", "parameters", "file", "step", "step memory"]
    columns += [f"{kind}, {shape}" for kind in ("adapter", "merged") for shape in embeds]
    head = f"## {size}: {row['base_parameters']:,} parameters, {row['file_bytes'][FULL] / 1e6:.2f} MB"
    text = [head, "", table_row(columns), table_row(["---"] * len(columns))]
    text.append(table_row([TWIN, *[""] * 4, *[spread(ratio(times, TWIN, BASE)) for times in embeds.values()], "", ""]))
    for name in (FULL, *TRAINED):
        cells = costs(row, name)
        if name in ADAPTERS:
            cells += [spread(ratio(times, name, BASE)) for times in embeds.values()]
            cells += [spread(ratio(times, f"{name}, merged", BASE)) for times in embeds.values()]
        text.append(table_row([name, *cells, *[""] * (len(columns) - 1 - len(cells))]))
    return [*text, "", *remarks(row)]


def costs(row: dict, name: str) -> list[str]:
    """A system's cells about parameters, file and training."""
    memory, saved = row["step_memory_mib"], ["as it ends", "as it ends"]
    if name not in IN_TRAINING:
        parameters, size = row["trained_parameters"][name], row["file_bytes"][name]
        saved = [f"{parameters:,} ({100 * parameters / row['base_parameters']:.1f} %)"]
        saved.append(f"{size / 1e6:.2f} MB ({100 * size / row['file_bytes'][FULL]:.1f} %)")
    return [
        *saved,
        spread(ratio(row["step_ms"], name, FULL)) if name != FULL else "1",
        f"{memory[name] / memory[FULL]:.2f}" if name != FULL else "1",
    ]


def remarks(row: dict) -> list[str]:
    """What the ratios refer to, why merging is free, and the swaps."""
    low, step, high = quartiles(row["step_ms"][FULL])
    rounds = ", ".join(f"{len(times[BASE])} of {shape}" for shape, times in row["embed_ms"].items())
    base_ms = ", ".join(f"{quartiles(times[BASE])[1]:.1f} ms for {shape}" for shape, times in row["embed_ms"].items())
    equal, sizes = row["merged_is_base"], row["base_layout"]
    swap_median, swap_slow = np.quantile(row["swap_ms"], (0.5, 0.95))
    wrong = [name for name, right in row["parity"].items() if not right]
    answers = f"**not equal after {', '.join(wrong)}**" if wrong else "equal"
    return [
        paragraph(
            f"- A full step takes {step:.0f} ms [{low:.0f}, {high:.0f}] and {row['step_memory_mib'][FULL]:.0f} MiB, an "
            f"embedding by the base {base_ms}. Rounds: {len(row['step_ms'][FULL])} of steps, {rounds}."
        ),
        paragraph(
            f"- Merged models that have the base's {sizes['modules']} modules (names, classes) and {sizes['tensors']} "
            f"tensors (names, shapes, dtypes), no more and no fewer: {sum(equal.values())} of {len(equal)}. Their "
            f"embeddings differ from the unmerged adapters' by at most {max(row['merged_error'].values()):.1e}."
        ),
        paragraph(
            f"- {SWAPPED} in a bank: `set_adapter` {swap_median:.2f} ms (95th percentile {swap_slow:.2f}), `add` from "
            f"a folder {quartiles(row['add_ms'])[1]:.0f} ms (the first {row['first_add_ms']:.0f} ms: it hashes the "
            f"base), `hot_swap` {quartiles(row['hot_swap_ms'])[1]:.0f} ms. Embeddings after a swap against a bank with "
            f"that adapter alone, and after `disable` against the base, bit by bit: {answers}. Differences, relative: "
            f"{row['hot_swap_error']:.1e} after a hot swap, {row['adapter_change']:.1e} between adapter and base."
        ),
    ]


def paragraph(text: str) -> str:
    """Lines of Markdown, indented as a list's where it is an item."""
    indent = "  " if text.startswith("- ") else ""
    return textwrap.fill(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def spread(values: tuple[float, float, float]) -> str:
    """Median and quartiles as a cell."""
    low, median, high = values
    return f"{median:.2f} [{low:.2f}, {high:.2f}]"


def table_row(cells: list[str]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()

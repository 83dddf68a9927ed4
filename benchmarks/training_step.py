"""A training step beside the reference implementation's: time and memory, and what adapters and checkpointing save.

    python benchmarks/training_step.py REFERENCE_CHECKOUT --out docs/results/training_step [--sizes b0 b2] [--quick]

REFERENCE_CHECKOUT: a checkout of IDRnD/redimnet (dd9f519 was used) or, of sizes of ReDimNet2, of PalabraAI/redimnet2
(ffe8f27 was used), which are not part of this project. They have no loss of their own, so both sides train by AAM over
5,994 speakers, written plainly for the reference. A step: forward, backward, SGD with momentum, of 32 crops of 2 s.
Weights are random and audio is noise: neither matters for time or size. Before anything is timed, loss and gradients of
both are compared. What is timed takes turns; memory is that of a process for each. OUT.md and OUT.json are rewritten
after each size. Run it while nothing else runs. With --device cuda on a GPU: memory is then the GPU's, and no step is
profiled.
"""

import argparse
import importlib
import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from adapter_costs import NO_DATA, paragraph, table_row
from memory import in_fresh_process, peak_allocated, peak_on_gpu, peak_resident, resident
from reference import WRAPPERS, build_pair, network_of, reference_arguments, refuse_no_checkout
from timing import machine, quartiles, speedup, take_turns
from torch import nn
from torch.profiler import ProfilerActivity, profile

from configuration_mrl_redimnet import SAMPLING_RATE, SIZES, MRLReDimNetConfig
from losses_mrl_redimnet import angular_margin
from modeling_mrl_redimnet import MRLReDimNetForXVector, MRLReDimNetModel
from mrl_redimnet.adapters.strategies import AdapterPlan, Vanilla
from mrl_redimnet.convert import convert_state_dict

SPEAKERS, CROPS, CROP_SECONDS = 5994, 32, 2.0
MARGIN, SCALE = 0.2, 32.0
REFERENCE, OURS = "reference", "ours"
PREFIXES, CHECKPOINTING = "ours, every prefix", "ours, gradient checkpointing"
ADAPTERS = {
    "ours, LoRA on all linear layers, r=8": AdapterPlan(1, "linear"),
    "ours, LoRA on the projection, r=4": AdapterPlan(1, "projection", rank=4),
}
LORA = next(iter(ADAPTERS))
SYSTEMS = (REFERENCE, OURS, PREFIXES, CHECKPOINTING, *ADAPTERS)
SPEED_GOAL, MEMORY_GOAL = 1.5, 0.7
TOLERANCE = 1e-4  # relative, of loss and gradients, on the same features
ROUNDING_TOLERANCE = 1e-3  # of the loss in float32, each side with its own front end
OPERATIONS = 14  # in the profile's table


def main():
    """Measures size by size; prints and writes what is known after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=["b0", "b2"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=75.0, help="of rounds per size, at least 4 rounds [75]")
    parser.add_argument("--quick", action="store_true", help="two rounds of 4 crops: to see that it runs")
    arguments = parser.parse_args()
    for network in map(network_of, arguments.sizes):
        refuse_no_checkout(arguments.reference, network)
    sys.path.insert(0, str(arguments.reference))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    crops = 4 if arguments.quick else CROPS
    command = shlex.join(["python", *sys.argv]).replace(shlex.quote(str(arguments.reference)), "REFERENCE_CHECKOUT")
    record = {"command": command, "machine": machine(arguments.device), "threads": arguments.threads}
    record["torch"] = torch.__version__
    record |= {"crops": crops, "sizes": {}}
    for size in arguments.sizes:
        began = time.perf_counter()
        rounds = (0.0, 2, 2) if arguments.quick else (arguments.seconds, 4, 20)
        record["sizes"][size] = measure(size, crops, rounds, arguments)
        record["goals"] = goals(record["sizes"])
        arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(report(record))
        print(f"{size}: measured in {time.perf_counter() - began:.0f} s", flush=True)
    print(report(record))


def measure(size: str, crops: int, rounds: tuple[float, int, int], arguments) -> dict:
    """Everything of one size."""
    agreement = compare(size)
    reference, threads, device = str(arguments.reference.resolve()), arguments.threads, arguments.device
    memory = {name: in_fresh_process(memory_of, size, name, crops, threads, reference, device) for name in SYSTEMS}
    steps = {name: Step(size, name, crops, device) for name in SYSTEMS}
    for step in steps.values() if device == "cuda" else ():
        step()  # a GPU loads its kernels when they are first used
    times = take_turns(steps, *rounds, device=device)
    return {
        "agreement": agreement,
        "step_ms": {name: quartiles([1000 * s for s in values]) for name, values in times.items()},
        "speedup": {name: speedup(times, REFERENCE, name) for name in SYSTEMS},
        "share_of_ours": {name: speedup(times, name, OURS) for name in SYSTEMS},
        "rounds": len(times[OURS]),
        "memory_mib": memory,
        "profile": {name: steps[name].profile() for name in (OURS, LORA)} if device == "cpu" else {},
    }


# ----------------------------------------------------------------------------------------------------------------------
# The contestants


class PlainAAM(nn.Module):
    """Additive angular margin softmax as papers write it: embeddings [B, D], labels [B] -> loss []."""

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight.detach().clone())

    def forward(self, embeddings: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        cosine = F.linear(F.normalize(embeddings.float()), F.normalize(self.weight))
        target = angular_margin(cosine.gather(1, labels[:, None]), MARGIN)
        return F.cross_entropy(SCALE * cosine.scatter(1, labels[:, None], target), labels)


class ReferenceSpeakers(nn.Module):
    """The reference's encoder with that loss, called as our model is."""

    def __init__(self, encoder: nn.Module, weight: torch.Tensor):
        super().__init__()
        self.encoder, self.classifier = encoder, PlainAAM(weight)

    def forward(self, waveforms: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.encoder(waveforms), labels)


class OurSpeakers(nn.Module):
    """Our encoder with our loss: of the full embedding alone, or of every prefix."""

    def __init__(self, encoder: MRLReDimNetModel, every_prefix: bool):
        super().__init__()
        dims = encoder.config.matryoshka_dims
        changes = {"num_speakers": SPEAKERS, "margin": MARGIN, "scale": SCALE}
        changes["prefix_weights"] = [1.0 if every_prefix or dim == dims[-1] else 0.0 for dim in dims]
        self.model = MRLReDimNetForXVector(MRLReDimNetConfig.from_dict({**encoder.config.to_dict(), **changes}))
        self.model.redimnet = encoder

    def forward(self, waveforms: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return self.model(waveforms, labels=labels).loss


def build(size: str) -> tuple[ReferenceSpeakers, OurSpeakers]:
    """Both sides with the same weights, in training mode."""
    reference, encoder = build_pair(size)
    ours = OurSpeakers(encoder, every_prefix=False)
    return ReferenceSpeakers(reference, ours.model.classifier.weight).train(), ours.train()


def batch_of(crops: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise [crops, samples] and labels, always the same."""
    generator = torch.Generator().manual_seed(1)
    waveforms = 0.1 * torch.randn(crops, int(CROP_SECONDS * SAMPLING_RATE), generator=generator)
    return waveforms, torch.randint(SPEAKERS, (crops,), generator=generator)


class Step:
    """A system in training, with a batch of noise; a call is a step."""

    def __init__(self, size: str, system: str, crops: int, device: str):
        reference, ours = build(size)
        self.model = reference if system == REFERENCE else ours
        if system == PREFIXES:
            self.model = OurSpeakers(ours.model.redimnet, every_prefix=True)
        if system == CHECKPOINTING:
            ours.model.gradient_checkpointing_enable()
        if system in ADAPTERS:  # the classifier stays outside, and trains as well
            self.strategy = Vanilla(ours.model.redimnet, ADAPTERS[system], NO_DATA)
        self.model.train().to(device)
        self.batch = [tensor.to(device) for tensor in batch_of(crops)]
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.SGD(trained, lr=1e-6, momentum=0.9)

    def __call__(self):
        self.model(*self.batch).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def profile(self) -> dict:
        """Milliseconds of a forward and a backward pass: by the clock, and by operation, its own time in either."""
        found: dict[str, Any] = {"ms": [], "operations": {}}
        loss = None
        for index in range(2):
            with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
                start = time.perf_counter()
                if index == 0:
                    loss = self.model(*self.batch)
                else:
                    loss.backward()
                found["ms"].append(1000 * (time.perf_counter() - start))
            for event in profiler.key_averages():
                found["operations"].setdefault(event.key, [0.0, 0.0])[index] = event.self_cpu_time_total / 1000
        self.optimizer.zero_grad()
        return found


# ----------------------------------------------------------------------------------------------------------------------
# Agreement, memory


def compare(size: str) -> dict[str, float]:
    """How far loss and gradients of both are apart, relative; raises RuntimeError where that is too far.

    Both front ends agree to float32's rounding, which batch norms of few utterances and ReLUs magnify, in b0 a
    thousandfold. So gradients are compared on one side's features, behind them in float64, where rounding is small; and
    the loss once more as it is timed.
    """
    errors = {}
    for name in ("same_features", "float32"):
        reference, ours = build(size)
        if name == "same_features":
            share_features(reference.encoder, ours.model.redimnet)
        batch = batch_of(8)
        losses = [side(*batch) for side in (reference, ours)]
        for loss in losses:
            loss.backward()
        errors[f"loss, {name}"] = abs(float((losses[1] - losses[0]) / losses[0]))
        errors[f"gradients, {name}"] = gradient_error(size, reference, ours)
    exact = max(errors["loss, same_features"], errors["gradients, same_features"])
    if not (exact <= TOLERANCE and errors["loss, float32"] <= ROUNDING_TOLERANCE):
        raise RuntimeError(f"{size}: the two do not agree: {errors}.")
    return errors


def share_features(reference: nn.Module, ours: MRLReDimNetModel):
    """From here on both encoders compute in float64, on the reference's features, which are computed in float32."""
    last = {}

    def keep(module, inputs, features):
        last["features"] = features.double()
        return last["features"]

    for encoder, front_end in ((reference, reference.spec), (ours, ours.front_end)):
        encoder.double()
        front_end.float()
    reference.spec.register_forward_hook(keep)
    ours.front_end.register_forward_hook(lambda *_: last["features"].transpose(1, 2))


def gradient_error(size: str, reference: ReferenceSpeakers, ours: OurSpeakers) -> float:
    """Of all gradients together, relative. A checkpoint's conversion arranges tensors anew, and so their gradients."""
    state = reference.encoder.state_dict()
    state |= {name: parameter.grad for name, parameter in reference.encoder.named_parameters()}
    encoder = ours.model.redimnet
    converted = convert_state_dict(state, encoder, reference_arguments(size))
    pairs = [(parameter.grad, converted[name]) for name, parameter in encoder.named_parameters()]
    pairs.append((ours.model.classifier.weight.grad, reference.classifier.weight.grad))
    difference = sum(float((one - other).double().square().sum()) for one, other in pairs)
    return (difference / sum(float(other.double().square().sum()) for _, other in pairs)) ** 0.5


def memory_of(size: str, system: str, crops: int, threads: int, reference: str, device: str) -> dict[str, float]:
    """MiB that training adds to a process with libraries loaded (or occupies on a GPU), at its peak, and of it live
    tensors of a step."""
    sys.path.insert(0, reference)
    torch.set_num_threads(threads)
    importlib.import_module(WRAPPERS[network_of(size)][0])  # of the libraries
    if device == "cuda":
        steps = []
        whole = peak_on_gpu(lambda: (steps.append(Step(size, system, crops, device)), steps[0](), steps[0]()))
        return {"resident": whole / 2**20, "tensors": peak_on_gpu(steps[0]) / 2**20}
    before = resident()
    step = Step(size, system, crops, device)
    return {
        "resident": (peak_resident(lambda: (step(), step())) - before) / 2**20,
        "tensors": peak_allocated(step) / 2**20,
    }


# ----------------------------------------------------------------------------------------------------------------------
# Report


def goals(sizes: dict[str, dict]) -> list[dict]:
    """Each goal, what was measured, and whether that passes."""
    found = []
    for size, row in sizes.items():
        factor, memory = row["speedup"][OURS]["median"], memory_ratio(row, OURS, REFERENCE, "resident")
        text = f"{size}: a step at {factor:.2f} times the reference's speed, at least {SPEED_GOAL:g}"
        found.append({"goal": text, "passes": factor >= SPEED_GOAL})
        text = f"{size}: a step in {memory:.2f} of the reference's peak memory, at most {MEMORY_GOAL:g}"
        found.append({"goal": text, "passes": memory <= MEMORY_GOAL})
    return found


def memory_ratio(row: dict, name: str, reference: str, kind: str) -> float:
    """Peak memory of one by another's."""
    return row["memory_mib"][name][kind] / row["memory_mib"][reference][kind]


def report(record: dict) -> str:
    """Markdown: the command, how to read it, the sections of the sizes, the goals."""
    text = ["# What a training step costs", "", f"```bash\n{record['command']}\n```", ""]
    text += [
        paragraph(
            f"{record['machine']}, threads: {record['threads']}, torch {record['torch']}, float32, eager. A step: "
            f"forward, AAM over {SPEAKERS:,} speakers, backward, SGD with momentum, of {record['crops']} crops of "
            f"{CROP_SECONDS:g} s at the published hop. Random weights and noise. Ratios of time: median [quartiles] "
            "over rounds of all taking turns."
        ),
        "",
        paragraph(
            "- every prefix: the Matryoshka loss over all prefixes; everywhere else the loss of the full embedding "
            "alone, as the reference's. LoRA: the trunk's own weights rest; the classifier trains in all of them."
        ),
        paragraph(
            "- memory: what model, optimiser and steps add, at their peak, to a process with the libraries loaded, set "
            "to return freed blocks at once. Tensors: the most bytes of tensors that a step has alive at once beyond "
            "model and optimiser, counted at torch's allocator."
        ),
    ]
    for size, row in record["sizes"].items():
        text += ["", *size_report(size, row)]
    text += ["", "## Goals", ""]
    text += [f"- {'pass' if goal['passes'] else '**FAIL**'}: {goal['goal']}" for goal in record["goals"]]
    return "\n".join(text) + "\n"


def size_report(size: str, row: dict) -> list[str]:
    """The section of one size."""
    columns = ["", "step, ms", "times the reference's speed", "time by ours", "memory, MiB", "by the reference's"]
    columns += ["by ours", "tensors, MiB", "by the reference's"]
    text = [f"## {size}", "", table_row(columns), table_row(["---"] * len(columns))]
    for name in SYSTEMS:
        memory = row["memory_mib"][name]
        text.append(
            table_row(
                [
                    name,
                    spread(row["step_ms"][name], 0),
                    spread(row["speedup"][name], 2),
                    spread(row["share_of_ours"][name], 2),
                    f"{memory['resident']:,.0f}",
                    f"{memory_ratio(row, name, REFERENCE, 'resident'):.2f}",
                    f"{memory_ratio(row, name, OURS, 'resident'):.2f}",
                    f"{memory['tensors']:,.0f}",
                    f"{memory_ratio(row, name, REFERENCE, 'tensors'):.2f}",
                ]
            )
        )
    errors = row["agreement"]
    text += [
        "",
        paragraph(
            f"{row['rounds']} rounds. Agreement in training mode with the same weights, relative errors: on the same "
            f"features, the encoder in float64: loss {errors['loss, same_features']:.0e}, all gradients "
            f"{errors['gradients, same_features']:.0e} (at most {TOLERANCE:g}); as timed: loss "
            f"{errors['loss, float32']:.0e} (at most {ROUNDING_TOLERANCE:g}), all gradients "
            f"{errors['gradients, float32']:.0e}."
        ),
        "",
        *(profile_report(row["profile"]) if row["profile"] else []),
    ]
    return text


def profile_report(profiles: dict) -> list[str]:
    """Where the time of a LoRA step goes, beside the full one."""
    full, lora = profiles[OURS], profiles[LORA]
    forward, backward = lora["ms"]
    operations = sorted(lora["operations"], key=lambda key: -sum(lora["operations"][key]))[:OPERATIONS]
    shown = sum(sum(lora["operations"][key]) for key in operations)
    columns = ["operation's own time, ms", "LoRA forward", "LoRA backward", "full forward", "full backward"]
    text = [
        paragraph(
            f"What limits the LoRA step ({LORA.removeprefix('ours, ')}), one profiled step: forward {forward:.0f} ms, "
            f"backward {backward:.0f} ms; a full step's {full['ms'][0]:.0f} and {full['ms'][1]:.0f} ms. An adapter in "
            "the first block needs the gradients by all activations behind it, and saves those by the weights; the "
            f"forward pass grows by the adapters' own products. These operations are "
            f"{100 * shown / (forward + backward):.0f} % of the step:"
        ),
        "",
        table_row(columns),
        table_row(["---"] * len(columns)),
    ]
    for key in operations:
        cells = [*lora["operations"][key], *full["operations"].get(key, [0.0, 0.0])]
        text.append(table_row([f"`{key}`", *[f"{ms:.1f}" for ms in cells]]))
    return text


def spread(values: dict[str, float], digits: int) -> str:
    """Median and quartiles as a cell."""
    low, median, high = (f"{values[key]:.{digits}f}" for key in ("low", "median", "high"))
    return f"{median} [{low}, {high}]"


if __name__ == "__main__":
    main()

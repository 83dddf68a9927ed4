"""Trained networks beside each other: EER per dimension, paired differences from the first, size, compute, training.

    python benchmarks/compare_networks.py RUN [RUN ...] --speech ROOT --out docs/results/NAME [--resamples 1000]

A RUN is the output folder of a training (train_hf.py): its best/, results.json and history.jsonl are read. ROOT holds
test/wav and test/trials_*.txt. All networks of a list are compared on the same resamples of its speakers, so an
interval of a difference is a paired one. Writes OUT.json, OUT.md and OUT.png.
"""

import argparse
import json
import shlex
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import torch
from paired import Drawn, change, eers, percent
from report_training import shortened
from torch.utils.flop_counter import FlopCounterMode

from configuration_mrl_redimnet import SAMPLING_RATE
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.files import replace_file
from mrl_redimnet.saving import load_model
from mrl_redimnet.scoring.trials import read_trials

# What two runs may differ in, and be called a comparison of networks.
NETWORK = {"model.start", "run.output"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--speech", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--resamples", type=int, default=1000)
    arguments = parser.parse_args()
    recipes = {run.name: settings_of(run) for run in arguments.runs}
    refuse_other_differences(parser, recipes)
    first = next(iter(recipes))
    record = {
        "command": f"python benchmarks/compare_networks.py {shlex.join(f'runs/{name}' for name in recipes)} "
        f"--speech $SPEECH --out docs/results/{arguments.out.name} --resamples {arguments.resamples}",
        "resamples": arguments.resamples,
        "recipe": shortened({name: value for name, value in recipes[first].items() if name not in NETWORK}),
        "networks": {},
        "lists": {},
    }
    found: dict[str, dict[str, dict[int, Drawn]]] = {}
    for run in arguments.runs:
        model = load_model(run / "best")
        record["networks"][run.name] = facts(run, recipes[run.name]["model.start"], model)
        for path in sorted((arguments.speech / "test").glob("trials_*.txt")):
            trials = read_trials(path)
            files = [arguments.speech / "test" / "wav" / name for name in trials.utterances]
            embeddings = SpeakerEncoder(model).embed(files, progress=f"{run.name}, {path.stem}")
            dims = model.config.matryoshka_dims
            drawn = eers(trials, trials.utterances, embeddings, dims, arguments.resamples)
            found.setdefault(path.stem.removeprefix("trials_"), {})[run.name] = drawn
    for name, networks in found.items():
        record["lists"][name] = {
            network: {
                dim: {"eer": each.record(), "change": (each - networks[first][dim]).record()}
                for dim, each in drawn.items()
            }
            for network, drawn in networks.items()
        }
    replace_file(arguments.out.with_suffix(".json"), lambda file: file.write_text(json.dumps(record, indent=1) + "\n"))
    text = report(record, found, first)
    replace_file(arguments.out.with_suffix(".md"), lambda file: file.write_text(text))
    plot(found, arguments.out.with_suffix(".png"))
    print(text)


def settings_of(run: Path) -> dict:
    """The settings of a run by their full names, with the steps that it had."""
    results = json.loads((run / "results.json").read_text())
    settings = {f"{group}.{name}": value for group, those in results["recipe"].items() for name, value in those.items()}
    return settings | {"schedule.steps": results["steps"]}


def refuse_other_differences(parser: argparse.ArgumentParser, recipes: dict[str, dict]):
    """The runs' recipes are to be the same but for the network."""
    one, *others = recipes.values()
    for other in others:
        differ = [name for name in sorted({*one, *other} - NETWORK) if one.get(name) != other.get(name)]
        if differ:
            parser.error(f"the runs differ in more than the network: {', '.join(differ)}")


def facts(run: Path, size: str, model: torch.nn.Module) -> dict:
    """Size, multiply-adds of two seconds, and what the training logged."""
    encoder, results = getattr(model, "redimnet", model), json.loads((run / "results.json").read_text())
    with torch.inference_mode(), FlopCounterMode(display=False) as counted:
        encoder(torch.zeros(1, 2 * SAMPLING_RATE))
    logged = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    rates = [entry["step_crops_per_s"] for entry in logged if entry["kind"] == "train"]
    development = {
        entry["step"]: float(np.mean(list(entry["eer"].values())))
        for entry in logged
        if entry["kind"] == "evaluation" and entry["set"] == "development"
    }
    return {
        "size": size,
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "multiply_adds": counted.get_total_flops() // 2,
        "crops_per_s": float(np.median(rates)),
        "best_step": results["best_step"],
        "saved": results["saved"],
        "development_eer": development,
    }


def report(record: dict, found: dict, first: str) -> str:
    """The record as Markdown."""
    recipe, networks = record["recipe"], record["networks"]
    lines = [
        f"# {' beside '.join(each['size'] for each in networks.values())}",
        "",
        f"`{record['command']}`. Trained by the same recipe, {recipe['schedule.steps']} steps of "
        f"{recipe['data.batch_size']} crops of {recipe['data.crop_seconds']:g} s, one run each. EER in per cent, 95 % "
        f"intervals by a bootstrap over speakers ({record['resamples']} resamples), paired for differences; bold: "
        "beyond noise.",
        "",
        "| | parameters | multiply-adds of 2 s | crops/s that the training logged, median | best step | saved |",
        "|---|---|---|---|---|---|",
    ]
    for each in networks.values():
        lines.append(
            f"| {each['size']} | {each['parameters'] / 1e6:.2f} M | {each['multiply_adds'] / 1e9:.3f} G | "
            f"{each['crops_per_s']:.0f} | {each['best_step']} | {each['saved']} |"
        )
    for name, drawn in found.items():
        dims = list(drawn[first])
        lines += ["", f"## {name}", "", "| | " + " | ".join(map(str, dims)) + " |", "|---" * (len(dims) + 1) + "|"]
        for network, row in drawn.items():
            lines.append(f"| {networks[network]['size']} | " + " | ".join(percent(row[dim]) for dim in dims) + " |")
        for network, row in list(drawn.items())[1:]:
            changes = " | ".join(change(row[dim] - drawn[first][dim]) for dim in dims)
            lines.append(f"| {networks[network]['size']} - {networks[first]['size']} | {changes} |")
    steps = list(next(iter(networks.values()))["development_eer"])
    lines += ["", "## Development EER % over training, mean over dimensions", ""]
    lines += ["| step | " + " | ".join(map(str, steps)) + " |", "|---" * (len(steps) + 1) + "|"]
    for each in networks.values():
        values = " | ".join(f"{100 * value:.1f}" for value in each["development_eer"].values())
        lines.append(f"| {each['size']} | {values} |")
    return "\n".join(lines) + "\n"


def plot(found: dict, path: Path):
    """EER over dimensions with intervals, a panel per list."""
    figure, panels = plt.subplots(1, len(found), figsize=(5 * len(found), 4), squeeze=False)
    for panel, (name, networks) in zip(panels[0], found.items(), strict=True):
        for shift, (network, drawn) in enumerate(networks.items()):
            places = np.arange(len(drawn)) + 0.12 * shift
            values = np.array([each.value for each in drawn.values()])
            bounds = np.abs(np.array([each.interval for each in drawn.values()]).T - values)
            panel.errorbar(places, 100 * values, 100 * bounds, fmt="o-", capsize=3, label=network)
        panel.set_xticks(range(len(drawn)), [str(dim) for dim in drawn])
        panel.set(title=name, xlabel="dimensions", ylabel="EER, %", ylim=(0, None))
        panel.legend()
    figure.tight_layout()
    replace_file(path, lambda file: figure.savefig(file, dpi=120, format="png"))


if __name__ == "__main__":
    main()

"""Adapters and fine-tuning on real domains: calls, children, Mandarin speakers' English, single words.

    python benchmarks/real_domains.py train RUNS [--only WORD ...]
    python benchmarks/real_domains.py dev RUNS
    python benchmarks/real_domains.py report RUNS --speech SPEECH SPEECH_MORE --out docs/results/real_domains
    python benchmarks/real_domains.py draw --out docs/results/real_domains

RUNS is what `real_speech.py` made. Every run trains the packaged model on one thread by `train_hf.py`, all for the same
number of steps; `train` goes through the plan in its order, leaves out what RUNS/rows has, and writes a row there for
each run: its settings, its seconds, its EERs on the development trials (of training speakers that no run trains on).
Settings are chosen by these alone: `dev` shows them. `report` is the only command that opens the test lists: it embeds
them with every finished run and writes all tables at once. `draw` makes the picture again from what it has written.

Crops depend on speakers, seed and step alone, so they are drawn once; where the trunk is frozen, so is what it makes of
them. Both are kept in RUNS, so that a run with a frozen trunk takes seconds once another had the same crops.
"""

import argparse
import functools
import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import adapter_grid
import numpy as np
import torch
import yaml
from compare_adapters import machine
from paired import Drawn, averaged, change, eers, percent

import train_hf
from modeling_mrl_redimnet import MRLReDimNetModel
from mrl_redimnet.adapters.bank import AdapterBank
from mrl_redimnet.adapters.hub import adapter_info
from mrl_redimnet.audio.io import read_audio
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.files import replace_text
from mrl_redimnet.plotting import legend_line, new_figure, save_figure
from mrl_redimnet.saving import load_model
from mrl_redimnet.scoring.trials import Trials, read_trials
from mrl_redimnet.training import setup
from mrl_redimnet.training.optimizer import freeze
from mrl_redimnet.training.reading import flat, in_groups, read_recipe

BASE = "nano"
CLEAN = "librispeech"  # the test list of clean speech
DIMS = (64, 256)
STEPS, CROPS, SECONDS = 100, 16, 3.0
DISTINCT = 32  # batches that are drawn; a run goes through them again and again
# Highest learning rates: of all weights, of whatever is small, and of that where the teacher tells of calls.
ALL_WEIGHTS, SMALL, CALLS = 2e-4, 2e-3, 5e-4


@dataclass(frozen=True)
class Run:
    """One training.

    domain: whose speakers are held out and, at the end, tested. data: "real", its speakers; "simulated", wideband
    speakers through simulated calls; "both". speakers: how many real ones, 0 is all that are not held out. signal:
    "teacher" or "labels". system: what is trained, of `SYSTEMS`. more: further settings, by name.
    """

    domain: str
    data: str = "real"
    speakers: int = 0
    signal: str = "teacher"
    system: str = "LoRA projection, r=4"
    seed: int = 0
    more: dict = field(default_factory=dict, hash=False)
    variant: str = ""

    @property
    def key(self) -> str:
        """Its name, also of its folder."""
        parts = (self.domain, self.data, self.speakers or "all", self.signal, self.system, self.variant, self.seed)
        return "-".join(str(part).replace(" ", "_").replace(",", "") for part in parts if part != "")


def lora(placement: str, rank: int, **settings) -> dict:
    """Settings of an adapter."""
    return {"finetune": "adapter", "placement": placement, "rank": rank, **settings}


SYSTEMS = {
    "all weights": {"finetune": "all", "learning_rate": ALL_WEIGHTS},
    "head": {"finetune": "head"},
    "projection, whole": {"finetune": "projection"},
    **{
        f"LoRA {placement}, r={rank}": lora(placement, rank)
        for placement in ("projection", "attention", "pointwise", "linear")
        for rank in (1, 2, 4, 8, 16, 32)
    },
}
SIGNALS = {
    "teacher": {"margin_weight": 0.0, "teacher_loss": "direction", "teacher_weight": 10.0},
    "labels": {
        "margin_weight": 1.0,
        "teacher": None,
        "teacher_axes": None,
        "margin_schedule": [0.3, 0.7],
        "learning_rate": 1e-3,
        "part_learning_rates": {"classifier": 5e-3},  # it begins with random weights
    },
}


DOMAINS = ("telephone", "children", "adults", "words")


P4, LINEAR, ATTENTION = "LoRA projection, r=4", "LoRA linear, r=8", "LoRA attention, r=8"
TRAINED = (P4, "LoRA projection, r=1", "LoRA projection, r=16", "projection, whole", "head", ATTENTION, LINEAR)
TRAINED += ("all weights",)
SEEDS = (0, 1, 2)


def plan() -> list[Run]:
    """All runs, seed by seed, what matters most first."""
    runs, faster = [], {"learning_rate": SMALL}
    for domain in ("telephone", "children"):
        runs += [Run(domain, signal=signal, system=system) for signal in SIGNALS for system in TRAINED]
    runs += [Run("telephone", data=data) for data in ("simulated", "both")]
    runs += [
        Run("telephone", data="simulated", system=system, more=faster)
        for system in ("projection, whole", ATTENTION, LINEAR)
    ]
    for domain, counts in (
        ("telephone", (5, 10, 20)),
        ("children", (5, 10, 20)),
        ("adults", (0, 10)),
        ("words", (0, 10)),
    ):
        runs += [Run(domain, speakers=count, signal=signal) for signal in SIGNALS for count in counts]
    return [replace(run, seed=seed) for seed in SEEDS for run in runs]


# ----------------------------------------------------------------------------------------------------------------------
# Training


def main():
    """Trains what is missing, shows what is there, or draws a report."""
    arguments = parse()
    if arguments.command == "draw":
        draw(json.loads(arguments.out.with_suffix(".json").read_text()), arguments.out.with_suffix(".png"))
        return
    remember(arguments.runs)
    {"train": train, "dev": show_rows, "report": report}[arguments.command](arguments)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "dev", "report", "draw"))
    parser.add_argument("runs", type=Path, nargs="?", metavar="RUNS")
    parser.add_argument("--only", nargs="+", default=[""], help="runs whose name has one of these words in it")
    parser.add_argument("--speech", type=Path, nargs="+", help="folders with test and its trial lists")
    parser.add_argument("--out", type=Path, help="without suffix")
    parser.add_argument("--resamples", type=int, default=1000)
    arguments = parser.parse_args()
    if arguments.runs is None and arguments.command != "draw":
        parser.error(f"{arguments.command} needs RUNS")
    return arguments


def train(arguments: argparse.Namespace):
    """Every run of the plan that has no row yet."""
    train_all(arguments.runs, [run for run in plan() if any(word in run.key for word in arguments.only)])


def train_all(folder: Path, runs: list[Run]):
    """Those of `runs` that have no row in `folder` yet, in their order."""
    (folder / "rows").mkdir(exist_ok=True)
    for run in runs:
        file = folder / "rows" / f"{run.key}.json"
        if not file.is_file():
            row = {**asdict(run), "key": run.key, **train_once(folder, run)}
            replace_text(file, json.dumps(row) + "\n")
            print(run.key, row["seconds"], row["dev"], flush=True)


def rows(runs: Path) -> dict[str, dict]:
    """The rows of finished runs, by their names."""
    found = [json.loads(file.read_text()) for file in sorted((runs / "rows").glob("*.json"))]
    return {row["key"]: row for row in found}


def train_once(runs: Path, run: Run) -> dict:
    """Trains; its seconds of a core and its EERs on the development trials."""
    folder = folder_of(runs, run)
    folder.mkdir(parents=True, exist_ok=True)
    speech = view(runs, run)
    recipe = {"start": BASE, "train": str(speech), "output": str(folder), "seed": run.seed}
    recipe |= {"steps": STEPS, "evaluate_every": STEPS, "checkpoint_every": STEPS, "bootstrap_samples": 0}
    rate = CALLS if run.domain == "telephone" else SMALL
    recipe |= {"batch_size": CROPS, "crop_seconds": SECONDS, "learning_rate": rate, "warmup": 0.1}
    recipe |= {"final_learning_rate": 1e-5, "weight_decay": 0.01, "workers": 0, "tracker": "none"}
    recipe |= {"dev_trials": str(few_trials(runs)), "dev_folder": str(runs / "clean"), "dev_speakers": 0}
    recipe |= {"teacher": str(runs / "teacher.parquet"), "teacher_axes": str(runs / "teacher_axes.safetensors")}
    recipe |= SIGNALS[run.signal] | SYSTEMS[run.system] | run.more
    (folder / "recipe.yaml").write_text(yaml.safe_dump(in_groups(flat(read_recipe(None, recipe)))))
    began = time.process_time()
    setup.DrawnCrops = functools.partial(FewCrops, folder=runs / "crops" / f"{speech.name}-{run.seed}")
    train_hf.main([str(folder / "recipe.yaml"), "--resume"])
    seconds = time.process_time() - began
    return {"seconds": round(seconds, 1), "dev": development(runs, run.domain, SpeakerEncoder(trained(folder)))}


class FewCrops(adapter_grid.KeptCrops):
    """`DISTINCT` batches in turn, read from a folder."""

    def batches(self, first_step: int, stop_step: int) -> Iterator[dict]:
        """Those of the steps, by their numbers."""
        for step in range(first_step, stop_step):
            yield from super().batches(step % DISTINCT, step % DISTINCT + 1)


def remember(runs: Path):
    """One thread, and `remembered` in RUNS."""
    torch.set_num_threads(1)
    MRLReDimNetModel.pooled = remembered(MRLReDimNetModel.pooled, runs / "pooled")


def remembered(pooled: Callable, folder: Path) -> Callable:
    """`MRLReDimNetModel.pooled`, which keeps its answers in `folder` where nothing in front of the projection learns.

    They are found by the weights in front of the projection and by the input.
    """

    def look_up(model: MRLReDimNetModel, input_values, lengths=None, weights=None, end=None):
        before = {name: value for name, value in model.state_dict().items() if not name.startswith("projection.")}
        learns = [p for name, p in model.named_parameters() if p.requires_grad and not name.startswith("projection.")]
        if weights is not None or end is not None or (torch.is_grad_enabled() and learns):
            return pooled(model, input_values, lengths, weights, end)
        digest = hashlib.sha1(f"{model.training} {None if lengths is None else lengths.tolist()}".encode())
        for value in (*before.values(), input_values):
            digest.update(value.detach().contiguous().numpy().tobytes())
        file = folder / digest.hexdigest()[:2] / f"{digest.hexdigest()}.pt"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            own = file.with_suffix(f".{os.getpid()}")
            torch.save(pooled(model, input_values, lengths).detach().clone(), own)
            os.replace(own, file)
        return torch.load(file)

    return look_up


def few_trials(runs: Path) -> Path:
    """Two trials for `train_hf.py`, which chooses no step by them: there is one evaluation, at the end of the run."""
    lines = (runs / "dev_clean.txt").read_text().splitlines()
    replace_text(runs / "dev_few.txt", f"{lines[0]}\n{lines[-1]}\n")
    return runs / "dev_few.txt"


def folder_of(runs: Path, run: Run) -> Path:
    """Where a run lies."""
    return runs / "runs" / run.key


def view(runs: Path, run: Run) -> Path:
    """A folder of links to the speakers that a run trains on. With fewer than all, another seed draws other ones."""
    domains = json.loads((runs / "domains.json").read_text())
    names = domains[run.domain]["train"] if run.data != "simulated" else []
    if run.speakers:
        names = random.Random(f"{run.domain} {run.seed}").sample(sorted(names), run.speakers)
    links = {name: runs / "speech" / name for name in names}
    if run.data != "real":
        links |= {name: runs / "simulated" / name for name in domains["wideband"]["train"]}
    seed = f"-{run.seed}" if run.speakers else ""
    folder = runs / "views" / f"{run.domain if run.data != 'simulated' else 'wideband'}-{run.data}-{run.speakers}{seed}"
    for name, target in links.items():
        link = folder / name
        if not link.is_symlink():
            folder.mkdir(parents=True, exist_ok=True)
            link.symlink_to(target.resolve())
    return folder


def trained(folder: Path):
    """The encoder that a run ended with, an adapter merged into the base."""
    best = folder / "best"
    if (best / "adapter_config.json").is_file():
        return AdapterBank.load(BASE, {"adapter": best}).merged("adapter")
    model = load_model(best)
    return getattr(model, model.base_model_prefix, model)


@functools.cache
def waves_of(folder: Path, paths: tuple[str, ...]) -> list[np.ndarray]:
    """The audio of a list, read once for all runs."""
    return [read_audio(folder / path) for path in paths]


def development(runs: Path, domain: str, encoder: SpeakerEncoder) -> dict[str, float]:
    """{list, dimension: EER} on the domain's development trials, on clean ones, and those through simulated calls."""
    found = {}
    for name in (domain, "clean", *(["called"] if domain == "telephone" else [])):
        trials = read_trials(runs / f"dev_{name}.txt")
        folder = runs / (name if name in ("clean", "called") else "speech")
        embeddings = encoder.embed(waves_of(folder, tuple(trials.utterances)))
        for dim, drawn in eers(trials, trials.utterances, embeddings, DIMS, 2).items():
            found[f"{name}, {dim}"] = round(100 * drawn.value, 2)
    return found


def show_rows(arguments: argparse.Namespace):
    """The development EERs of all finished runs, each with the change from the base."""
    base = {domain: development(arguments.runs, domain, SpeakerEncoder(load_model(BASE))) for domain in DOMAINS}
    for key, row in rows(arguments.runs).items():
        if any(word in key for word in arguments.only):
            cells = [
                f"{name} {value:.2f} ({value - base[row['domain']][name]:+.2f})" for name, value in row["dev"].items()
            ]
            print(f"{key:<75} {row['seconds']:>6}  " + "  ".join(cells))


# ----------------------------------------------------------------------------------------------------------------------
# Report

Rates = dict[tuple[str, int], Drawn]  # by trial list and dimension


@dataclass(frozen=True)
class Lists:
    """The trial lists that runs are tested by."""

    runs: Path
    trials: dict[str, Trials]
    folders: dict[str, Path]
    resamples: int

    def rates(self, encoder: SpeakerEncoder, names: Sequence[str], dims: Sequence[int] = DIMS) -> Rates:
        """The EERs on the lists of these names, each with its resamples."""
        found = {}
        for name in names:
            trials, folder = self.trials[name], self.folders[name]
            embeddings = encoder.embed(waves_of(folder, tuple(trials.utterances)))
            of_dims = eers(trials, trials.utterances, embeddings, dims, self.resamples)
            found |= {(name, dim): drawn for dim, drawn in of_dims.items()}
        return found


def test_lists(runs: Path, speech: Sequence[Path], resamples: int) -> Lists:
    """Those of the test splits, and the held-out speakers of single words, which have none."""
    files = {file.stem.removeprefix("trials_"): file for folder in speech for file in folder.glob("test/trials_*.txt")}
    folders = {name: file.parent / "wav" for name, file in files.items()} | {"words": runs / "speech"}
    trials = {name: read_trials(file) for name, file in {**files, "words": runs / "dev_words.txt"}.items()}
    return Lists(runs, trials, folders, resamples)


TESTED = {
    "telephone": ("telephone", CLEAN),
    "children": ("children", CLEAN),
    "adults": ("adults", CLEAN),
    "words": ("words", CLEAN),
}
TITLES = {
    "telephone": "Telephone calls",
    "children": "Children",
    "adults": "Mandarin speakers' English, adults",
    "words": "Single words, Chinese and Arabic",
}


def report(arguments: argparse.Namespace):
    """Tests the base and every run of the plan that is done; writes OUT.json, OUT.md and OUT.png."""
    lists = test_lists(arguments.runs, arguments.speech, arguments.resamples)
    done, records, text = rows(arguments.runs), [], [HEAD.format(arguments.resamples, machine()), ""]
    tables, minutes = [], 0.0
    for domain in DOMAINS:
        names = TESTED[domain]
        base = lists.rates(SpeakerEncoder(load_model(BASE)), names)
        seeds: dict[Run, list[Rates]] = {}
        costs: dict[Run, list[float]] = {}
        for run in plan():
            if run.domain == domain and run.key in done:
                alike = replace(run, seed=0)
                rates = lists.rates(SpeakerEncoder(trained(folder_of(arguments.runs, run))), names)
                seeds.setdefault(alike, []).append(rates)
                costs.setdefault(alike, []).append(done[run.key]["seconds"])
                minutes += done[run.key]["seconds"] / 60
        tables += [f"## {TITLES[domain]}", "", *table(arguments.runs, domain, names, base, seeds), ""]
        records.append({"domain": domain, "run": "base", "seeds": 0, "results": results(base, base)})
        for run, found in seeds.items():
            facts = {"speakers": speakers_of(arguments.runs, run), "signal": run.signal, "system": named(run)}
            facts |= {"domain": domain, "run": run.key, "seeds": len(found)}
            records.append({**facts, "results": results(averaged(found), base)})
    text += [f"{len(done)} trainings, {minutes:.0f} minutes of a core.", "", *tables]
    arguments.out.with_suffix(".json").write_text(json.dumps(records, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text("\n".join(text).rstrip() + "\n")
    draw(records, arguments.out.with_suffix(".png"))
    print("\n".join(text))


HEAD = """# Adapters on real domains

```bash
python benchmarks/real_speech.py RUNS --speech SPEECH SPEECH_MORE --wheels WHEELS
python benchmarks/real_domains.py train RUNS
python benchmarks/real_domains.py report RUNS --speech SPEECH SPEECH_MORE --out docs/results/real_domains
```

EER % on test speakers [95 % interval over speakers], and changes from the packaged `nano` in points with paired
intervals ({} resamples), **bold** where they leave out zero; several seeds: their mean. Settings were chosen by
held-out training speakers; of these commands the last alone opens the test lists. It ran three times: attention joined
the systems before the second; the head, all weights, and seeds that were missing before the third. {}.

![Changes of the EER by speakers, teaching and part that is trained](real_domains.png)"""


def table(runs: Path, domain: str, names: Sequence[str], base: Rates, seeds: dict[Run, list[Rates]]) -> list[str]:
    """Markdown: a line for the base and for every way to adapt it."""
    columns = ["speakers", "taught by", "trained", "seeds", "parameters"]
    columns += [f"EER %, {names[0]}, {dim}" for dim in DIMS] + [f"change, {names[0]}, {dim}" for dim in DIMS]
    columns += [f"change, {name}, {DIMS[-1]}" for name in names[1:]]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    cells = ["", "", "base", "", "", *(percent(base[names[0], dim]) for dim in DIMS), *[""] * (len(columns) - 7)]
    lines.append("| " + " | ".join(cells) + " |")
    for run, found in seeds.items():
        rates = averaged(found)
        cells = [speakers_of(runs, run), run.signal, named(run), str(len(found))]
        cells += [f"{trained_parameters(runs, run):,}", *(percent(rates[names[0], dim]) for dim in DIMS)]
        cells += [change(rates[names[0], dim] - base[names[0], dim]) for dim in DIMS]
        cells += [change(rates[name, DIMS[-1]] - base[name, DIMS[-1]]) for name in names[1:]]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def speakers_of(runs: Path, run: Run) -> str:
    """Whom a run was trained on, in words."""
    domains = json.loads((runs / "domains.json").read_text())
    real = run.speakers or len(domains[run.domain]["train"])
    simulated = f"{len(domains['wideband']['train'])} simulated"
    return {"real": str(real), "simulated": simulated, "both": f"{real} and {simulated}"}[run.data]


def trained_parameters(runs: Path, run: Run) -> int:
    """How many numbers of the encoder a run trains."""
    folder = folder_of(runs, run)
    if (folder / "best" / "adapter_config.json").is_file():
        return adapter_info(folder / "best").parameters
    model = load_model(folder / "best")
    freeze(model, read_recipe(folder / "recipe.yaml"), 0, STEPS)
    return sum(p.numel() for p in getattr(model, model.base_model_prefix, model).parameters() if p.requires_grad)


def named(run: Run) -> str:
    """What a run trained, in words."""
    return f"{run.system} {run.variant}".strip()


def results(rates: Rates, base: Rates) -> list[dict]:
    """For JSON."""
    return [{"list": key[0], "dim": key[1], "eer": rates[key].record(), "change": (rates[key] - base[key]).record()}
            for key in rates]  # fmt: skip


def draw(records: Sequence[dict], file: Path) -> None:
    """Changes of the EER at the largest dimension, with their intervals: a panel for each domain, on its own list and,
    smaller, on clean speech; a line for every way to adapt.
    """
    rows_of = {
        domain: [found for found in records if found["domain"] == domain and found["seeds"]] for domain in TITLES
    }
    tall = [len(rows) + 3 for rows in rows_of.values()]
    figure = new_figure(13, 0.2 * (max(tall[:2]) + max(tall[2:])))
    panels = figure.subplots(2, 2, height_ratios=[max(tall[:2]), max(tall[2:])], sharex=True).flat
    colours = dict(zip(SIGNALS, ("tab:blue", "tab:orange"), strict=True))
    for ax, (domain, found) in zip(panels, rows_of.items(), strict=True):
        for place, row in enumerate(found):
            for shift, name, style in ((-0.15, domain, {"marker": "o"}), (0.2, CLEAN, {"marker": ".", "alpha": 0.4})):
                (of,) = (of["change"] for of in row["results"] if (of["list"], of["dim"]) == (name, DIMS[-1]))
                value, low, high = (100 * of[key] for key in ("value", "low", "high"))
                ends = [[max(value - low, 0)], [max(high - value, 0)]]
                ax.errorbar(value, place + shift, xerr=ends, color=colours[row["signal"]], **style)
        ax.axvline(0, color="grey", lw=1)
        ax.set_yticks(range(len(found)), [f"{row['system']}; {row['speakers']}" for row in found], fontsize=8)
        ax.set_ylim(len(found) - 0.2, -0.8)
        ax.set_title(f"{TITLES[domain]} (trained; speakers)", fontsize=10)
        ax.set_xlabel(f"change of the EER at {DIMS[-1]} numbers, points; left is better", fontsize=9)
        ax.tick_params(labelbottom=True)
        ax.grid(axis="x", alpha=0.3)
    entries = [legend_line(color=colour, marker="o", label=f"taught by {name}") for name, colour in colours.items()]
    entries.append(legend_line(color="grey", marker=".", alpha=0.4, label="the same on clean speech"))
    figure.legend(handles=entries, loc="outside lower center", ncols=3, fontsize=9)
    save_figure(figure, file)


if __name__ == "__main__":
    main()

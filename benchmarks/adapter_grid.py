"""Full fine-tuning, frozen trunk, head only and LoRA by placement x rank, per domain, at equal budgets.

    python benchmarks/adapter_grid.py train BASE --speech ROOT --runs runs/adapter_grid
    python benchmarks/adapter_grid.py report BASE --speech ROOT --runs runs/adapter_grid --out docs/results/adapter_grid

ROOT holds train, noise, test/wav, test/trials_*.txt and metadata.csv with the columns speaker and gender. Every run has
one thread and 100 steps of 32 crops of 2 s; `--parallel` of them go side by side. Finished runs are kept, so a stopped
`train` goes on; `report` uses those that are there. Learning rates were set once: 2e-3 for whatever is small, 5e-4 for
all weights; LoRA's scaling is 2 at every rank. Crops depend on domain, seed and step alone, so they are drawn once and
kept in RUNS (400 MB a domain and seed): the runs' seconds are those of training without the making of crops.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
import yaml
from compare_adapters import machine, trial_lists
from matplotlib.figure import Figure
from paired import Drawn, change, eers, mean, percent

import train_hf
from mrl_redimnet.adapters.bank import AdapterBank
from mrl_redimnet.adapters.hub import adapter_info
from mrl_redimnet.audio.domains import make_domain
from mrl_redimnet.data.corpus import load_corpus, split_usable
from mrl_redimnet.data.loaders import DrawnCrops
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.evaluation.results import embed_trials
from mrl_redimnet.saving import load_model
from mrl_redimnet.training import setup
from mrl_redimnet.training.optimizer import freeze
from mrl_redimnet.training.reading import flat, in_groups, read_recipe

ROOT = Path(__file__).parents[1]
PLACEMENTS = ("attention", "attention+ffn", "pointwise", "projection", "linear")
RANKS = (4, 8, 16, 32, 64)
STEPS = {"telephony": 100, "noisy": 100, "gender": 60}
# Six Matryoshka segments; all of these have the parameters of rank 8 everywhere to a few per cent.
SEGMENTS = {"more rank in short segments": [16, 12, 8, 4, 4, 4], "more rank in long segments": [4, 4, 4, 8, 12, 16]}


@dataclass(frozen=True)
class Run:
    """One training: a domain, a name, what it replaces in the domain's recipe."""

    domain: str
    name: str
    settings: dict = field(default_factory=dict, hash=False)
    seed: int = 0

    def folder(self, runs: Path) -> Path:
        """Where the run lies."""
        return runs / self.domain / f"{self.name.replace(' ', '_')}-{self.seed}"


def adapter(placement: str, rank: int, **settings) -> dict:
    """Settings of a LoRA adapter."""
    return {"placement": placement, "rank": rank, **settings}


PARTS: dict[str, dict] = {
    "projection, whole": {"finetune": "projection"},
    "head, trunk frozen": {"finetune": "head"},
    "all weights": {"finetune": "all", "learning_rate": 5e-4},
}
GRID = {f"LoRA {place}, r={rank}": adapter(place, rank) for rank in (8, 64, 4, 16, 32) for place in PLACEMENTS}
STRATEGIES = {
    "dynamic": adapter("linear", 8, strategy="dynamic", start_rank=12),
    "warm_up": adapter("linear", 8, strategy="warm_up", start_rank=16),
    "mixed": adapter("linear", 8, strategy="mixed"),
}
DIMS = (16, 64, 128, 192, 256)
QUESTIONS = {
    "A rank for each Matryoshka segment": ("LoRA projection, r=8", *SEGMENTS),
    "Four ways to ranks": ("LoRA linear, r=8", *STRATEGIES),
}
SEGMENTED = {name: adapter("projection", 8, segment_ranks=ranks) for name, ranks in SEGMENTS.items()}
SEVERAL_SEEDS = ("LoRA linear, r=8", "LoRA linear, r=64", "projection, whole", "all weights")


def plan() -> list[Run]:
    """All runs, what matters most first."""
    systems, both = {**PARTS, **GRID}, ("telephony", "noisy")
    variants = {**STRATEGIES, **SEGMENTED, "LoRA projection, r=8": GRID["LoRA projection, r=8"]}
    smallest = {name: s for name, s in systems.items() if s.get("rank", 8) == 8}
    first = {name: s for name, s in systems.items() if s.get("rank", 8) in (8, 64)}
    runs = [Run(domain, name, s) for name, s in first.items() for domain in both]
    runs += [Run("telephony", name, s) for name, s in variants.items()]
    runs += [Run("gender", name, s) for name, s in smallest.items()]
    runs += [Run("telephony", name, s) for name, s in GRID.items()]
    for seed in (1, 2):
        runs += [Run("telephony", name, s, seed) for name, s in variants.items()]
        runs += [Run(domain, name, systems[name], seed) for name in SEVERAL_SEEDS for domain in both]
        runs += [Run(("noisy", "gender")[seed - 1], name, s) for name, s in GRID.items()]
    return list(dict.fromkeys(runs))  # some are named twice


def main():
    """Trains and embeds what is missing, or reports what is there."""
    arguments = parse()
    if arguments.command == "train":
        train(arguments)
    elif arguments.command == "one":
        setup.DrawnCrops = partial(KeptCrops, folder=arguments.runs)
        train_hf.main([arguments.base, "--resume"])
    else:
        report(arguments)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "report", "one"), help="one: a recipe, by `train` itself")
    parser.add_argument("base", help="path of the base model")
    parser.add_argument("--speech", type=Path)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, help="without suffix")
    parser.add_argument("--parallel", type=int, default=2)
    parser.add_argument("--resamples", type=int, default=1000)
    return parser.parse_args()


# ---------------------------------------------------------------- training


def train(arguments: argparse.Namespace):
    """All runs in the order of `plan`, each followed by its embeddings of the test speech."""
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(arguments.parallel, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        base = pool.submit(embed_base, arguments)
        for future in [base, *(pool.submit(train_and_embed, arguments, run) for run in plan())]:
            future.result()


def embed_base(arguments: argparse.Namespace):
    """The embeddings of the base itself, in every condition."""
    folder = arguments.runs / "base"
    for domain in STEPS:
        if not (folder / f"{domain}.npz").is_file():
            embed(load_model(arguments.base), arguments.speech, domain, folder / f"{domain}.npz")


def train_and_embed(arguments: argparse.Namespace, run: Run):
    """One training in a process of its own, unless it has been done, and its embeddings."""
    folder = run.folder(arguments.runs)
    if not (folder / "cost.json").is_file():
        cost = train_once(arguments, run, folder)
        (folder / "cost.json").write_text(json.dumps(cost) + "\n")
    if not (folder / "embeddings.npz").is_file():
        best = folder / "best"
        if (best / "adapter_config.json").is_file():
            model = AdapterBank.load(load_model(arguments.base), {"adapter": best}).merged("adapter")
        else:
            model = load_model(best)
        embed(model, arguments.speech, run.domain, folder / "embeddings.npz")
        print(folder, (folder / "cost.json").read_text().strip(), flush=True)


def train_once(arguments: argparse.Namespace, run: Run, folder: Path) -> dict:
    """Trains; seconds of one core and peak memory in bytes of the process."""
    steps = STEPS[run.domain]
    recipe = {"model": arguments.base, "train": str(arguments.speech / "train"), "output": str(folder)}
    recipe |= {"steps": steps, "evaluate_every": steps, "checkpoint_every": steps, "bootstrap_samples": 0, "tests": {}}
    recipe |= {"learning_rate": 2e-3, "workers": 0, "tracker": "none", "mixed_precision": "bf16", "seed": run.seed}
    if run.domain == "gender":
        recipe |= {"label_file": str(arguments.speech / "metadata.csv")}
        recipe |= {"tests": {"gender": {"folder": str(arguments.speech / "test" / "wav")}}}
    else:  # the classifier of the base, trained at three speeds, goes on
        recipe |= {"speed_perturb": [1.0, 0.9, 1.1]}
    if run.domain == "noisy":
        recipe |= {"noise": str(arguments.speech / "noise" / "train")}
    folder.mkdir(parents=True, exist_ok=True)
    recipe = read_recipe(ROOT / "adapters" / f"{run.domain}.yaml", recipe | run.settings)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(in_groups(flat(recipe))))
    crops = arguments.runs / "crops" / f"{run.domain}-{run.seed}"
    command = [sys.executable, __file__, "one", str(folder / "recipe.yaml"), "--runs", str(crops)]
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{folder}: the training stopped, see log.txt there.")
    return {"cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_bytes": 1024 * usage.ru_maxrss}


class KeptCrops(DrawnCrops):
    """Batches that are made once and then read from `folder`, for runs that draw the same ones."""

    def __init__(self, *arguments, folder: Path):
        super().__init__(*arguments)
        self.folder = folder

    def batches(self, first_step: int, stop_step: int) -> Iterator[dict]:
        """As those of the recipe, a file each."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for step in range(first_step, stop_step):
            file = self.folder / f"{step}.pt"
            if not file.is_file():
                own = file.with_name(f"{step}.{os.getpid()}.tmp")  # two runs may make the same at once
                torch.save(next(super().batches(step, step + 1)), own)
                os.replace(own, file)
            yield torch.load(file, weights_only=False)


def embed(model, speech: Path, domain: str, file: Path):
    """Writes embeddings of the test speech, clean and in the domain, to `file`; for gender, of training speech too."""
    trials = trial_lists(speech)["both lists"]
    embeddings = {"clean": embed_trials(model, trials, speech / "test" / "wav")}
    if domain == "gender":
        embeddings["training"] = SpeakerEncoder(model).embed(list(training_files(speech)), longest=4.0)
    else:
        noise = str(speech / "noise" / "test")
        embeddings[domain] = embed_trials(
            model, trials, speech / "test" / "wav", domain=make_domain(domain, noise=noise)
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, **embeddings)


def training_files(speech: Path) -> Iterator[Path]:
    """The first utterance of every training speaker, for a probe of what embeddings tell."""
    corpus, _ = split_usable(load_corpus(speech / "train"), 0.3)
    first = {speaker: row for row, speaker in reversed(list(enumerate(corpus["speaker"])))}
    for speaker in sorted(first):
        yield Path(corpus[first[speaker]]["audio"]["path"])


# ---------------------------------------------------------------- report


@dataclass
class System:
    """A way to adapt in one domain, over its seeds: what it cost, and {condition: {dim: error rate}}."""

    run: Run
    seeds: list[int]
    costs: dict[str, float]
    rates: dict[str, dict[int, Drawn]]


def report(arguments: argparse.Namespace):
    """Scores the embeddings of all finished runs; writes OUT.json and OUT.md."""
    torch.set_num_threads(os.cpu_count())
    domains = {domain: systems_of(arguments, domain) for domain in STEPS}
    seconds = [json.loads(file.read_text())["cpu_seconds"] for file in arguments.runs.glob("*/*/cost.json")]
    head = (
        f"{len(seconds)} trainings of one thread, {sum(seconds) / 60:.0f} minutes of a core altogether. Brackets: 95 % "
        f"intervals, one bootstrap over speakers ({arguments.resamples} resamples), paired in differences, which are "
        f"**bold** where they leave out zero. Several seeds: their mean. Seconds are of a core, starting and judging "
        f"included, shared by the steps; they leave out the making of crops, but for the first run of a domain. "
        f"{machine()}."
    )
    text = ["# Adapters and fine-tuning at equal budgets", "", head]
    for domain, systems in domains.items():
        text += domain_table(domain, systems)
    text += pairs_table(domains) + ranks_table(domains)
    for title, names in QUESTIONS.items():
        text += question_table(title, names, domains["telephony"])
    record = {"machine": machine(), "resamples": arguments.resamples, "domains": {}}
    for domain, systems in domains.items():
        record["domains"][domain] = [as_record(name, system, systems["base"]) for name, system in systems.items()]
    arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text("\n".join(text) + "\n")
    draw(domains, arguments.out.with_suffix(".png"))
    print("\n".join(text))


def systems_of(arguments: argparse.Namespace, domain: str) -> dict[str, System]:
    """The base and every system of a domain that has finished runs."""
    judge = Judge(arguments.speech, domain, arguments.resamples)
    systems = {"base": System(Run(domain, "base"), [], {}, judge(arguments.runs / "base" / f"{domain}.npz"))}
    order = [*PARTS, *(f"LoRA {place}, r={rank}" for place in PLACEMENTS for rank in RANKS), *STRATEGIES, *SEGMENTS]
    for run in sorted(plan(), key=lambda run: order.index(run.name)):
        file = run.folder(arguments.runs) / "embeddings.npz"
        if run.domain == domain and file.is_file():
            systems.setdefault(run.name, System(run, [], costs(arguments.base, run, file.parent), {})).seeds.append(
                run.seed
            )
    for name, system in list(systems.items())[1:]:
        runs = [Run(domain, name, {}, seed).folder(arguments.runs) / "embeddings.npz" for seed in system.seeds]
        by_seed = [judge(file) for file in runs]
        system.rates = {c: {dim: mean(r[c][dim] for r in by_seed) for dim in DIMS} for c in by_seed[0]}
    return systems


class Judge:
    """From a file of embeddings to error rates: EER, of gender the errors of a linear probe."""

    def __init__(self, speech: Path, domain: str, resamples: int):
        self.trials, self.domain, self.resamples = trial_lists(speech)["both lists"], domain, resamples
        with open(speech / "metadata.csv", newline="") as lines:
            self.gender = {row["speaker"]: row["gender"] == "f" for row in csv.DictReader(lines)}
        files = training_files(speech) if domain == "gender" else ()
        self.training = np.array([self.gender[file.parts[-3]] for file in files])

    def __call__(self, file: Path) -> dict[str, dict[int, Drawn]]:
        """{condition: {dim: rate}}."""
        with np.load(file) as embeddings:
            if self.domain == "gender":
                return {"gender": {dim: self.probe(embeddings["training"], embeddings["clean"], dim) for dim in DIMS}}
            utterances = self.trials.utterances
            return {
                condition: eers(self.trials, utterances, embeddings[condition], DIMS, self.resamples)
                for condition in ("clean", self.domain)
            }

    def probe(self, training: np.ndarray, test: np.ndarray, dim: int) -> Drawn:
        """Share of test utterances that a linear probe, fitted on the prefixes of training speech, gets wrong."""
        speakers = [path.split("/")[0] for path in self.trials.utterances]
        parts = [part[:, :dim] / np.linalg.norm(part[:, :dim], axis=1, keepdims=True) for part in (training, test)]
        inputs, of_test = (np.column_stack([part, np.ones(len(part))]) for part in parts)
        wrong = (of_test @ ridge_regression(inputs, 2.0 * self.training - 1) > 0) != np.array(
            [self.gender[speaker] for speaker in speakers]
        )
        _, owner = np.unique(speakers, return_inverse=True)
        sums, counts = np.bincount(owner, wrong), np.bincount(owner)
        drawn = np.random.default_rng(0).integers(len(sums), size=(self.resamples, len(sums)))
        return Drawn(float(wrong.mean()), sums[drawn].sum(1) / counts[drawn].sum(1))


def ridge_regression(inputs: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Weights [D] from inputs [N, D] to targets [N], with the ridge that predicts left-out rows best."""
    left, values, right = np.linalg.svd(inputs, full_matrices=False)
    best, weights = np.inf, None
    for ridge in np.logspace(-4, 3, 22):
        shrunk = values**2 / (values**2 + ridge)
        errors = (targets - left @ (shrunk * (left.T @ targets))) / (1 - (left**2 @ shrunk))
        if (error := np.mean(errors**2)) < best:
            best, weights = error, right.T @ (shrunk / values * (left.T @ targets))
    return weights


def costs(base: str, run: Run, folder: Path) -> dict[str, float]:
    """Trained parameters, bytes of what is saved, seconds of a core per step, peak memory of the process."""
    cost = json.loads((folder / "cost.json").read_text())
    found = {"seconds": cost["cpu_seconds"] / STEPS[run.domain], "peak": cost["peak_bytes"]}
    if run.domain == "gender":  # of its own classifier, on the whole embedding
        ((rows,),) = json.loads((folder / "results.json").read_text())["results"]["gender"].values()
        found["own_errors"] = 1 - rows["value"]
    if (folder / "best" / "adapter_config.json").is_file():
        info = adapter_info(folder / "best")
        return {"parameters": info.parameters, "bytes": info.size, **found}
    model = load_model(base)
    freeze(model, read_recipe(folder / "recipe.yaml"), 0, STEPS[run.domain])
    encoder = getattr(model, model.base_model_prefix)
    trained = [p for p in encoder.parameters() if p.requires_grad]
    return {"parameters": sum(p.numel() for p in trained), "bytes": sum(4 * p.numel() for p in trained), **found}


def domain_table(domain: str, systems: dict[str, System]) -> list[str]:
    """A line per system: costs, the rates in the domain, what it does to clean speech."""
    gender, shown = domain == "gender", [dim for dim in DIMS if dim >= 64]
    columns = ["", "seeds", "parameters", "MB", "s a step", "peak GB"]
    columns += [f"{'probe errors' if gender else 'EER'} %, {dim}" for dim in shown]
    columns += [
        *(f"change at {dim}" for dim in (64, 256)),
        "own classifier %" if gender else "change on clean speech, 256",
    ]
    lines = ["", f"## {domain}: {STEPS[domain]} steps", "", table_line(columns), "|---" * len(columns) + "|"]
    base = systems["base"].rates
    for name, system in systems.items():
        cost, rates = system.costs, system.rates[domain]
        eers = [percent(rates[dim]) if dim in (64, 256) else f"{100 * rates[dim].value:.2f}" for dim in shown]
        if not cost:
            lines.append(table_line([name, *[""] * 5, *eers, *[""] * 3]))
            continue
        cells = [name, str(len(system.seeds)), f"{cost['parameters']:,}", f"{cost['bytes'] / 1e6:.2f}"]
        cells += [f"{cost['seconds']:.2f}", f"{cost['peak'] / 1e9:.2f}", *eers]
        cells += [change(rates[dim] - base[domain][dim]) for dim in (64, 256)]
        cells.append(
            f"{100 * cost['own_errors']:.2f}" if gender else change(system.rates["clean"][256] - base["clean"][256])
        )
        lines.append(table_line(cells))
    return lines


def draw(domains: dict[str, dict[str, System]], file: Path):
    """EER over trained parameters, a line per placement over its ranks, at 64 and at 256 dimensions."""
    figure = Figure(figsize=(10, 7), layout="constrained")
    for row, domain in zip(figure.subplots(2, 2, sharex=True, sharey="row"), ("telephony", "noisy"), strict=True):
        systems = domains[domain]
        for panel, dim in zip(row, (64, 256), strict=True):
            panel.axhline(100 * systems["base"].rates[domain][dim].value, color="0.5", linewidth=1, label="base")
            for place in PLACEMENTS:
                found = [systems[f"LoRA {place}, r={r}"] for r in RANKS if f"LoRA {place}, r={r}" in systems]
                points = [(s.costs["parameters"], 100 * s.rates[domain][dim].value) for s in found]
                panel.plot(*zip(*points, strict=True), marker="o", markersize=4, label=f"LoRA {place}, rank 4 to 64")
            for marker, part in zip("s^D", PARTS, strict=True):
                system = systems[part]
                rate = 100 * system.rates[domain][dim].value
                panel.plot(system.costs["parameters"], rate, marker, color="k", label=part)
            panel.set(title=f"{domain}, {dim} dimensions", xscale="log")
            panel.grid(alpha=0.3)
        row[0].set_ylabel("EER %")
    for panel in figure.axes[2:]:
        panel.set_xlabel("trained parameters")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(file, dpi=110)


def ranks_table(domains: dict[str, dict[str, System]]) -> list[str]:
    """Whether low ranks cost short prefixes more: the mean over placements and both domains, by rank."""
    systems = [(d, s) for d in ("telephony", "noisy") for s in [domains[d]]]
    complete = {
        (d, place) for d, s in systems for place in PLACEMENTS if all(f"LoRA {place}, r={r}" in s for r in RANKS)
    }
    if not complete:
        return []
    grid = {
        (rank, dim): mean(
            domains[d][f"LoRA {place}, r={rank}"].rates[d][dim] - domains[d]["base"].rates[d][dim]
            for d, place in sorted(complete)
        )
        for rank in RANKS
        for dim in DIMS
    }
    columns = ["rank", *(f"change at {dim}" for dim in DIMS), *(f"{dim} against 256" for dim in (16, 64))]
    lines = ["", "## Does a low rank hurt short prefixes more?", ""]
    lines += [
        f"EER points against the base, mean over {len(complete)} combinations of domain and placement. The last two "
        "columns: how much more than at 256 dimensions the step from rank 64 down to this rank costs.",
        "",
        table_line(columns),
        "|---" * len(columns) + "|",
    ]
    for rank in RANKS:
        more = [(grid[rank, d] - grid[64, d]) - (grid[rank, 256] - grid[64, 256]) for d in (16, 64)]
        lines.append(table_line([str(rank), *(change(grid[rank, d]) for d in DIMS), *map(change, more)]))
    return lines


def pairs_table(domains: dict[str, dict[str, System]]) -> list[str]:
    """Pairs of systems against each other, where there are several seeds over these."""
    pairs = [("LoRA linear, r=64", "LoRA linear, r=8"), ("projection, whole", "LoRA linear, r=8")]
    pairs += [("all weights", "LoRA linear, r=8"), ("all weights", "projection, whole")]
    small = "LoRA projection, r=4"
    pairs += [
        (small, other) for other in ("LoRA attention, r=8", "LoRA attention, r=64", "LoRA linear, r=8", "all weights")
    ]
    lines = [
        "",
        "## Against each other",
        "",
        "| | domain | seeds | at 64 | at 256 | clean speech, 256 |",
        "|---" * 6 + "|",
    ]
    for domain in ("telephony", "noisy"):
        for ours, other in pairs:
            a, b = domains[domain].get(ours), domains[domain].get(other)
            if a and b:
                cells = [change(a.rates[domain][dim] - b.rates[domain][dim]) for dim in (64, 256)]
                cells.append(change(a.rates["clean"][256] - b.rates["clean"][256]))
                lines.append(table_line([f"{ours} - {other}", domain, f"{len(a.seeds)}, {len(b.seeds)}", *cells]))
    return lines


def question_table(title: str, names: tuple[str, ...], systems: dict[str, System]) -> list[str]:
    """Variants of one adapter, the first of them the reference."""
    columns = ["", "seeds", "parameters", *(f"{dim}" for dim in DIMS), "clean speech, 256"]
    lines = ["", f"## {title}", "", "Telephony, EER %, and points against the first line.", ""]
    lines += [table_line(columns), "|---" * len(columns) + "|"]
    for name in names:
        if name not in systems:
            continue
        system, first = systems[name], systems[names[0]]
        cells = [system.rates["telephony"][dim] for dim in DIMS] + [system.rates["clean"][256]]
        if name != names[0]:
            theirs = [first.rates["telephony"][dim] for dim in DIMS] + [first.rates["clean"][256]]
            cells = [f"{100 * a.value:.2f}<br>{change(a - b)}" for a, b in zip(cells, theirs, strict=True)]
        else:
            cells = [percent(cell) for cell in cells]
        lines.append(table_line([name, str(len(system.seeds)), f"{system.costs['parameters']:,}", *cells]))
    return lines


def table_line(cells: list[str]) -> str:
    """A line of a Markdown table."""
    return "| " + " | ".join(cells) + " |"


def as_record(name: str, system: System, base: System) -> dict:
    """A system for JSON."""
    rates = {
        condition: {
            dim: {**rate.record(), "change": (rate - base.rates[condition][dim]).record()}
            for dim, rate in by_dim.items()
        }
        for condition, by_dim in system.rates.items()
    }
    return {"system": name, "seeds": system.seeds, **system.costs, "rates": rates}


if __name__ == "__main__":
    main()

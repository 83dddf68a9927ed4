"""Several adapters in one: each alone and mixed, on every condition, over the seeds of `adapter_grid.py`.

    python benchmarks/adapter_mixes.py BASE --speech ROOT --runs runs/adapter_grid --out docs/results/adapter_mixes

RUNS holds finished runs of `adapter_grid.py train`: the LoRA adapters `linear`, r=8, of telephony, noisy and gender.
Each mixture is made once per seed. "The right one" is what a perfect choice by the audio would give: every condition
through its own adapter, clean speech through none.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from adapter_grid import SEVERAL_SEEDS, STEPS, Run, table_line
from compare_adapters import machine, trial_lists
from paired import Drawn, change, eers, mean, percent

from mrl_redimnet.adapters.bank import AdapterBank
from mrl_redimnet.audio.domains import make_domain
from mrl_redimnet.evaluation.results import embed_trials
from mrl_redimnet.saving import load_model

NAME = SEVERAL_SEEDS[0]
CONDITIONS = ("telephony", "noisy", "clean")
DIMS = (64, 256)
# Names of mixtures: weights of the adapters, and what `AdapterBank.combine` takes.
BOTH, HALVES = {"telephony": 1.0, "noisy": 1.0}, {"telephony": 0.5, "noisy": 0.5}
MIXES = {
    "telephony alone": ({"telephony": 1.0}, {}),
    "noisy alone": ({"noisy": 1.0}, {}),
    "gender alone": ({"gender": 1.0}, {}),
    "halves, exact (cat)": (HALVES, {"method": "cat"}),
    "halves, svd to r=8": (HALVES, {"method": "svd"}),
    "halves, linear in the factors": (HALVES, {"method": "linear"}),
    "both whole, exact (cat)": (BOTH, {"method": "cat"}),
    "both whole, svd to r=8": (BOTH, {"method": "svd"}),
    "both whole, ties_svd, density 0.2": (BOTH, {"method": "ties_svd", "density": 0.2}),
    "both whole, ties_svd, density 0.5": (BOTH, {"method": "ties_svd", "density": 0.5}),
    "both whole, dare_linear_svd, density 0.5": (BOTH, {"method": "dare_linear_svd", "density": 0.5}),
    "thirds with gender, exact (cat)": (dict.fromkeys(("telephony", "noisy", "gender"), 1 / 3), {"method": "cat"}),
}


def main():
    """Mixes, embeds, scores; writes OUT.json and OUT.md."""
    arguments = parse()
    torch.set_num_threads(arguments.threads)
    base = load_model(arguments.base)
    judge = Judge(arguments.speech, arguments.resamples)
    results = {"base": [judge(base)]}
    for seed in arguments.seeds:
        folders = {domain: Run(domain, NAME, {}, seed).folder(arguments.runs) / "best" for domain in STEPS}
        bank = AdapterBank.load(load_model(arguments.base), {d: f for d, f in folders.items() if f.is_dir()})
        for name, (weights, options) in MIXES.items():
            if set(weights) <= set(bank.names):
                results.setdefault(name, []).append(judge(mixed(bank, weights, options, seed)))
        print(f"seed {seed}: done", flush=True)
    rates = {name: {key: mean(r[key] for r in by_seed) for key in by_seed[0]} for name, by_seed in results.items()}
    own = {"telephony": "telephony alone", "noisy": "noisy alone", "clean": "base"}
    rates["the right one"] = {(c, dim): rates[own[c]][c, dim] for c in CONDITIONS for dim in DIMS}
    seeds = {name: len(results.get(name, arguments.seeds)) for name in rates}
    write(arguments, rates, seeds)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="path of the base model")
    parser.add_argument("--speech", type=Path, required=True)
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--resamples", type=int, default=1000)
    return parser.parse_args()


def mixed(bank: AdapterBank, weights: dict[str, float], options: dict, seed: int):
    """A plain model with a mixture folded in."""
    if len(weights) == 1:
        return bank.merged(next(iter(weights)))
    torch.manual_seed(seed)  # of the methods that drop numbers at random
    bank.combine("mixture", weights, **options)
    model = bank.merged("mixture")
    bank.delete("mixture")
    return model


class Judge:
    """EERs of a model in every condition, {(condition, dim): Drawn}."""

    def __init__(self, speech: Path, resamples: int):
        self.trials, self.folder, self.resamples = trial_lists(speech)["both lists"], speech / "test" / "wav", resamples
        noise = str(speech / "noise" / "test")
        self.domains = {c: None if c == "clean" else make_domain(c, noise=noise) for c in CONDITIONS}

    def __call__(self, model) -> dict[tuple[str, int], Drawn]:
        """Embeds the test speech in each condition, and scores."""
        found = {}
        for condition, domain in self.domains.items():
            embeddings = embed_trials(model, self.trials, self.folder, domain=domain)
            for dim, drawn in eers(self.trials, self.trials.utterances, embeddings, DIMS, self.resamples).items():
                found[condition, dim] = drawn
        return found


def write(arguments: argparse.Namespace, rates: dict[str, dict], seeds: dict[str, int]):
    """OUT.json and OUT.md."""
    base = rates["base"]
    columns = ["", "seeds", *(f"{condition}, {dim}" for condition in CONDITIONS for dim in DIMS)]
    text = [
        "# Several adapters in one",
        "",
        f"EER % at 64 and 256 dimensions, both lists, mean over seeds; below it the change against the base with its "
        f"paired 95 % interval over speakers ({arguments.resamples} resamples), **bold** where it leaves out zero. "
        f"Adapters: {NAME}, by benchmarks/adapter_grid.py. {machine()}.",
        "",
        table_line(columns),
        "|---" * len(columns) + "|",
    ]
    for name, by_key in rates.items():
        keys = [(condition, dim) for condition in CONDITIONS for dim in DIMS]
        cells = [percent(by_key[k]) if name == "base" else f"{100 * by_key[k].value:.2f}" for k in keys]
        if name != "base":
            cells = [f"{cell}<br>{change(by_key[k] - base[k])}" for cell, k in zip(cells, keys, strict=True)]
        text.append(table_line([name, str(seeds[name]), *cells]))
    record = {
        name: {f"{c}, {d}": {**drawn.record(), "change": (drawn - base[c, d]).record()} for (c, d), drawn in r.items()}
        for name, r in rates.items()
    }
    record = {"machine": machine(), "resamples": arguments.resamples, "seeds": seeds, "systems": record}
    arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text("\n".join(text) + "\n")
    print("\n".join(text))


if __name__ == "__main__":
    main()

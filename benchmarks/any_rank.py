"""One adapter at several ranks: MatryoshkaLoRA, plain adapters cut by SVD, and adapters trained at each rank.

    python benchmarks/any_rank.py train RUNS
    python benchmarks/any_rank.py report RUNS --speech SPEECH SPEECH_MORE --out docs/results/any_rank
    python benchmarks/any_rank.py draw --out docs/results/any_rank

RUNS is what `real_speech.py` made; runs and the memory of crops are those of `real_domains.py`. The adapters are for
children's speech and learn from the teacher. `report` judges them on held-out training speakers (`children, held out`)
and on test lists; with `--lists 'children, held out'` on the former alone, which is how settings were chosen. `draw`
makes the picture again from what a report has written, without opening a list.
"""

import argparse
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from compare_adapters import machine
from paired import averaged, change, percent
from real_domains import BASE, Lists, Rates, Run, folder_of, lora, remember, test_lists, train_all

from mrl_redimnet.adapters.bank import AdapterBank
from mrl_redimnet.adapters.hub import adapter_info
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.plotting import legend_line, new_panels, save_figure, shades
from mrl_redimnet.saving import load_model
from mrl_redimnet.scoring.trials import read_trials

RANKS = (1, 2, 4, 8, 16, 32)
DIMS = (16, 64, 128, 256)
SEEDS = (0, 1, 2)
HELD_OUT = "children, held out"
LISTS = ("children", HELD_OUT, "librispeech")
PLACEMENTS = ("projection",)
SHOWN = (64, 256)  # dimensions in the picture
NONE = "none"  # no adapter
WAYS = ("trained at this rank", "matryoshka, first components", "matryoshka, cut by SVD", "plain, cut by SVD")


def nested(placement: str, seed: int) -> Run:
    """The run of an adapter for all ranks."""
    more = lora(placement, RANKS[-1], strategy="matryoshka", learning_rate=rate(RANKS[-1]))
    system = f"LoRA {placement}, r={RANKS[-1]}"
    return Run("children", system=system, seed=seed, more=more, variant="matryoshka")


def plain(placement: str, rank: int, seed: int) -> Run:
    """The run of a plain adapter."""
    more = {"learning_rate": rate(rank)}
    return Run("children", system=f"LoRA {placement}, r={rank}", seed=seed, more=more, variant="rate by rank")


def rate(rank: int) -> float:
    """A learning rate. Under AdamW, and with PEFT's scaling of 2 at every rank, all components change by as much in a
    step; with one rate for all ranks a low one would change the layer less, and be undertrained.
    """
    return 1e-2 / math.sqrt(rank)


def plan() -> list[Run]:
    """All runs, seed by seed."""
    return [
        run
        for placement in PLACEMENTS
        for seed in SEEDS
        for run in (nested(placement, seed), *(plain(placement, rank, seed) for rank in reversed(RANKS)))
    ]


def main():
    """Trains what is missing, reports, or draws a report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("train", "report", "draw"))
    parser.add_argument("runs", type=Path, nargs="?", metavar="RUNS")
    parser.add_argument("--speech", type=Path, nargs="+", default=[], help="folders with test and its trial lists")
    parser.add_argument("--lists", nargs="+", default=LISTS, help=f"[{' '.join(LISTS)}]")
    parser.add_argument("--out", type=Path, help="without suffix")
    parser.add_argument("--resamples", type=int, default=1000)
    arguments = parser.parse_args()
    if arguments.command == "draw":
        draw(json.loads(arguments.out.with_suffix(".json").read_text()), arguments.out.with_suffix(".png"))
        return
    if arguments.runs is None:
        parser.error(f"{arguments.command} needs RUNS")
    remember(arguments.runs)
    if arguments.command == "train":
        train_all(arguments.runs, plan())
    else:
        report(arguments)


def encoders(runs: Path, placement: str, seed: int) -> Iterator[tuple[str, int, SpeakerEncoder, int]]:
    """(way, rank, encoder, bytes of the adapter's file) for every way to a rank."""
    whole = folder_of(runs, nested(placement, seed)) / "best"
    most = folder_of(runs, plain(placement, RANKS[-1], seed)) / "best"
    by_svd = runs / "by_svd" / f"{placement}-{seed}"
    forget_nested(whole, by_svd)
    for rank in RANKS:
        own = folder_of(runs, plain(placement, rank, seed)) / "best"
        for way, folder, cut in zip(WAYS, (own, whole, by_svd, most), (None, rank, rank, rank), strict=True):
            bank = AdapterBank.load(BASE)
            bank.add("adapter", folder, rank=cut)
            bank.save("adapter", runs / "cut")
            yield way, rank, SpeakerEncoder(bank.merged("adapter")), adapter_info(runs / "cut").size


def forget_nested(source: Path, target: Path) -> None:
    """A copy of an adapter that does not say that it can be cut to its first components."""
    bank = AdapterBank.load(BASE, {"adapter": source})
    bank.save("adapter", target)
    replace(bank.facts("adapter"), nested_ranks=[]).save(target)


def report(arguments: argparse.Namespace):
    """Judges all ways; writes OUT.json, OUT.md and OUT.png."""
    lists = with_held_out(test_lists(arguments.runs, arguments.speech, arguments.resamples))
    base = lists.rates(SpeakerEncoder(load_model(BASE)), arguments.lists, DIMS)
    text, records = [HEAD.format(arguments.resamples, len(SEEDS), machine()), ""], []
    for placement in PLACEMENTS:
        found: dict[tuple[str, int], list[Rates]] = {}
        sizes: dict[int, int] = {}
        for seed in SEEDS:
            for way, rank, encoder, size in encoders(arguments.runs, placement, seed):
                found.setdefault((way, rank), []).append(lists.rates(encoder, arguments.lists, DIMS))
                sizes[rank] = size
        rates = {key: averaged(values) for key, values in found.items()} | {(NONE, 0): base}
        for name in arguments.lists:
            text += [f"## LoRA {placement}: {name}", "", *table(name, base, rates, sizes), ""]
        records += [
            {"placement": placement, "way": way, "rank": rank, "list": name, "dim": dim, "eer": drawn.record()}
            for (way, rank), values in rates.items()
            for (name, dim), drawn in values.items()
        ]
    arguments.out.with_suffix(".json").write_text(json.dumps(records, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text("\n".join(text).rstrip() + "\n")
    draw(records, arguments.out.with_suffix(".png"))
    print("\n".join(text))


HEAD = """# Any rank from one file

```bash
python benchmarks/any_rank.py train RUNS
python benchmarks/any_rank.py report RUNS --speech SPEECH SPEECH_MORE --out docs/results/any_rank
```

![EER over the rank](any_rank.png)

EER % of adapters for `nano` that learnt from CAM++ on 60 children's speech, with the change from an adapter trained at
the same rank in points and its paired 95 % interval over speakers ({} resamples), **bold** where that leaves out zero.
Means of {} seeds. {}."""


def with_held_out(lists: Lists) -> Lists:
    """The lists, and the trials of held-out training speakers."""
    trials = {**lists.trials, HELD_OUT: read_trials(lists.runs / "dev_children.txt")}
    return replace(lists, trials=trials, folders={**lists.folders, HELD_OUT: lists.runs / "speech"})


def table(name: str, base: Rates, rates: dict[tuple[str, int], Rates], sizes: dict[int, int]) -> list[str]:
    """Markdown: a line for every rank and way."""
    columns = ["rank", "bytes", "adapter", *(f"{dim} dimensions" for dim in DIMS)]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines.append("| 0 | 0 | none | " + " | ".join(percent(base[name, dim]) for dim in DIMS) + " |")
    for rank in RANKS:
        trained = rates[WAYS[0], rank]
        for way in WAYS:
            own, size = rates[way, rank], f"{sizes[rank]:,}"
            cells = [percent(own[name, dim]) for dim in DIMS]
            if way != WAYS[0]:
                cells = [
                    f"{100 * own[name, dim].value:.2f}, {change(own[name, dim] - trained[name, dim])}" for dim in DIMS
                ]
            lines.append(f"| {rank} | {size} | {way} | " + " | ".join(cells) + " |")
    return lines


def draw(records: Sequence[dict], file: Path) -> None:
    """EER over the rank: a row of panels for each list, a line for every way and, dashed, the model without adapter.

    As many points go into the height of every panel, so that noise does not look like a difference.
    """
    lists = list(dict.fromkeys(record["list"] for record in records))
    figure, panels = new_panels(len(lists) * len(SHOWN), len(SHOWN), 4.6, 2.7, below=0.5)
    colours = dict(zip(WAYS, shades(len(WAYS)), strict=True))
    shown = {key: [record for record in records if (record["list"], record["dim"]) == key]
             for key in itertools.product(lists, SHOWN)}  # fmt: skip
    ends = {key: (min(rates), max(rates)) for key, here in shown.items()
            for rates in [[100 * record["eer"]["value"] for record in here]]}  # fmt: skip
    height = 1.2 * max(high - low for low, high in ends.values())
    for ax, (key, here) in zip(panels, shown.items(), strict=True):
        for way in WAYS:
            points = sorted((record["rank"], 100 * record["eer"]["value"]) for record in here if record["way"] == way)
            ax.plot(*zip(*points, strict=True), "o-", color=colours[way], markersize=4)
        (base,) = (100 * record["eer"]["value"] for record in here if record["way"] == NONE)
        ax.axhline(base, color="grey", ls="--")
        ax.set_xscale("log", base=2)
        ax.set_xticks(RANKS, [str(rank) for rank in RANKS])
        middle = sum(ends[key]) / 2
        ax.set(title=f"{key[0]}, {key[1]} numbers", xlabel="rank", ylabel="EER %")
        ax.set_ylim(middle - height / 2, middle + height / 2)
        ax.grid(alpha=0.3)
    entries = [legend_line(color=colours[way], marker="o", label=way) for way in WAYS]
    entries.append(legend_line(color="grey", ls="--", label="without adapter"))
    figure.legend(handles=entries, loc="outside lower center", ncols=3, fontsize=8)
    save_figure(figure, file)


if __name__ == "__main__":
    main()

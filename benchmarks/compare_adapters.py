"""Adapters, fine-tuned models and their base side by side, on every condition of a trial list's audio.

    python benchmarks/compare_adapters.py BASE --speech ROOT --out docs/results/adapters \
        --systems "telephony, linear=RUN/best" "telephony, full=RUN/best_as_trained" ...

ROOT holds test/wav, test/trials_*.txt and noise/test. Each utterance is simulated once per condition and embedded once
per system; intervals and differences come from one bootstrap over speakers, so a difference's interval is paired. A
folder with an adapter is loaded on the base and, once per adapter, switched off again: those embeddings must equal the
base's to the last bit.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from paired import Drawn, eers
from peft import PeftModel

from mrl_redimnet.adapters.hub import adapter_info
from mrl_redimnet.audio.domains import make_domain
from mrl_redimnet.evaluation.results import embed_trials
from mrl_redimnet.saving import load_model
from mrl_redimnet.scoring.trials import Trials, read_trials

DIMS = (64, 256)


def main():
    """Embeds, scores, writes OUT.json and OUT.md."""
    arguments = parse()
    lists = trial_lists(arguments.speech)
    noise = str(arguments.speech / "noise" / "test")
    conditions = {"clean": None, "noisy": make_domain("noisy", noise=noise), "telephony": make_domain("telephony")}
    folder, trials = arguments.speech / "test" / "wav", lists["both lists"]
    began, rows, systems, reference, bases = time.time(), [], {}, None, {}
    for name, source in {"base": None, **dict(pair.split("=", 1) for pair in arguments.systems)}.items():
        encoder, adapter = load(arguments.base, source)
        systems[name] = describe(encoder, source)
        for condition, domain in conditions.items():
            embeddings = embed_trials(encoder, trials, folder, domain=domain)
            for of_list, dim, drawn in results(lists, embeddings, arguments.resamples):
                base = bases.setdefault((condition, of_list, dim), drawn)
                rows.append({"system": name, "condition": condition, **as_row(of_list, dim, drawn, base)})
            if condition == "clean" and source is None:
                reference = embeddings
        if adapter is not None:
            with adapter.disable_adapter():
                off = embed_trials(encoder, trials, folder)
            systems[name]["off_equals_base"] = bool(np.array_equal(off, reference))
        print(f"{name}: done after {time.time() - began:.0f} s", flush=True)
    record = {"machine": machine(), "resamples": arguments.resamples, "systems": systems, "rows": rows}
    arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(report(record))
    print(report(record))


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", help="path or Hub id")
    parser.add_argument("--speech", type=Path, required=True)
    parser.add_argument("--systems", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    parser.add_argument("--resamples", type=int, default=1000)
    return parser.parse_args()


def trial_lists(speech: Path) -> dict[str, Trials]:
    """The trial lists of a speech folder, and all their trials as one."""
    files = sorted((speech / "test").glob("trials_*.txt"), reverse=True)
    lists = {path.stem.removeprefix("trials_"): read_trials(path) for path in files}
    sides = [[path for trials in lists.values() for path in getattr(trials, side)] for side in ("enrol", "test")]
    return {**lists, "both lists": Trials(np.concatenate([t.labels for t in lists.values()]), *sides)}


def describe(encoder, source: str | None) -> dict:
    """What a system adds to the base: parameters of an adapter, bytes of its file, ranks."""
    if source is None or not (Path(source) / "adapter_config.json").is_file():
        return {}
    info = adapter_info(source)
    return {"parameters": info.parameters, "bytes": info.size, "ranks": info.facts.layers}


def load(base: str, source: str | None):
    """The encoder of a system, and its adapter where it is one."""
    if source is not None and not (Path(source) / "adapter_config.json").is_file():
        return encoder_of(load_model(source)), None
    encoder = encoder_of(load_model(base))
    return encoder, None if source is None else PeftModel.from_pretrained(encoder, source)


def encoder_of(model):
    """The encoder without its head."""
    return getattr(model, model.base_model_prefix, model)


def results(lists: dict[str, Trials], embeddings: np.ndarray, resamples: int) -> Iterator[tuple[str, int, Drawn]]:
    """Per list and dimension, the EER."""
    for name, trials in lists.items():
        for dim, drawn in eers(trials, lists["both lists"].utterances, embeddings, DIMS, resamples).items():
            yield name, dim, drawn


def as_row(name: str, dim: int, drawn: Drawn, base: Drawn) -> dict:
    """An EER with its interval, and the change against the base with its paired one, for JSON."""
    change, (low, high) = drawn - base, drawn.interval
    row = {"list": name, "dim": dim, "eer": drawn.value, "eer_low": low, "eer_high": high}
    return row | dict(zip(("difference", "difference_low", "difference_high"), change.record().values(), strict=True))


def machine() -> str:
    """What it ran on."""
    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


def report(record: dict) -> str:
    """Markdown: per list a table of systems by condition and dimension, and what each adapter is."""
    rows = record["rows"]
    text = [
        f"EER % [95 % interval over speakers], and below it the difference to the base with its paired interval "
        f"({record['resamples']} resamples); **bold** where that interval excludes zero. {record['machine']}."
    ]
    for name in dict.fromkeys(row["list"] for row in rows):
        here = [row for row in rows if row["list"] == name]
        columns = list(dict.fromkeys((row["condition"], row["dim"]) for row in here))
        text += ["", f"### {name}", ""]
        text += ["| system | " + " | ".join(f"{c}, {d}" for c, d in columns) + " |", "|---" * (len(columns) + 1) + "|"]
        for system in dict.fromkeys(row["system"] for row in here):
            cells = {(r["condition"], r["dim"]): cell(r) for r in here if r["system"] == system}
            text.append(f"| {system} | " + " | ".join(cells[column] for column in columns) + " |")
    text += ["", "### Adapters", "", "| adapter | parameters | bytes | ranks | off = base |", "|---|---|---|---|---|"]
    for name, facts in record["systems"].items():
        if facts:
            ranks = sorted(facts["ranks"].values())
            spread = f"{len(ranks)} layers, {ranks[0]} to {ranks[-1]}, {sum(ranks)} in all"
            same = "bit by bit" if facts["off_equals_base"] else "NO"
            text.append(f"| {name} | {facts['parameters']:,} | {facts['bytes']:,} | {spread} | {same} |")
    return "\n".join(text) + "\n"


def cell(row: dict) -> str:
    """One system on one condition."""
    value = f"{100 * row['eer']:.2f} [{100 * row['eer_low']:.1f}, {100 * row['eer_high']:.1f}]"
    if row["system"] == "base":
        return value
    change = f"{100 * row['difference']:+.2f} [{100 * row['difference_low']:+.1f}, {100 * row['difference_high']:+.1f}]"
    return f"{value}<br>{f'**{change}**' if row['difference_low'] * row['difference_high'] > 0 else change}"


if __name__ == "__main__":
    main()

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
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel

from mrl_redimnet.domains import make_domain
from mrl_redimnet.evaluation import cosine_scores, embed_trials
from mrl_redimnet.metrics import bootstrap_values, eer, quantile_interval
from mrl_redimnet.saving import load_model
from mrl_redimnet.trials import Trials, read_trials, speaker_of

DIMS = (64, 256)


def main():
    """Embeds, scores, writes OUT.json and OUT.md."""
    arguments = parse()
    lists = {path.stem.removeprefix("trials_"): read_trials(path) for path in sorted_lists(arguments.speech)}
    everything = Trials(
        np.concatenate([t.labels for t in lists.values()]),
        [path for t in lists.values() for path in t.enrol],
        [path for t in lists.values() for path in t.test],
    )
    lists["both lists"] = everything
    noise = str(arguments.speech / "noise" / "test")
    conditions = {"clean": None, "noisy": make_domain("noisy", noise=noise), "telephony": make_domain("telephony")}
    folder = arguments.speech / "test" / "wav"
    began, rows, identical, base_values = time.time(), [], {}, {}
    for system, source in {"base": None, **dict(pair.split("=", 1) for pair in arguments.systems)}.items():
        encoder, adapter = load(arguments.base, source)
        for condition, domain in conditions.items():
            embeddings = embed_trials(encoder, everything, folder, domain=domain)
            if adapter is not None:
                with adapter.disable_adapter():
                    off = embed_trials(encoder, everything, folder, domain=domain) if condition == "clean" else None
                if off is not None:
                    identical[system] = bool(np.array_equal(off, base_values["embeddings"]))
            elif system == "base" and condition == "clean":
                base_values["embeddings"] = embeddings
            rows += results(system, condition, lists, everything.utterances, embeddings, base_values, arguments.resamples)
        print(f"{system}: done after {time.time() - began:.0f} s", flush=True)
    record = {"machine": machine(), "resamples": arguments.resamples, "off_equals_base": identical, "rows": rows}
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


def sorted_lists(speech: Path) -> list[Path]:
    """The trial lists of a speech folder."""
    return sorted((speech / "test").glob("trials_*.txt"), reverse=True)


def load(base: str, source: str | None):
    """The encoder of a system, and its adapter where it is one."""
    if source is not None and not (Path(source) / "adapter_config.json").is_file():
        return encoder_of(load_model(source)), None
    encoder = encoder_of(load_model(base))
    return encoder, None if source is None else PeftModel.from_pretrained(encoder, source)


def encoder_of(model):
    """The encoder without its head."""
    return getattr(model, model.base_model_prefix, model)


def results(system, condition, lists, utterances, embeddings, base_values, resamples) -> list[dict]:
    """EER, its interval and the paired difference to the base, per list and dimension; rates in [0, 1]."""
    row_of = {path: row for row, path in enumerate(utterances)}
    found = []
    for name, trials in lists.items():
        sides = [np.array([row_of[path] for path in side]) for side in (trials.enrol, trials.test)]
        speakers = [[speaker_of(path) for path in side] for side in (trials.enrol, trials.test)]
        for dim in DIMS:
            scores = cosine_scores(embeddings, *sides, dim)
            values = bootstrap_values(scores, trials.labels, *speakers, resamples=resamples)
            value = eer(scores, trials.labels)
            key = (condition, name, dim)
            base_value, base_resampled = base_values.setdefault(key, (value, values))
            low, high = quantile_interval(values)
            less, more = quantile_interval(values - base_resampled)
            row = dict(system=system, condition=condition, list=name, dim=dim, eer=value, eer_low=low, eer_high=high)
            found.append(row | dict(difference=value - base_value, difference_low=less, difference_high=more))
    return found


def machine() -> str:
    """What it ran on."""
    return f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"


def report(record: dict) -> str:
    """Markdown: per list a table of systems by condition and dimension."""
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
    off = record["off_equals_base"]
    if off:
        same = "yes" if all(off.values()) else "NO: " + ", ".join(k for k, v in off.items() if not v)
        text += ["", f"Embeddings of the clean speech with each adapter switched off equal the base's bit by bit: {same}."]
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

"""How fast crops are made, and how fast a training step uses them: crops a second, one process, one thread each.

    python benchmarks/loader_rate.py --speech ROOT --out docs/results/loader_rate [--sizes nano b0 b2]

ROOT holds train and noise/train. The loader is measured without a model, the step without a loader, on random crops.
Their ratio says how many loader processes of one thread keep one such step busy.
"""

import argparse
import json
import statistics
import time
from functools import partial
from pathlib import Path

import torch
from compare_adapters import machine

from configuration_mrl_redimnet import MRLReDimNetConfig
from modeling_mrl_redimnet import MRLReDimNetForXVector
from mrl_redimnet.audio.augmentation import Sources, make_augmentations
from mrl_redimnet.data.corpus import SpeakerTable, load_corpus, speakers_of, split_usable
from mrl_redimnet.data.crops import CorpusTalkers, CropDataset, CropMaker, augmented

CROP_SECONDS, SPEEDS = 2.0, (1.0, 0.9, 1.1)
USUAL = [
    {"kind": "reverberation"},
    {"kind": "one_of", "choices": [{"kind": "noise", "snr": [0, 15]}, {"kind": "babble", "snr": [10, 30]}]},
]
# (title, speeds, augmentations)
CHAINS = (
    ("crops as they are", (1.0,), []),
    ("three speeds", SPEEDS, []),
    ("three speeds, noise in 60 %", SPEEDS, [{"kind": "noise", "probability": 0.6}]),
    (
        "three speeds, rooms, noise or babble in 60 %",
        SPEEDS,
        [{"kind": "one_of", "probability": 0.6, "choices": USUAL}],
    ),
    ("and a codec in 20 %", SPEEDS, [{"kind": "one_of", "probability": 0.6, "choices": USUAL},
                                     {"kind": "codec", "probability": 0.2}]),
)  # fmt: skip


def main():
    """Measures, prints, writes OUT.json and OUT.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--speech", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    parser.add_argument("--sizes", nargs="+", default=["nano", "b0", "b2"])
    parser.add_argument("--crops", type=int, default=600)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    loader = {title: loader_rates(arguments, speeds, entries) for title, speeds, entries in CHAINS}
    step = {size: step_rates(size) for size in arguments.sizes}
    record = {"machine": machine(), "crop_seconds": CROP_SECONDS, "loader": loader, "step": step}
    arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(table(record))
    print(table(record))


def loader_rates(arguments: argparse.Namespace, speeds: tuple[float, ...], entries: list) -> list[float]:
    """Crops a second of three passes, after one to warm up."""
    corpus, _ = split_usable(load_corpus(arguments.speech / "train"), 0.3)
    speakers = SpeakerTable(speakers_of(corpus))
    chain = make_augmentations(entries, Sources(noise=arguments.speech / "noise/train", talkers=CorpusTalkers(corpus)))
    crops = CropDataset(corpus, speakers, CropMaker(len(speakers), speeds, partial(augmented, chain, None)))
    rates = []
    for _ in range(4):
        began = time.perf_counter()
        for draw in range(arguments.crops):  # the same each time: rooms are simulated in the first pass
            crops[draw]
        rates.append(arguments.crops / (time.perf_counter() - began))
    return rates[1:]


def step_rates(size: str, batch: int = 32) -> list[float]:
    """Crops a second of three training steps (forward, backward, AdamW) in float32, after one to warm up."""
    torch.manual_seed(0)
    model = MRLReDimNetForXVector(MRLReDimNetConfig.from_size(size, num_speakers=951)).train()
    optimizer = torch.optim.AdamW(model.parameters())
    crops, labels = 0.1 * torch.randn(batch, int(CROP_SECONDS * 16000)), torch.randint(951, (batch,))
    rates = []
    for _ in range(4):
        began = time.perf_counter()
        model(crops, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        rates.append(batch / (time.perf_counter() - began))
    return rates[1:]


def table(record: dict) -> str:
    """Markdown: medians with their range, and how much faster the loader is than each step."""
    sizes = list(record["step"])
    middle = {size: statistics.median(rates) for size, rates in record["step"].items()}
    text = [
        f"Crops of {record['crop_seconds']:g} s a second, one thread, medians of three [lowest, highest]. "
        f"{record['machine']}.",
        "",
        "| loader | crops/s | " + " | ".join(f"against {size}'s step" for size in sizes) + " |",
        "|---" * (len(sizes) + 2) + "|",
    ]
    for title, rates in record["loader"].items():
        ratios = " | ".join(f"{statistics.median(rates) / middle[size]:.0f} times" for size in sizes)
        text.append(f"| {title} | {spread(rates)} | {ratios} |")
    text += ["", "| step | crops/s |", "|---|---|"]
    text += [f"| {size} | {spread(rates)} |" for size, rates in record["step"].items()]
    return "\n".join(text) + "\n"


def spread(rates: list[float]) -> str:
    """Median and range."""
    digits = 0 if min(rates) >= 100 else 1
    return f"{statistics.median(rates):,.{digits}f} [{min(rates):,.{digits}f}, {max(rates):,.{digits}f}]"


if __name__ == "__main__":
    main()

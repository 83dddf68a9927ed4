"""Fine-tuning of the packaged model for short utterances: crops of one second, of two, of mixed length; an adapter.

    python benchmarks/short_crops.py prepare RUNS --speech SPLIT ...
    python benchmarks/short_crops.py train RUNS --develop TRIALS FOLDER
    python benchmarks/short_crops.py report RUNS --develop TRIALS FOLDER --out docs/results/short_crops

A SPLIT holds wav/SPEAKER/SESSION/FILE at 16 kHz; TRIALS lists the development trials of the speech below FOLDER, which
`packaged_speech.py` makes. `prepare` holds out the packaged models' development speakers, and links up to `MOST`
utterances of each other speaker. The model is its own teacher: it hears each of these whole, and the student learns
from a crop of it to point in that direction. All runs have the same steps of the same seconds of speech, on one thread.
`report` judges them on the development trials, cut as `cut_speech.py` cuts them; no test list is opened.
"""

import argparse
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml
from cut_speech import CLASSES, Heard, hear
from development_speakers import development_speakers, training_folders
from durations import DIMS, SIDES, command_line, rates
from paired import Drawn, change, percent
from safetensors.torch import save_file
from timing import machine

import train_hf
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.scoring.trials import read_trials
from mrl_redimnet.tables import markdown_table
from mrl_redimnet.training.reading import flat, in_groups, read_recipe

BASE = "nano"
MOST = 4  # utterances of a speaker
STEPS, SECONDS = 150, 32.0  # of speech in a step
ENDED = "ended"  # a file in the folder of a run that is
LORA = {"finetune": "adapter", "placement": "linear", "rank": 8, "learning_rate": 2e-3, "weight_decay": 0.01}
CROPS = {"crops of 2 s": 2.0, "crops of 0.6 to 3 s": [0.6, 3.0], "crops of 1 s": 1.0}
RUNS = {
    **{name: {"crop_seconds": seconds} for name, seconds in CROPS.items()},
    "adapter, crops of 0.6 to 3 s": {"crop_seconds": [0.6, 3.0], **LORA},
}


def main():
    """Does what is asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("prepare", "train", "report"))
    parser.add_argument("runs", type=Path, metavar="RUNS")
    parser.add_argument("--speech", type=Path, nargs="+", metavar="SPLIT")
    parser.add_argument("--develop", type=Path, nargs=2, metavar=("TRIALS", "FOLDER"))
    parser.add_argument("--resamples", type=int, default=500, help="of the bootstrap over speakers [500]")
    parser.add_argument("--out", type=Path, help="without suffix")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    {"prepare": prepare, "train": train, "report": report}[arguments.command](arguments)


# ----------------------------------------------------------------------------------------------------------------------
# Speech


def prepare(arguments: argparse.Namespace) -> None:
    """Training speech, the table of what the model makes of it, and its axes."""
    runs, speakers = arguments.runs, training_folders(arguments.speech)
    held_out = development_speakers(speakers, random.Random(0))
    ids = []
    for name in sorted(set(speakers) - held_out):
        for file in sorted(speakers[name].glob("*/*.*"))[:MOST]:
            ids.append(str(Path(name) / file.relative_to(speakers[name])))
            link = runs / "speech" / ids[-1]
            link.parent.mkdir(parents=True, exist_ok=True)
            if not link.is_symlink():
                link.symlink_to(file.resolve())
    teacher = SpeakerEncoder.from_pretrained(BASE, device="cpu").embed([runs / "speech" / name for name in ids])
    pq.write_table(pa.table({"id": ids, "embedding": [*teacher]}), runs / "teacher.parquet")
    save_file({"axes": torch.eye(teacher.shape[1])}, runs / "teacher_axes.safetensors")  # its own
    print(f"{len(ids):,} utterances of {len(speakers) - len(held_out)} speakers.")


# ----------------------------------------------------------------------------------------------------------------------
# Runs


def train(arguments: argparse.Namespace) -> None:
    """Every run that has not been ended yet."""
    for name, settings in RUNS.items():
        folder = folder_of(arguments.runs, name)
        if (folder / ENDED).is_file():
            continue
        folder.mkdir(parents=True, exist_ok=True)
        recipe = recipe_of(arguments, folder) | settings
        recipe["batch_size"] = round(SECONDS / np.mean(recipe["crop_seconds"]))
        (folder / "recipe.yaml").write_text(yaml.safe_dump(in_groups(flat(read_recipe(None, recipe)))))
        train_hf.main([str(folder / "recipe.yaml"), "--resume"])
        (folder / ENDED).touch()


def recipe_of(arguments: argparse.Namespace, folder: Path) -> dict:
    """What all runs share: of the second stage of the packaged model, with a lower rate."""
    runs, (trials, speech) = arguments.runs, arguments.develop
    return {
        "start": BASE, "train": str(runs / "speech"), "output": str(folder), "sampler": "speaker", "workers": 0,
        "max_unusable_ratio": 0.02, "margin_weight": 0.0, "teacher": str(runs / "teacher.parquet"),
        "teacher_loss": "direction", "teacher_axes": str(runs / "teacher_axes.safetensors"),
        "learning_rate": 3e-4, "final_learning_rate": 1e-5, "warmup": 0.1, "steps": STEPS,
        "dev_trials": str(trials), "dev_folder": str(speech), "report_dims": [],
        "evaluate_every": STEPS, "checkpoint_every": STEPS // 2, "bootstrap_samples": 0, "tracker": "none",
    }  # fmt: skip


def folder_of(runs: Path, name: str) -> Path:
    """Of a run."""
    return runs / "runs" / name.replace(" ", "_").replace(",", "")


# ----------------------------------------------------------------------------------------------------------------------
# Pages


def report(arguments: argparse.Namespace) -> None:
    """Development EERs by class, with what each run changes."""
    runs, (trials, speech) = arguments.runs, arguments.develop
    found = {}
    for name in (BASE, *RUNS):
        folder = folder_of(runs, name)
        if name == BASE or (folder / ENDED).is_file():
            kept = runs / "heard" / f"{folder.name}.npz"
            heard = hear(loaded(folder, name), read_trials(trials), speech, None, kept)
            found[name] = judged(heard, arguments.resamples)
    lines = [["cut", "duration", "numbers", f"{BASE} as it is", *[name for name in found if name != BASE]]]
    for key in found[BASE]:
        side, number, dim = key
        cells = [f"{100 * found[name][key].value:.2f}, {change(found[name][key] - found[BASE][key])}"
                 for name in found if name != BASE]  # fmt: skip
        lines.append([side, CLASSES[number], str(dim), percent(found[BASE][key]), *cells])
    text = "\n".join([
        "# Training for short utterances", "", "```bash", command_line(), "```", "",
        f"{machine()}. EER % on the development trials, changes against {BASE} in points with paired 95 % "
        f"intervals from {arguments.resamples} resamples of the speakers, **bold** without zero; one run each of "
        f"{STEPS} steps of {SECONDS:g} s of speech.", "",
        markdown_table(lines, left=(0, 1, 2), aligned=False), "",
    ])  # fmt: skip
    print(text)
    record = {name: {"|".join(map(str, key)): drawn.record() for key, drawn in each.items()}
              for name, each in found.items()}  # fmt: skip
    arguments.out.with_suffix(".json").write_text(
        json.dumps({"command": command_line(), "eer": record}, indent=1) + "\n"
    )
    arguments.out.with_suffix(".md").write_text(text)


def loaded(folder: Path, name: str) -> SpeakerEncoder:
    """The encoder that a run ended with, or the base."""
    if (folder / "best" / "adapter_config.json").is_file():
        return SpeakerEncoder.from_pretrained(BASE, folder / "best", device="cpu")
    return SpeakerEncoder.from_pretrained(BASE if name == BASE else folder / "best", device="cpu")


def judged(heard: Heard, resamples: int) -> dict[tuple[str, int, int], Drawn]:
    """{side, class, dim: EER}."""
    return {(side, number, dim): rates(heard, number, dim, side, (0.0, 0.0), resamples)["eer"]
            for side in SIDES for number in range(len(CLASSES)) for dim in DIMS}  # fmt: skip


if __name__ == "__main__":
    main()

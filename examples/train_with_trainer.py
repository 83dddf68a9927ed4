"""transformers' own Trainer teaches a model of the Hub the speakers of a data set of arrays, without this package.

    python examples/train_with_trainer.py REPO SPEAKERS          # audio files at 16 kHz in SPEAKERS/name/

transformers, accelerate, datasets and soundfile are enough. Four steps show how; they are far too few to learn much.
"""

import sys
from pathlib import Path

import datasets
import soundfile
import torch
from transformers import AutoFeatureExtractor, AutoModelForAudioXVector, Trainer, TrainingArguments

repository, files = sys.argv[1], sorted(Path(sys.argv[2]).glob("*/*"))
names = sorted({file.parent.name for file in files})
data = {"array": [soundfile.read(file)[0] for file in files], "label": [names.index(f.parent.name) for f in files]}
extractor = AutoFeatureExtractor.from_pretrained(repository, trust_remote_code=True)
model = AutoModelForAudioXVector.from_pretrained(repository, num_speakers=len(names), trust_remote_code=True)


def collate(rows: list[dict]) -> dict:
    """Rows of the data set -> a padded batch."""
    labels = torch.tensor([row["label"] for row in rows])
    return {**extractor([row["array"] for row in rows], sampling_rate=16_000), "labels": labels}


settings = TrainingArguments("runs/trainer", max_steps=4, remove_unused_columns=False, report_to="none")
trainer = Trainer(model, settings, train_dataset=datasets.Dataset.from_dict(data), data_collator=collate)
result = trainer.train()
trainer.save_model("runs/trainer/last")
print(result)

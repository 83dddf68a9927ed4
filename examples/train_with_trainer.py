"""transformers' own Trainer teaches the packaged model the speakers of a data set of arrays.

    python examples/train_with_trainer.py

Two speakers with a recording or two each show how; they are far too few to learn anything from.
"""

import datasets
import soundfile
import torch
from transformers import Trainer, TrainingArguments

from feature_extraction_mrl_redimnet import MRLReDimNetFeatureExtractor
from modeling_mrl_redimnet import MRLReDimNetForXVector
from mrl_redimnet import recordings
from mrl_redimnet.saving import packaged_models

FILES = [recordings.FIRST, recordings.SAME_SPEAKER, recordings.OTHER_SPEAKER]

data = datasets.Dataset.from_dict({"array": [soundfile.read(file)[0] for file in FILES], "label": [0, 0, 1]})
extractor = MRLReDimNetFeatureExtractor()
model = MRLReDimNetForXVector.from_pretrained(packaged_models()["nano"], num_speakers=2)


def collate(rows: list[dict]) -> dict:
    """Rows of the data set -> a padded batch."""
    return {
        **extractor([row["array"] for row in rows], sampling_rate=16_000),
        "labels": torch.tensor([row["label"] for row in rows]),
    }


settings = TrainingArguments("runs/trainer", max_steps=4, remove_unused_columns=False, report_to="none", use_cpu=True)
trainer = Trainer(model, settings, train_dataset=data, data_collator=collate)
print(trainer.train())
trainer.save_model("runs/trainer/last")

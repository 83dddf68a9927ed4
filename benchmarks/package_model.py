"""A trained model as one that comes with the package: float16 weights, thresholds, a card; no training speakers.

    python benchmarks/package_model.py RUN/best NAME --trials DEV_TRIALS --folder DEV

The embedding's part of RUN/best is written to src/mrl_redimnet/models/NAME. Thresholds are those of `mrl-redimnet
calibrate` on the development speech, from what is written. The card keeps what the run measured on its tests, in
float32, and says where weights and data come from.
"""

import argparse
import json
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from feature_extraction_mrl_redimnet import MRLReDimNetFeatureExtractor
from mrl_redimnet.files import replace_folder
from mrl_redimnet.hub_cards import base_card, save_card
from mrl_redimnet.hub_cards.results import Evaluation
from mrl_redimnet.saving import MODELS, load_model
from mrl_redimnet_cli import main as command_line

DATASETS = (
    "LibriSpeech train-clean-100, one recording of each speaker (CC BY 4.0)",
    "CMU AN4, training part (BSD-like)",
    "speechocean762 (free for commercial and other use)",
    "WUW-Corpus II, speakers with one call (CC BY-SA 4.0)",
    "alphanumeric-audio-dataset (MIT)",
    "DSPSpeech-20 (MIT)",
    "Arabic speech commands (CC BY 4.0)",
    "ESC-10 noise (CC BY 3.0)",
)
TEACHER = (
    "The teacher is CAM++ (3D-Speaker, Apache 2.0, 7.2 M parameters): the embedding of a crop learns to point where "
    "the teacher's embedding of the whole utterance points. `benchmarks/box_speech.py` and the recipe say how."
)
LICENCE = "mit"


def main():
    """Parses the command line and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path)
    parser.add_argument("name")
    parser.add_argument("--trials", required=True, help="development trials, for the thresholds")
    parser.add_argument("--folder", required=True, help="their speech")
    parser.add_argument("--out", type=Path, default=MODELS, help="[src/mrl_redimnet/models]")
    arguments = parser.parse_args()
    folder = arguments.out / arguments.name
    evaluation = Evaluation.load(arguments.trained)
    training = re.search(r"## Training\n\n(.*?)\n", (arguments.trained / "README.md").read_text())[1]
    model = load_model(arguments.trained).base_model

    def write(target: Path):
        model.config.dtype = torch.float32  # what it is loaded as: processors compute in float16 slowly or not at all
        model.config.auto_map = dict(model.auto_classes)  # with the code, which `push` adds
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(target)
        weights = {
            name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()
        }
        if wrong := [name for name, value in weights.items() if not torch.isfinite(value).all()]:
            raise ValueError(f"{wrong[0]}: does not fit into float16.")
        save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
        MRLReDimNetFeatureExtractor(min_samples=model.config.min_samples).save_pretrained(target)
        card = base_card(
            model,
            name=arguments.name,
            training=f"{training} {TEACHER}",
            evaluation=evaluation,
            licence=LICENCE,
            datasets=DATASETS,
        )
        save_card(card, target, evaluation)

    replace_folder(folder, write)
    for code in folder.glob("*.py"):
        code.unlink()
    lists = ["--trials", arguments.trials, "--folder", arguments.folder]
    command_line(["calibrate", str(folder), *lists, "--enrolments", "1", "2", "3"])
    shutil.rmtree(folder / "__pycache__", ignore_errors=True)
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {size / 1e6:.2f} MB, {json.dumps(sorted(file.name for file in folder.iterdir()))}")


if __name__ == "__main__":
    main()

"""A trained model as one that comes with the package: float16 weights, thresholds, a card; no training speakers.

    python benchmarks/package_model.py RUN/best NAME --trials DEV_TRIALS --folder DEV --speech SPLIT ...

The embedding's part of RUN/best is written to src/mrl_redimnet/models/NAME. Thresholds are those of `mrl-redimnet
calibrate --durations` on the development speech. The card keeps the error rates of what was written on the trial lists
of each SPLIT (wav/, trials_*.txt, and ../metadata.csv with the speakers' genders), and where weights and data come
from.
"""

import argparse
import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from timing import machine

from feature_extraction_mrl_redimnet import MRLReDimNetFeatureExtractor
from modeling_mrl_redimnet import MRLReDimNetModel
from mrl_redimnet.evaluation.groups import error_rates, read_groups_for
from mrl_redimnet.evaluation.results import embed_trials, score_trials
from mrl_redimnet.files import replace_folder
from mrl_redimnet.hub_cards import base_card, save_card
from mrl_redimnet.hub_cards.results import Evaluation
from mrl_redimnet.saving import MODELS, load_model, write_for_sentence_transformers
from mrl_redimnet.scoring.scorers import score
from mrl_redimnet.scoring.trials import read_trials
from mrl_redimnet_cli import main as command_line
from pipeline_mrl_redimnet import CUSTOM_PIPELINES

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
    "the teacher's embedding of the whole utterance points. `benchmarks/packaged_speech.py` and the recipe say how."
)
LICENCE = "cc-by-sa-4.0"  # of the strictest of the data
SYSTEM = "as packaged"


def main():
    """Parses the command line and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path)
    parser.add_argument("name")
    parser.add_argument("--trials", required=True, help="development trials, for the thresholds")
    parser.add_argument("--folder", required=True, help="their speech")
    parser.add_argument("--speech", type=Path, nargs="+", required=True, metavar="SPLIT")
    parser.add_argument("--training", help="a sentence on it for the card [that of RUN/best's card]")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap over speakers [1000]")
    parser.add_argument("--out", type=Path, default=MODELS, help="[src/mrl_redimnet/models]")
    arguments = parser.parse_args()
    folder = arguments.out / arguments.name
    replace_folder(folder, lambda target: write_model(load_model(arguments.trained).base_model, target))
    lists = ["--trials", arguments.trials, "--folder", arguments.folder]
    if command_line(["calibrate", str(folder), *lists, "--durations", "--enrolments", "1", "2", "3"]):
        raise SystemExit(1)
    written = load_model(folder)
    card = (arguments.trained / "README.md").read_text()
    training = arguments.training or re.findall(r"## Training\n\n(.*?)\n", card)[0]
    evaluation = evaluated(written, arguments.speech, arguments.resamples)
    facts = {"training": f"{training} {TEACHER}", "licence": LICENCE, "datasets": DATASETS}
    save_card(base_card(written, name=arguments.name, evaluation=evaluation, **facts), folder, evaluation)
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e6:.2f} MB")


def write_model(model: MRLReDimNetModel, target: Path) -> None:
    """Weights in float16, what else a model needs, and no code: that is the package's."""
    model.config.dtype = torch.float32  # what it is loaded as: processors compute in float16 slowly or not at all
    model.config.auto_map = dict(model.auto_classes)  # for the code that `push` adds
    model.config.custom_pipelines = CUSTOM_PIPELINES
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(target)
    weights = {name: value.half() if value.is_floating_point() else value for name, value in model.state_dict().items()}
    if too_large := [name for name, value in weights.items() if not torch.isfinite(value).all()]:
        raise ValueError(f"{too_large[0]}: does not fit into float16.")
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    MRLReDimNetFeatureExtractor(min_samples=model.config.min_samples).save_pretrained(target)
    write_for_sentence_transformers(target)
    for code in target.glob("*.py"):
        code.unlink()


def evaluated(model: MRLReDimNetModel, splits: list[Path], resamples: int) -> Evaluation:
    """Error rates on every list, and at full width of women and men."""
    results, groups = {}, {}
    for path in [path for split in splits for path in sorted(split.glob("trials_*.txt"))]:
        name, trials = path.stem.removeprefix("trials_"), read_trials(path)
        embeddings = embed_trials(model, trials, path.parent / "wav", progress=name)
        dims = model.config.matryoshka_dims
        results[name] = {SYSTEM: score_trials(trials, trials.utterances, embeddings, dims, resamples)}
        genders = read_groups_for([trials], path.parents[1] / "metadata.csv", "gender")
        scores = score(trials, trials.utterances, embeddings, dims[-1])
        groups[name] = error_rates(trials, scores, genders, resamples, dim=dims[-1])
    return Evaluation(SYSTEM, results, f"Cosines of whole utterances, {machine()}.", groups)


if __name__ == "__main__":
    main()

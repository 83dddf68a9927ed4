"""A trained adapter as one that comes with the package: cut to a rank, with a card.

    python benchmarks/package_adapter.py RUN/best DOMAIN --base nano --rank 2 --training SENTENCE --speech SPLIT ...

The adapter is written to src/mrl_redimnet/models/BASE-DOMAIN. The card has its error rates and the base's on the trial
lists of each SPLIT (wav/, trials_*.txt), and where weights and data come from.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from package_model import LICENCE
from timing import machine

from mrl_redimnet.adapters.bank import AdapterBank
from mrl_redimnet.adapters.facts import AdapterFacts
from mrl_redimnet.adapters.publishing import publish_adapter
from mrl_redimnet.evaluation.results import embed_trials, score_trials
from mrl_redimnet.hub_cards.results import Evaluation
from mrl_redimnet.saving import MODELS, load_model
from mrl_redimnet.scoring.trials import read_trials

SYSTEM = "adapter"


def main():
    """Parses the command line and writes the folder."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trained", type=Path)
    parser.add_argument("domain", help="what kind of speech it is for, in a word")
    parser.add_argument("--base", default="nano", help="[nano]")
    parser.add_argument("--rank", type=int, help="to cut it to")
    parser.add_argument("--training", required=True, help="a sentence on it for the card")
    parser.add_argument("--datasets", nargs="+", required=True, help="names of the data, with their licences")
    parser.add_argument("--speech", type=Path, nargs="+", required=True, metavar="SPLIT")
    parser.add_argument("--resamples", type=int, default=1000, help="of the bootstrap over speakers [1000]")
    arguments = parser.parse_args()
    bank = AdapterBank.load(arguments.base)
    bank.add(SYSTEM, arguments.trained, rank=arguments.rank)
    systems = {SYSTEM: bank.merged(SYSTEM), "base": load_model(arguments.base)}
    results = {}
    for path in [path for split in arguments.speech for path in sorted(split.glob("trials_*.txt"))]:
        name, trials = path.stem.removeprefix("trials_"), read_trials(path)
        dims = systems["base"].config.matryoshka_dims
        results[name] = {}
        for system, model in systems.items():
            embeddings = embed_trials(model, trials, path.parent / "wav", progress=f"{name}, {system}")
            results[name][system] = score_trials(trials, trials.utterances, embeddings, dims, arguments.resamples)
    evaluation = Evaluation(SYSTEM, results, f"Cosines of whole utterances, {machine()}.")
    folder = MODELS / f"{arguments.base}-{arguments.domain}"
    with tempfile.TemporaryDirectory() as cut:
        bank.save(SYSTEM, Path(cut) / SYSTEM)
        source = Path(cut) / SYSTEM
        replace(AdapterFacts.load(source), domain=arguments.domain).save(source)
        publish_adapter(source, folder, arguments.training, evaluation, LICENCE, arguments.datasets)
    print(f"{folder}: {sum(file.stat().st_size for file in folder.iterdir()) / 1e3:.0f} kB")


if __name__ == "__main__":
    main()

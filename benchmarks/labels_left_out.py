"""A projection trained on speaker labels: what it gains on corpora that it has heard, and on one that it has not.

    python benchmarks/labels_left_out.py MODEL WORK --train SPEECH ... --trials DEV_TRIALS --folder DEV --out OUT

WORK keeps pooled statistics, as that of `bits.py` does. The projection of MODEL learns to tell the training speakers
apart (AAM), once from all corpora and once from all but each corpus of the development trials, which are then judged
corpus by corpus. A corpus is what the first two letters of a speaker's name say.
"""

import argparse
import json
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
from bits import Judged, Projection, Recipe, Training, judged_lists, trained, training_of
from paired import Drawn, change, mean, percent
from timing import machine

from mrl_redimnet.saving import load_model
from mrl_redimnet.scoring.trials import Trials
from mrl_redimnet.speed import speed_up
from mrl_redimnet.tables import markdown_table

DIMS = (16, 64, 256)
LABELS = Recipe(teacher=False, float_share=1.0)
RECIPES = {
    "200 steps": LABELS,
    "200 steps at four times the rate": replace(LABELS, learning_rate=2e-3),
}


def main():
    """Parses the command line, trains, writes OUT.json and OUT.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("--train", type=Path, nargs="+", required=True, metavar="SPLIT", help="wav/SPEAKER/...")
    parser.add_argument("--trials", type=Path, required=True, help="development trials; not trained on their speakers")
    parser.add_argument("--folder", type=Path, required=True, help="their speech")
    parser.add_argument("--seeds", type=int, default=2, help="[2]")
    parser.add_argument("--resamples", type=int, default=300, help="of the bootstrap over speakers [300]")
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    arguments.speech = []  # no test list
    model = speed_up(load_model(arguments.model).base_model)
    _, judged = next(judged_lists(model, arguments))
    training = training_of(model, arguments, set(np.concatenate(judged.trials.speakers)))
    corpora, lists = corpus_of(training.speakers), by_corpus(judged)
    plain, rows = Projection.of(model), []
    for name, recipe in RECIPES.items():

        def learnt(kept: np.ndarray, recipe: Recipe = recipe) -> list[Projection]:
            part = Training(training.statistics[kept], training.speakers[kept])
            own = plain(part.statistics)
            return [trained(plain, part, model, recipe, seed, own) for seed in range(arguments.seeds)]

        every = learnt(np.ones(len(corpora), dtype=bool))
        for corpus, each in lists.items():
            base, heard, unheard = (rates(ways, each) for ways in ([plain], every, learnt(corpora != corpus)))
            rows += [(name, corpus, dim, base[dim], heard[dim], unheard[dim]) for dim in DIMS]
            print(name, corpus, [f"{100 * part[256].value:.2f}" for part in (base, heard, unheard)], flush=True)
    command = shlex.join(["python", *sys.argv])
    record = {"command": command, "machine": machine(), "recipes": {name: asdict(r) for name, r in RECIPES.items()}}
    keys = ("recipe", "corpus", "dim", "base", "heard", "unheard")
    record["rows"] = [dict(zip(keys, (*row[:3], *(each.record() for each in row[3:])), strict=True)) for row in rows]
    arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    speakers = {corpus: len({*np.concatenate(each.trials.speakers)}) for corpus, each in lists.items()}
    about = (
        f"{machine()}. EER % [95 % interval over speakers, {arguments.resamples} resamples] on development trials of "
        f"{', '.join(f'{count} speakers of {name}' for name, count in speakers.items())}; {len(corpora):,} utterances "
        f"of {len({*training.speakers})} other speakers to train on. Changes are from the model as it is, in points, "
        f"paired, means of {arguments.seeds} seeds; **bold** ones leave out zero."
    )
    head = ["training", "corpus", "numbers", "as it is", "labels of all corpora", "labels of the other corpora"]
    cells = [[name, corpus, str(dim), percent(base), change(heard - base), change(unheard - base)]
             for name, corpus, dim, base, heard, unheard in rows]  # fmt: skip
    page = f"# Labels of other corpora\n\n```bash\n{command}\n```\n\n{about}\n\n{markdown_table([head, *cells])}\n"
    arguments.out.with_suffix(".md").write_text(page)


def corpus_of(speakers: np.ndarray) -> np.ndarray:
    """The corpus of each speaker."""
    return np.array([speaker[:2] for speaker in speakers])


def by_corpus(judged: Judged) -> dict[str, Judged]:
    """The trials of each corpus by themselves."""
    trials, place = judged.trials, {name: row for row, name in enumerate(judged.trials.utterances)}
    own, found = corpus_of(np.array(trials.speakers[0])), {}
    for corpus in sorted({*own}):
        rows = np.flatnonzero(own == corpus)
        part = Trials(trials.labels[rows], [trials.enrol[row] for row in rows], [trials.test[row] for row in rows])
        found[corpus] = Judged(part, judged.statistics[[place[name] for name in part.utterances]], judged.resamples)
    return found


def rates(projections: list[Projection], judged: Judged) -> dict[int, Drawn]:
    """The EER at each of `DIMS`, the mean over projections."""
    found: dict[int, list[Drawn]] = {dim: [] for dim in DIMS}
    for projection in projections:
        rows = projection(judged.statistics)
        for dim in DIMS:
            found[dim].append(judged.rate(rows[:, :dim], rows[:, :dim]))
    return {dim: mean(drawn) for dim, drawn in found.items()}


if __name__ == "__main__":
    main()

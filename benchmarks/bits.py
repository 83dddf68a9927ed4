"""Bytes of a stored speaker against EER: fewer numbers, fewer bits a number, bases for signs, training for signs.

    python benchmarks/bits.py MODEL WORK --train SPEECH --trials DEV_TRIALS --folder DEV --out OUT [--speech SPLIT ...]

Pooled statistics of all speech are computed once and kept in WORK; embeddings are a linear map of them, the projection.
What is fitted (ranges of numbers, rotations, projections trained for their signs) is fitted on SPEECH, folders of
speakers none of whom is in a trial. The trial lists of each SPLIT (wav/, trials_*.txt) are judged where they are given.
"""

import argparse
import itertools
import json
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from paired import Drawn, change, mean, percent
from scipy import optimize, stats
from scipy.linalg import orthogonal_procrustes
from timing import machine
from torch.nn import functional as F
from tqdm import tqdm

from configuration_mrl_redimnet import SAMPLING_RATE
from modeling_mrl_redimnet import MatryoshkaMarginClassifier, MRLReDimNetModel
from mrl_redimnet.audio.io import read_audio
from mrl_redimnet.audio.scan import files_below
from mrl_redimnet.audio.waveforms import length_batches
from mrl_redimnet.extraction.search import BinaryShortlist
from mrl_redimnet.saving import load_model
from mrl_redimnet.scoring.metrics import bootstrap_values, eer
from mrl_redimnet.scoring.scorers import make_scorer
from mrl_redimnet.scoring.trials import Trials, read_trials
from mrl_redimnet.speed import speed_up
from mrl_redimnet.training.distillation import similarity_loss

BATCH_SECONDS = 60.0
DEVELOPMENT = "development"


# ----------------------------------------------------------------------------------------------------------------------
# Speech as what the projection sees


@dataclass(frozen=True)
class Projection:
    """The linear map from pooled statistics to embeddings: weight [D, P], bias [D]."""

    weight: np.ndarray
    bias: np.ndarray

    @classmethod
    def of(cls, model: MRLReDimNetModel) -> "Projection":
        segments = model.projection.segments
        weight, bias = (torch.cat([getattr(each, name) for each in segments]) for name in ("weight", "bias"))
        return cls(weight.detach().numpy(), bias.detach().numpy())

    def __call__(self, statistics: np.ndarray) -> np.ndarray:
        return statistics @ self.weight.T + self.bias

    def turned(self, basis: np.ndarray) -> "Projection":
        """The projection whose embeddings are these ones times basis [D, D]."""
        return Projection(basis.T @ self.weight, basis.T @ self.bias)


@torch.inference_mode()
def statistics_of(model: MRLReDimNetModel, files: Sequence[Path], cache: Path) -> np.ndarray:
    """What the projection's linear layers get of each file [N, P] float32, kept in `cache`."""
    if cache.exists():
        return np.load(cache)
    most = round(model.config.window_seconds * SAMPLING_RATE)  # beyond it the model averages windows
    found = np.empty((len(files), model.config.pooled_size), dtype=np.float32)
    waves = ((row, read_audio(file)[:most]) for row, file in enumerate(files))
    for batch in length_batches(tqdm(waves, total=len(files), desc=cache.stem), BATCH_SECONDS):
        rows = list(batch)
        lengths = torch.tensor([len(wave) for wave in batch.values()])
        padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(wave) for wave in batch.values()], batch_first=True)
        found[rows] = model.projection.norm(model.pooled(padded, lengths)).numpy()
    np.save(cache, found)
    return found


@dataclass(frozen=True)
class Training:
    """Statistics [N, P] of utterances, and their speakers [N]."""

    statistics: np.ndarray
    speakers: np.ndarray


@dataclass(frozen=True)
class Judged:
    """A trial list, and statistics [N, P] of its utterances in the order of `trials.utterances`."""

    trials: Trials
    statistics: np.ndarray
    resamples: int

    def rate(self, stored: np.ndarray, asked: np.ndarray) -> Drawn:
        """The EER of cosines between what is stored of enrolments and what is asked for, both [N, d]."""
        stored, asked = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (stored, asked))
        scores, labels = make_scorer("cosine").compare(stored, asked, self.trials.rows), self.trials.labels
        values = bootstrap_values(scores, labels, *self.trials.speakers, resamples=self.resamples)
        return Drawn(eer(scores, labels), values)


# ----------------------------------------------------------------------------------------------------------------------
# Ways to store

Codec = Callable[[np.ndarray], Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]]
# training prefixes [M, d] -> (prefixes [N, d] -> what the stored ones are worth, what asks for them)


def units(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def float32(training: np.ndarray):
    """As they are."""
    return lambda rows: (rows, rows)


def int8_by_speaker(training: np.ndarray):
    """Whole 127ths of each one's largest number, as `SpeakerIndex(full="int8")` stores."""

    def code(rows: np.ndarray):
        stored = np.rint(rows * (127 / np.abs(rows).max(axis=1, keepdims=True)))
        return stored, stored

    return code


def int8_by_range(training: np.ndarray):
    """256 levels between the least and the largest value of each number in training, as sentence-transformers does."""
    low, high = units(training).min(axis=0), units(training).max(axis=0)
    step = (high - low) / 255

    def code(rows: np.ndarray):
        stored = np.clip(np.floor((units(rows) - low) / step), 0, 255) * step + low + step / 2
        return stored, stored

    return code


def uniform(bits: int) -> Codec:
    """2 ** bits levels at the distance that is best for a Gaussian of each number's spread (Max 1960), around zero."""
    step = best_step(bits)

    def fit(training: np.ndarray):
        spread = np.sqrt((units(training) ** 2).mean(axis=0))

        def code(rows: np.ndarray):
            stored = spread * levels(units(rows) / spread, bits, step)
            return stored, stored

        return code

    return fit


def levels(numbers: np.ndarray, bits: int, step: float) -> np.ndarray:
    """Each number's level of 2 ** bits levels around zero."""
    half = 2 ** (bits - 1)
    return (np.clip(np.floor(numbers / step), -half, half - 1) + 0.5) * step


def best_step(bits: int) -> float:
    """The distance of levels with the least mean squared error on a standard Gaussian."""
    numbers = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)

    def error(step: float) -> float:
        return float(np.mean((numbers - levels(numbers, bits, step)) ** 2))

    return float(optimize.minimize_scalar(error, bracket=(4 / 2**bits, 6 / 2**bits)).x)


def signs(training: np.ndarray):
    """A bit a number, compared by how many of them differ."""

    def code(rows: np.ndarray):
        stored = np.where(rows > 0, 1.0, -1.0)
        return stored, stored

    return code


def signs_asked_in_float(training: np.ndarray):
    """A bit a number; what asks stays as it is. A sign stands for the number's usual size (Gordo et al. 2014)."""
    size = np.abs(units(training)).mean(axis=0)
    return lambda rows: (np.where(rows > 0, size, -size), rows)


def index_signs(training: np.ndarray):
    """Signs of the centred, rotated prefix, as `SpeakerIndex(storage="binary")` makes its shortlist."""
    scan = BinaryShortlist(training.shape[1], units(training).mean(axis=0, dtype=np.float64))

    def code(rows: np.ndarray):
        stored = 2.0 * np.unpackbits(scan.signs(units(rows).astype(np.float32)), axis=1) - 1
        return stored, stored

    return code


# ----------------------------------------------------------------------------------------------------------------------
# Bases for signs: each keeps the cosines of all prefixes


def within_segments(dims: Sequence[int], turn: Callable[[int, int], np.ndarray]) -> np.ndarray:
    """[D, D] of a rotation turn(start, end) for each segment."""
    basis = np.zeros((dims[-1], dims[-1]), dtype=np.float32)
    for start, end in zip([0, *dims], dims, strict=False):
        basis[start:end, start:end] = turn(start, end)
    return basis


def random_rotation(size: int, seed: int) -> np.ndarray:
    basis, triangle = np.linalg.qr(np.random.default_rng(seed).standard_normal((size, size)))
    return basis * np.sign(np.diag(triangle))


def iterative_quantisation(rows: np.ndarray, seed: int = 0, rounds: int = 50) -> np.ndarray:
    """The rotation [d, d] that brings rows [N, d] nearest to their signs (Gong, Lazebnik 2011)."""
    turn = random_rotation(rows.shape[1], seed)
    for _ in range(rounds):  # not by faiss.ITQMatrix: that of Faiss 1.15.1 came no nearer than a random rotation
        turn = orthogonal_procrustes(rows, np.sign(rows @ turn))[0]
    return turn


# ----------------------------------------------------------------------------------------------------------------------
# A projection trained for its signs


@dataclass(frozen=True)
class Recipe:
    """How a projection learns. teacher: signs are to have the cosines that the embeddings had before; else speakers are
    told apart (AAM)."""

    teacher: bool = True
    float_share: float = 0.5  # of the loss of the embeddings themselves
    steps: int = 200
    speakers: int = 96  # in a batch
    rows_each: int = 3
    learning_rate: float = 5e-4


RECIPES = {"trained by cosines": Recipe(), "trained by speakers": Recipe(teacher=False)}


def straight_through(embeddings: torch.Tensor) -> torch.Tensor:
    """Signs, with the gradient of the number itself where it is within its spread (Bengio et al. 2013, arXiv 1308.3432;
    with the window of Hubara et al. 2016)."""
    scaled = F.hardtanh(embeddings / embeddings.detach().square().mean(0).sqrt().clamp(min=1e-9))
    return scaled + (torch.where(embeddings > 0, 1.0, -1.0) - scaled).detach()


def trained(
    start: Projection, training: Training, model: MRLReDimNetModel, recipe: Recipe, seed: int, teacher: np.ndarray
) -> Projection:
    """The projection after `recipe`. teacher [N, E]: whose cosines pairs of rows are to have."""
    torch.manual_seed(seed)
    rng, dims = np.random.default_rng(seed), model.config.matryoshka_dims
    weight, bias = (torch.tensor(part, requires_grad=True) for part in (start.weight, start.bias))
    names, own = np.unique(training.speakers, return_inverse=True)
    parameters, classifier = [weight, bias], None
    if not recipe.teacher:
        config = model.config.__class__(**{**model.config.to_dict(), "num_speakers": len(names)})
        classifier = MatryoshkaMarginClassifier(config)
        means = np.zeros((len(names), dims[-1]), dtype=np.float32)
        np.add.at(means, own, units(start(training.statistics)))
        classifier.weight.data = torch.from_numpy(means)
        parameters += [*classifier.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.steps)
    rows_of = np.split(np.argsort(own, kind="stable"), np.cumsum(np.bincount(own))[:-1])
    statistics, wanted = torch.from_numpy(training.statistics), torch.from_numpy(teacher)
    labels = torch.from_numpy(own)
    for _ in range(recipe.steps):
        drawn = rng.choice(len(names), min(recipe.speakers, len(names)), replace=False)
        rows = np.concatenate([rng.choice(rows_of[name], min(recipe.rows_each, len(rows_of[name])), replace=False)
                               for name in drawn])  # fmt: skip
        embeddings = F.linear(statistics[rows], weight, bias)
        losses = []
        for kind in (straight_through(embeddings), embeddings):
            if classifier is None:
                losses.append(similarity_loss(kind, wanted[rows], dims))
            else:
                losses.append(classifier(kind, labels[rows])[0])
        loss = (1 - recipe.float_share) * losses[0] + recipe.float_share * losses[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return Projection(weight.detach().numpy(), bias.detach().numpy())


# ----------------------------------------------------------------------------------------------------------------------
# The comparison


@dataclass(frozen=True)
class Way:
    """A way to store: bytes of a number, how one is coded, and the projection of each seed."""

    bytes_per_number: float
    codec: Codec
    projections: Sequence[Projection]
    on_tests: bool = False

    def rates(self, training: Training, judged: Judged, dims: Sequence[int]) -> dict[int, Drawn]:
        """The EER at each of `dims`, the mean over seeds."""
        found: dict[int, list[Drawn]] = {dim: [] for dim in dims}
        for projection in self.projections:
            learnt, rows = (projection(part) for part in (training.statistics, judged.statistics))
            for dim in dims:
                found[dim].append(judged.rate(*self.codec(learnt[:, :dim])(rows[:, :dim])))
        return {dim: mean(drawn) for dim, drawn in found.items()}


def ways(
    plain: Projection, training: Training, model: MRLReDimNetModel, recipes: Sequence[str], seeds: int
) -> dict[str, Way]:
    """All that are compared, by name."""
    dims, own = model.config.matryoshka_dims, plain(training.statistics)
    unit = units(own)

    def turned(turn: Callable[[int, int, int], np.ndarray]) -> list[Projection]:
        bases = (within_segments(dims, lambda start, end, seed=seed: turn(start, end, seed)) for seed in range(seeds))
        return [plain.turned(basis) for basis in bases]

    itq = turned(lambda start, end, seed: iterative_quantisation(unit[:, start:end], seed))
    bases = {"as they come": [plain], "random": turned(lambda start, end, seed: random_rotation(end - start, seed))}
    bases["ITQ"] = itq
    learnt = {
        name: [trained(itq[seed], training, model, RECIPES[name], seed, own) for seed in range(seeds)]
        for name in recipes
    }
    found = {
        "float32": Way(4, float32, [plain], True),
        "int8, scaled by speaker": Way(1, int8_by_speaker, [plain], True),
        "int8, ranges of training": Way(1, int8_by_range, [plain]),
        "4 bits": Way(1 / 2, uniform(4), [plain], True),
        "2 bits": Way(1 / 4, uniform(2), [plain], True),
        "signs, the index's shortlist": Way(1 / 8, index_signs, [plain]),
    }
    tested = ("as they come", "ITQ", "trained by cosines")
    for kind, codec in (("signs", signs), ("signs asked in float", signs_asked_in_float)):
        for name, projections in (bases | learnt).items():
            found[f"{kind}, {name}"] = Way(1 / 8, codec, projections, name in tested)
    for name, projections in learnt.items():
        found[f"float32, {name}"] = Way(4, float32, projections)
    return found


def main():
    """Parses the command line, computes what is not in WORK, compares, writes OUT.json, OUT.md and OUT.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("work", type=Path, metavar="WORK")
    parser.add_argument("--train", type=Path, nargs="+", required=True, metavar="SPLIT", help="wav/SPEAKER/...")
    parser.add_argument("--trials", type=Path, required=True, help="development trials; not trained on their speakers")
    parser.add_argument("--folder", type=Path, required=True, help="their speech")
    parser.add_argument("--speech", type=Path, nargs="*", default=[], metavar="SPLIT", help="wav/ and trials_*.txt")
    parser.add_argument("--recipes", nargs="*", choices=[*RECIPES], default=[*RECIPES], help="what is trained [all]")
    parser.add_argument("--seeds", type=int, default=2, help="[2]")
    parser.add_argument("--resamples", type=int, default=300, help="of the bootstrap over speakers [300]")
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    model = speed_up(load_model(arguments.model).base_model)
    lists = judged_lists(model, arguments)
    development = next(lists)
    training = training_of(model, arguments, set(np.concatenate(development[1].trials.speakers)))
    plain, dims = Projection.of(model), model.config.matryoshka_dims
    compared = ways(plain, training, model, arguments.recipes, arguments.seeds)
    record = {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(),
        "resamples": arguments.resamples,
        "seeds": arguments.seeds,
        "trained": {name: asdict(RECIPES[name]) for name in arguments.recipes},
        "training": {"utterances": len(training.speakers), "speakers": len(set(training.speakers))},
        "lists": {},
        "dims": list(dims),
        "bytes_per_number": {name: way.bytes_per_number for name, way in compared.items()},
        "rates": [],
    }
    for title, judged in itertools.chain([development], lists):
        rates: Rates = {}
        for name, way in compared.items():
            if title == DEVELOPMENT or way.on_tests:
                found = way.rates(training, judged, dims)
                rates |= {(title, name, dim): drawn for dim, drawn in found.items()}
                print(f"{title:18s}{name:42s}", *(f"{100 * drawn.value:6.2f}" for drawn in found.values()), flush=True)
        record["lists"][title] = len(judged.trials)
        record["rates"] += [row(key, drawn, rates) for key, drawn in rates.items()]
        arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        report(record, arguments.out)


Rates = dict[tuple[str, str, int], Drawn]


def row(key: tuple[str, str, int], drawn: Drawn, rates: Rates) -> dict:
    """An entry of the record: a rate, and its differences from float32, from ITQ, and from signs of as many bytes."""
    title, name, dim = key
    entry = {"list": title, "way": name, "dim": dim, "eer": drawn.record(), "text": percent(drawn)}
    kind = name.split(",")[0]
    for what, other in (
        ("from_float32", (title, "float32", dim)),
        ("from_itq", (title, f"{kind}, ITQ", dim)),
        ("from_signs_of_as_many_bytes", (title, "signs asked in float, ITQ", 4 * dim if name == "4 bits" else 0)),
    ):
        if other in rates and other != key:
            entry[what] = change(drawn - rates[other])
    return entry


def judged_lists(model: MRLReDimNetModel, arguments: argparse.Namespace) -> Iterator[tuple[str, Judged]]:
    """(title, list) of the development trials and then of each SPLIT's, embedded when it is its turn."""
    files = {DEVELOPMENT: (arguments.trials, arguments.folder)}
    for split in arguments.speech:
        for path in sorted(split.glob("trials_*.txt")):
            files[path.stem.removeprefix("trials_")] = (path, split / "wav")
    for title, (path, folder) in files.items():
        trials, cache = read_trials(path), arguments.work / f"{title}.npy"
        statistics = statistics_of(model, [folder / name for name in trials.utterances], cache)
        yield title, Judged(trials, statistics, arguments.resamples)


def training_of(model: MRLReDimNetModel, arguments: argparse.Namespace, left_out: set[str]) -> Training:
    """The speech of all speakers of each SPLIT but those of the development trials."""
    files = [(Path(file), split / "wav") for split in arguments.train for file in files_below(split / "wav")]
    speakers = [file.relative_to(folder).parts[0] for file, folder in files]
    kept = [number for number, speaker in enumerate(speakers) if speaker not in left_out]
    statistics = statistics_of(model, [files[number][0] for number in kept], arguments.work / "training.npy")
    return Training(statistics, np.array([speakers[number] for number in kept]))


# ----------------------------------------------------------------------------------------------------------------------
# Telling


def report(record: dict, out: Path):
    """Writes OUT.md and OUT.png."""
    dims, sizes = record["dims"], record["bytes_per_number"]
    cells = {(each["list"], each["way"], each["dim"]): each for each in record["rates"]}
    text = HEAD.format(**record, **record["training"], picture=out.with_suffix(".png").name)
    for title, trials in record["lists"].items():
        lines = ["| way | " + " | ".join(f"{dim} numbers" for dim in dims) + " |", "|---" * (len(dims) + 1) + "|"]
        for name, size in sizes.items():
            if (title, name, dims[0]) in cells:
                own = [f"{size * dim:g} B: {cells[title, name, dim]['text']}" for dim in dims]
                lines.append(f"| {name} | " + " | ".join(own) + " |")
        text += "\n".join([f"\n## {title}, {trials:,} trials\n", *lines]) + "\n"
    text += "\n## Differences\n" + differences(record, cells)
    out.with_suffix(".md").write_text(text)
    picture(record, cells).savefig(out.with_suffix(".png"), dpi=110)


def differences(record: dict, cells: dict) -> str:
    """Tables of the questions asked."""
    dims = record["dims"]
    head = "| list | " + " | ".join(f"{dim} numbers" for dim in dims) + " |\n" + "|---" * (len(dims) + 1) + "|\n"
    text = ""
    for heading, name, key in DIFFERENCES:
        rows = {title: [cells.get((title, name, dim), {}).get(key, "-") for dim in dims] for title in record["lists"]}
        lines = [f"| {title} | " + " | ".join(own) + " |\n" for title, own in rows.items() if set(own) != {"-"}]
        text += "".join([f"\n{heading}\n\n{head}", *lines]) if lines else ""
    return text


DIFFERENCES = (
    ("int8, scaled by speaker, against float32:", "int8, scaled by speaker", "from_float32"),
    ("4 bits against float32:", "4 bits", "from_float32"),
    ("4 bits against signs (ITQ, asked in float) of four times as many numbers, so as many bytes:", "4 bits",
     "from_signs_of_as_many_bytes"),
    ("Signs as they come against ITQ:", "signs, as they come", "from_itq"),
    ("Signs of a projection trained by cosines against ITQ:", "signs, trained by cosines", "from_itq"),
    ("Signs of a projection trained by speakers against ITQ:", "signs, trained by speakers", "from_itq"),
    ("The same, asked in float, by cosines:", "signs asked in float, trained by cosines", "from_itq"),
    ("The same, asked in float, by speakers:", "signs asked in float, trained by speakers", "from_itq"),
    ("float32 of the projection trained by cosines against that of nano:", "float32, trained by cosines",
     "from_float32"),
    ("float32 of the projection trained by speakers against that of nano:", "float32, trained by speakers",
     "from_float32"),
)  # fmt: skip

HEAD = """# Bytes of a stored speaker against EER

```bash
{command}
```

![EER over bytes of a speaker]({picture})

{machine}. EER % [95 % interval over speakers, {resamples} resamples] of the packaged model where enrolments are
stored in so many bytes; **bold** differences leave out zero, in points, paired. Ranges, rotations and trained
projections come from {utterances:,} utterances of {speakers} speakers, none of whom is in a list. Rows of random
rotations, ITQ and training are means of {seeds} seeds. Rotations are within Matryoshka segments, so that they change no
cosine of a prefix, and the signs of a prefix are a prefix of the signs; only "the index's shortlist" turns each prefix
by itself. "Signs" are compared by how many differ; "asked in float": what is stored is signs, what asks is not coded.
"""


def picture(record: dict, cells: dict) -> Figure:
    """EER over bytes, a panel for the development trials and one for each list."""
    titles, dims = [*record["lists"]], record["dims"]
    columns = min(4, len(titles))
    rows = -(-len(titles) // columns)
    figure = Figure(figsize=(max(7, 4 * columns), 3.6 * rows + 1), layout="constrained")
    axes = iter(figure.subplots(rows, columns, squeeze=False).flat)
    for title, ax in zip(titles, axes, strict=False):
        for number, (name, style) in enumerate(DRAWN.items()):
            if (title, name, dims[0]) not in cells:
                continue
            size, colour = record["bytes_per_number"][name], f"C{number}"
            heights = [100 * cells[title, name, dim]["eer"]["value"] for dim in dims]
            ax.plot([size * dim for dim in dims], heights, style, color=colour, label=name, linewidth=1, markersize=4)
        ax.set(title=title, xscale="log", xlabel="bytes of a speaker", ylabel="EER, %", ylim=(0, None))
        ax.set_xticks([2, 8, 32, 128, 1024], ["2", "8", "32", "128", "1024"])
        ax.minorticks_off()
        ax.grid(alpha=0.3)
    for ax in axes:  # those left over
        ax.set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2)
    return figure


DRAWN = {
    "float32": "o-",
    "int8, scaled by speaker": "s-",
    "4 bits": "D-",
    "2 bits": "^-",
    "signs asked in float, ITQ": "v-",
    "signs asked in float, trained by cosines": "v:",
}


if __name__ == "__main__":
    main()

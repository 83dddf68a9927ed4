"""Search among many enrolled speakers: recall against exhaustive search, queries a second, bytes a speaker.

    OMP_NUM_THREADS=1 python benchmarks/search_at_size.py MODEL --speech ROOT [--sizes 10000 100000 1000000]
        --out docs/results/search [--quick]

ROOT holds train/ and test/, each folders of speakers. Enrolled are their speakers and, up to each size, synthetic ones
drawn from Gaussians with the mean and covariances of the real embeddings (between speakers, and within a speaker).
Queries are utterances of synthetic speakers, and real test utterances that were not enrolled. --quick: 10,000
enrolled, few queries, to see that it runs. Writes OUT.json, OUT.md and OUT.png. Run it while nothing else runs.
"""

import argparse
import gc
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import faiss
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from timing import machine, quartiles

from mrl_redimnet.data.corpus import audio_source, load_corpus
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.extraction.search import STORAGES, BinaryShortlist, Float32Shortlist, SpeakerIndex
from mrl_redimnet.files import replace_file
from mrl_redimnet.saving import load_model

SHORTLISTS = (50, 200, 1000)
K = 10
BATCH = 64
UTTERANCES_ENROLLED = 3  # of which a synthetic speaker's embedding is the average
BLOCK = 1 << 16


class Graph(Float32Shortlist):
    """Faiss's HNSW graph over float32 prefixes (Malkov, Yashunin, 2018): 32 neighbours at the base, 16 above."""

    def __init__(self, short: int, mean: np.ndarray):
        self.mean, self._index = mean, faiss.IndexHNSWFlat(short, 16, faiss.METRIC_INNER_PRODUCT)
        self._index.hnsw.efConstruction = 40

    def nearest(self, prefixes: np.ndarray, count: int) -> np.ndarray:
        self._index.hnsw.efSearch = count  # below it the graph does not find so many
        return self._index.search(prefixes, count)[1]

    @property
    def codes(self) -> np.ndarray:
        return faiss.serialize_index(self._index)  # vectors and edges


class Signs(BinaryShortlist):
    """Signs of the prefix as it is: what BinaryShortlist would be without centring and rotation."""

    def __init__(self, short: int, mean: np.ndarray):
        super().__init__(short, np.zeros(short))
        self._basis = np.eye(short, dtype=np.float32)


class CentredSigns(BinaryShortlist):
    """Signs of the centred prefix, not rotated."""

    def __init__(self, short: int, mean: np.ndarray):
        super().__init__(short, mean)
        self._basis = np.eye(short, dtype=np.float32)


STORAGES.update({"HNSW graph": Graph, "binary, signs alone": Signs, "binary, not rotated": CentredSigns})


@dataclass(frozen=True)
class Method:
    """What makes a SpeakerIndex."""

    short: int
    storage: str
    full: str = "float32"


METHODS = (
    *(Method(short, storage) for storage in ("float32", "int8", "binary") for short in (16, 32, 64)),
    Method(128, "binary"),
    Method(256, "binary"),
    Method(64, "binary, signs alone"),
    Method(64, "binary, not rotated"),
    Method(64, "int8", "float16"),
    Method(64, "int8", "int8"),
    Method(32, "HNSW graph"),
)


@dataclass(frozen=True)
class Effort:
    """How much is measured: synthetic queries, and timed calls of one query and of a batch."""

    queries: int
    singles: int
    batches: int


WHOLE, QUICK = Effort(512, 30, 5), Effort(128, 10, 3)


@dataclass
class Row:
    """One method at one size; speeds in queries a second by "batch x threads", {median, low, high} over calls."""

    enrolled: int
    method: str
    short: int
    storage: str
    full: str
    shortlist: int
    recall_1: float
    recall_10: float
    identified: float
    identified_real: float
    build_s: float
    sizes: dict[str, float]  # bytes a speaker, by part
    speeds: dict[str, dict[str, float]] = field(default_factory=dict)


def main():
    """Measures size by size; prints a line per row and writes everything after each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="path or Hub id")
    parser.add_argument("--speech", type=Path, required=True, metavar="ROOT")
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if os.environ.get("OMP_NUM_THREADS") != "1":
        parser.error("set OMP_NUM_THREADS=1: numpy's threads are fixed by it, those of Faiss and torch are set here.")
    sizes, effort = ([10_000], QUICK) if arguments.quick else (sorted(arguments.sizes), WHOLE)
    torch.set_num_threads(2)
    real = RealSpeech.embedded(arguments.model, arguments.speech)
    if sizes[0] <= max(len(real.enrolled), max(SHORTLISTS)):
        parser.error(f"--sizes: {sizes[0]} is no more than the {len(real.enrolled)} real speakers or a shortlist.")
    people = Population.like(real, sizes[-1], effort.queries)
    record = {
        "command": f"OMP_NUM_THREADS=1 python benchmarks/search_at_size.py MODEL --speech ROOT --out {arguments.out}"
        + (" --quick" if arguments.quick else f" --sizes {' '.join(map(str, sizes))}"),
        "machine": machine(),
        "faiss": faiss.__version__,
        "effort": asdict(effort),
        "real": {
            "dimensions": real.units.shape[1],
            "utterances": len(real.units),
            "enrolled": len(real.enrolled),
            "queries": len(real.queries),
        },
        "likeness": likeness(real, people),
        "rows": [],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for size in sizes:
        record["rows"] += [asdict(row) for row in measure(people, size, effort)]
        write(record, arguments.out)


# ---------------------------------------------------------------- who is enrolled, who asks


@dataclass
class RealSpeech:
    """Embeddings of real speech: unit vectors [U, D] of all utterances and their speakers [U]; the enrolled speakers'
    average unit vectors [E, D]; queries [Q, D], none of them enrolled, and the row of each one's speaker [Q]."""

    units: np.ndarray
    speakers: np.ndarray
    enrolled: np.ndarray
    queries: np.ndarray
    owners: np.ndarray

    @classmethod
    def embedded(cls, model: str, root: Path) -> "RealSpeech":
        """All utterances below `root`; of a test speaker every other utterance is a query, the rest is enrolled."""
        data = [load_corpus(root / part) for part in ("train", "test")]
        files = [audio_source(part, row) for part in data for row in range(len(part))]
        speakers = np.array([name for part in data for name in part["speaker"]])
        units = SpeakerEncoder(load_model(model)).embed(files)
        units = units / np.linalg.norm(units, axis=1, keepdims=True)
        names, owners = np.unique(speakers, return_inverse=True)
        asks = np.zeros(len(units), dtype=bool)
        for name in set(data[1]["speaker"]):
            asks[np.flatnonzero(speakers == name)[1::2]] = True
        enrolled = np.zeros((len(names), units.shape[1]))
        np.add.at(enrolled, owners[~asks], units[~asks])
        return cls(units, speakers, enrolled / np.bincount(owners[~asks])[:, None], units[asks], owners[asks])


@dataclass
class Population:
    """Unit embeddings [N, D] of those enrolled, real speakers first, then the synthetic ones who ask; queries [Q, D],
    the real ones last, and the rows of their speakers [Q]."""

    names: list[str]
    enrolled: np.ndarray
    queries: np.ndarray
    owners: np.ndarray
    real_queries: int

    @classmethod
    def like(cls, real: RealSpeech, size: int, queries: int) -> "Population":
        mean, between, within = moments(real)
        rng = np.random.default_rng(0)
        first = len(real.enrolled)
        enrolled = np.empty((size, len(mean)), dtype=np.float32)
        enrolled[:first] = real.enrolled
        for start in range(first, size, BLOCK):
            block = enrolled[start : start + BLOCK]
            block[:] = mean + drawn(between, len(block), rng)
            if start == first:  # the speakers who ask, before their enrolment adds its own deviation
                asked = block[:queries] + drawn(within, queries, rng)
            block += drawn(within / np.sqrt(UTTERANCES_ENROLLED), len(block), rng)
        for start in range(0, size, BLOCK):
            enrolled[start : start + BLOCK] /= np.linalg.norm(enrolled[start : start + BLOCK], axis=1, keepdims=True)
        together = np.concatenate([asked / np.linalg.norm(asked, axis=1, keepdims=True), real.queries])
        owners = np.concatenate([first + np.arange(queries), real.owners])
        names = [f"speaker{row:08d}" for row in range(size)]
        return cls(names, enrolled, together.astype(np.float32), owners, len(real.queries))


def moments(real: RealSpeech) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean [D], and factors F [D, D] with F^T F the covariances of speakers and of utterances within a speaker.

    The covariance of the speakers' averages holds the within-speaker one divided by the number of utterances; this
    share is taken out (and eigenvalues that fall below zero by it are set to zero).
    """
    _, owner, counts = np.unique(real.speakers, return_inverse=True, return_counts=True)
    sums = np.zeros((len(counts), real.units.shape[1]))
    np.add.at(sums, owner, real.units)
    means = sums / counts[:, None]
    deviations = real.units - means[owner]
    within = deviations.T @ deviations / (len(owner) - len(counts))
    return means.mean(axis=0), factor(np.cov(means.T) - within * np.mean(1 / counts)), factor(within)


def factor(covariance: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(covariance)
    return (np.sqrt(values.clip(min=0))[:, None] * vectors.T).astype(np.float32)


def drawn(root: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """[count, D] float32 of the Gaussian whose covariance's factor is `root` [D, D]."""
    return rng.standard_normal((count, len(root)), dtype=np.float32) @ root


def likeness(real: RealSpeech, people: Population) -> dict[str, dict[str, float]]:
    """How alike real and synthetic queries are: cosines to their speaker's enrolment and to those of others among as
    many speakers, and the energy of the embeddings in prefixes."""
    first, synthetic = len(real.enrolled), len(people.queries) - people.real_queries
    facts = {}
    for kind, queries, owners, start in (
        ("real", people.queries[synthetic:], people.owners[synthetic:], 0),
        ("synthetic", people.queries[:synthetic], people.owners[:synthetic] - first, first),
    ):
        pool = people.enrolled[start : start + max(first, synthetic)]
        cosines = queries @ pool.T
        own = np.zeros(cosines.shape, dtype=bool)
        own[np.arange(len(queries)), owners] = True
        facts[kind] = {"own": float(cosines[own].mean()), "own_std": float(cosines[own].std())}
        facts[kind] |= {"others": float(cosines[~own].mean()), "others_std": float(cosines[~own].std())}
        energy = np.cumsum((queries**2).mean(axis=0))
        facts[kind] |= {f"energy_{dim}": float(energy[dim - 1]) for dim in (16, 32, 64)}
    return facts


# ---------------------------------------------------------------- measuring


def measure(people: Population, size: int, effort: Effort) -> list[Row]:
    """The exhaustive search and all methods among the first `size` of those enrolled."""
    enrolled = people.enrolled[:size]
    matrix = torch.from_numpy(enrolled)

    def exhaustive(queries: np.ndarray) -> np.ndarray:
        return (torch.from_numpy(queries) @ matrix.T).topk(K, dim=1).indices.numpy()

    truth, speeds = timed(exhaustive, people.queries, effort)
    facts = quality(people, truth, truth)
    sizes = {"shortlist": 0.0, "embeddings": enrolled.nbytes / size, "names": 0.0}
    rows = [
        Row(
            size,
            "exhaustive",
            enrolled.shape[1],
            "float32",
            "float32",
            size,
            **facts,
            build_s=0.0,
            sizes=sizes,
            speeds=speeds,
        )
    ]
    tell(rows[-1])
    for method in (method for method in METHODS if method.short <= enrolled.shape[1]):
        rows += measure_method(method, people, size, truth, effort)
        gc.collect()  # an index holds as much as all embeddings
    return rows


def measure_method(method: Method, people: Population, size: int, truth: np.ndarray, effort: Effort) -> list[Row]:
    faiss.omp_set_num_threads(2)
    start = time.perf_counter()
    index = SpeakerIndex(people.names[:size], people.enrolled[:size], method.short, method.storage, method.full)
    build_s = time.perf_counter() - start
    sizes = {part: held / size for part, held in index.sizes.items()}
    rows = []
    for shortlist in SHORTLISTS:

        def search(queries: np.ndarray, shortlist: int = shortlist) -> np.ndarray:
            return np.array([[int(name[7:]) for name in row] for row in index.search(queries, K, shortlist)[0]])

        found, speeds = timed(search, people.queries, effort)
        name = f"{method.short} {method.storage}" + ("" if method.full == "float32" else f", whole in {method.full}")
        facts = quality(people, found, truth)
        rows.append(Row(size, name, **asdict(method), shortlist=shortlist, **facts, build_s=build_s, sizes=sizes))
        rows[-1].speeds = speeds
        tell(rows[-1])
    return rows


def timed(
    search: Callable[[np.ndarray], np.ndarray], queries: np.ndarray, effort: Effort
) -> tuple[np.ndarray, dict[str, dict[str, float]]]:
    """The answers to all queries [Q, K], and speeds in queries a second by "batch x threads"."""
    search(queries[:BATCH])  # warm-up
    answers, speeds = [], {}
    for threads in (2, 1):
        faiss.omp_set_num_threads(threads)
        torch.set_num_threads(threads)
        for batch, calls in ((BATCH, effort.batches), (1, effort.singles)):
            everything = threads == 2 and batch == BATCH  # also asks the queries beyond the timed calls
            rates = []
            for start in range(0, len(queries) if everything else calls * batch, batch):
                asked = queries[start : start + batch]
                begin = time.perf_counter()
                found = search(asked)
                if len(asked) == batch:
                    rates.append(batch / (time.perf_counter() - begin))
                if everything:
                    answers.append(found)
            speeds[f"{batch} x {threads}"] = quartiles(rates)
    return np.concatenate(answers), speeds


def quality(people: Population, found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Shares of the truth [Q, K] among those found [Q, K], and of queries whose own speaker is first."""
    shared = [len(np.intersect1d(some, best)) / K for some, best in zip(found, truth, strict=True)]
    own = found[:, 0] == people.owners
    synthetic = len(own) - people.real_queries
    return {
        "recall_1": float(np.mean(found[:, 0] == truth[:, 0])),
        "recall_10": float(np.mean(shared)),
        "identified": float(own[:synthetic].mean()),
        "identified_real": float(own[synthetic:].mean()),
    }


# ---------------------------------------------------------------- telling


def tell(row: Row):
    speed = " ".join(f"{name}: {rates['median']:.0f}/s" for name, rates in row.speeds.items())
    print(
        f"{row.enrolled:>9,} {row.method:<26} {row.shortlist:>8,}  recall {row.recall_1:.3f} {row.recall_10:.3f}  "
        f"identified {row.identified:.3f} {row.identified_real:.3f}  {sum(row.sizes.values()):.0f} B  "
        f"built {row.build_s:.1f} s  {speed}",
        flush=True,
    )


def write(record: dict, out: Path):
    for suffix, content in ((".json", json.dumps(record, indent=1) + "\n"), (".md", report(record, out))):
        replace_file(out.with_suffix(suffix), lambda file, text=content: file.write_text(text))
    figure = plot(record["rows"])
    replace_file(out.with_suffix(".png"), lambda file: figure.savefig(file, dpi=110, format="png"))


def report(record: dict, out: Path) -> str:
    """Markdown: what was done, what it shows and does not, a table per size."""
    real, like = record["real"], record["likeness"]
    text = f"""# Search among many enrolled speakers

```bash
{record["command"]}
```

![Recall over speed]({out.with_suffix(".png").name})

{record["machine"]}, Faiss {record["faiss"]}. Shortlist by a prefix, re-ranked by the cosine of the whole embedding of
{real["dimensions"]} numbers (`mrl_redimnet.extraction.search`); recall counts what exhaustive search in float32 (torch,
one matrix product and top-k) finds. {record["effort"]["queries"]} synthetic and {real["queries"]} real queries.
Identified: the query's own speaker comes first. Queries a second: median [quartiles] over calls of 1 or {BATCH}
queries. Bytes a speaker: codes of the prefix, whole embedding, name. Build: normalising, encoding, and for the graph
linking, two threads.

Enrolled are {real["enrolled"]} real speakers and synthetic ones: Gaussians with the mean, the between-speaker and the
within-speaker covariance of {real["utterances"]} real utterances, averaged over {UTTERANCES_ENROLLED} utterances and
normalised. What that shows: recall, speed and bytes for embeddings of this spectrum, which is what a scan by prefix
depends on. What it does not: how many of a million real speakers are told apart. Real speakers have twins, channels
and noise that a Gaussian has not, and {real["enrolled"]} speakers show fewer directions than a million would; a real
query's rivals here are nearly all synthetic. The identification rates compare methods and are no forecast.

| queries | cosine to own enrolment, mean (std) | to others | energy in 16 | 32 | 64 numbers |
|---|---|---|---|---|---|
"""
    for kind, facts in like.items():
        cosines = [f"{facts[whose]:.2f} ({facts[f'{whose}_std']:.2f})" for whose in ("own", "others")]
        energies = [f"{100 * facts[f'energy_{dim}']:.0f} %" for dim in (16, 32, 64)]
        text += f"| {' | '.join([kind, *cosines, *energies])} |\n"
    for size in sorted({row["enrolled"] for row in record["rows"]}):
        text += table(size, [row for row in record["rows"] if row["enrolled"] == size])
    return text


def table(size: int, rows: list[dict]) -> str:
    settings = (f"{BATCH} x 2", f"{BATCH} x 1", "1 x 2", "1 x 1")
    heads = ["prefix, storage", "shortlist", "recall@1", "recall@10", "identified", "of real"]
    heads += [f"queries/s, {name.replace('x', 'a call,')} thread{'s' * (name[-1] == '2')}" for name in settings]
    heads += ["bytes: codes + whole + name", "build, s"]
    lines = ["", f"## {size:,} enrolled", "", "| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for row in rows:
        cells = [row["method"], "all" if row["method"] == "exhaustive" else f"{row['shortlist']:,}"]
        cells += [f"{row[key]:.3f}" for key in ("recall_1", "recall_10", "identified", "identified_real")]
        for name in settings:
            rates = row["speeds"][name]
            cells.append(f"{rates['median']:,.0f} [{rates['low']:,.0f}, {rates['high']:,.0f}]")
        cells += [" + ".join(f"{held:.0f}" for held in row["sizes"].values()), f"{row['build_s']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(rows: list[dict]) -> Figure:
    """Recall@10 over queries a second (batches, one thread), a panel per size: a line per method over shortlists."""
    sizes = sorted({row["enrolled"] for row in rows})
    colours = {"float32": "tab:blue", "int8": "tab:orange", "binary": "tab:green", "HNSW graph": "tab:purple"}
    marks = {16: "v", 32: "s", 64: "o", 128: "D", 256: "^"}
    figure = Figure(figsize=(5.2 * len(sizes) + 2, 4.6), layout="constrained")
    for ax, size in zip(figure.subplots(1, len(sizes), squeeze=False).flat, sizes, strict=True):
        here = [row for row in rows if row["enrolled"] == size]
        speed = {(row["method"], row["shortlist"]): row["speeds"][f"{BATCH} x 1"]["median"] for row in here}
        for method in dict.fromkeys(row["method"] for row in here):
            line = [row for row in here if row["method"] == method]
            if line[0]["full"] != "float32" or line[0]["storage"] not in colours:
                continue  # whole embeddings in fewer bytes, and binary codes made worse, are in the tables
            if method == "exhaustive":
                ax.axvline(speed[method, size], color="black", linestyle=":", label="exhaustive")
                continue
            x = [speed[method, row["shortlist"]] for row in line]
            style = dict(color=colours[line[0]["storage"]], marker=marks[line[0]["short"]], markersize=5)
            ax.plot(x, [row["recall_10"] for row in line], label=method, linewidth=1, **style)
        ax.set(title=f"{size:,} enrolled", xscale="log", xlabel=f"queries a second, {BATCH} a call, one thread")
        ax.set(ylabel="recall@10 of exhaustive search", ylim=(0, 1.03))
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.grid(alpha=0.3)
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", title=f"shortlists of {', '.join(map(str, SHORTLISTS))}")
    return figure


if __name__ == "__main__":
    main()

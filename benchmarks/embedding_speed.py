"""Speed of embeddings beside the reference implementation's: backends, batches, mixed lengths, and what bounds them.

    python benchmarks/embedding_speed.py REFERENCE_CHECKOUT --out docs/results/embedding_speed [--models b2 b0 b6]
        [--loads "1 x 3 s" ...] [--backends eager ...] [--threads 2] [--quick]

REFERENCE_CHECKOUT: a checkout of IDRnD/redimnet (dd9f519 was used) or, of models of ReDimNet2, of PalabraAI/redimnet2
(ffe8f27 was used), which are not part of this project. It and ours get the same random weights. Of each load every
backend first tries its ways to cut it into calls, once each; the fastest is checked against the reference's embeddings;
then the backends take turns. A ratio is the median over rounds of the reference's time by the backend's in the same
round. OUT.json is written after each case, and a second call goes on from there; OUT.md and OUT.png at the end. On a
GPU the same script compares what runs there. --quick: nano, short loads and few rounds, to see that it runs. Run it
while nothing else runs.
"""

import argparse
import copy
import json
import math
import os
import shlex
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from reference import build_pair, network_of, refuse_no_checkout
from roofline import Ceilings, measure_ceilings, measure_parts
from timing import machine, quartiles, speedup, take_turns
from torch import nn

from configuration_mrl_redimnet import SAMPLING_RATE, SIZES
from mrl_redimnet.export import export_onnx
from mrl_redimnet.files import replace_file

REFERENCE = "reference"
FLOAT32_AGREES = 1e-4  # relative error of an embedding


# ---------------------------------------------------------------- loads, and ways to cut them into calls


@dataclass(frozen=True)
class Load:
    """Utterances to embed: samples of each; seconds of timing; the first so many are what ways are tried on."""

    lengths: tuple[int, ...]
    seconds: float
    tried: int

    @property
    def audio_seconds(self) -> float:
        return sum(self.lengths) / SAMPLING_RATE


def equal(count: int, seconds: float, timing: float) -> Load:
    return Load((round(seconds * SAMPLING_RATE),) * count, timing, count)


def mixed(count: int, longest: float, timing: float, tried: int) -> Load:
    """Lengths drawn evenly from 1 s to `longest`, always the same ones."""
    drawn = 1 + (longest - 1) * torch.rand(count, generator=torch.Generator().manual_seed(0))
    return Load(tuple((drawn * SAMPLING_RATE).long().tolist()), timing, tried)


MIXED = "mixed"
LOADS = {"1 x 3 s": equal(1, 3.0, 20.0), "16 x 3 s": equal(16, 3.0, 45.0), MIXED: mixed(64, 15.0, 60.0, tried=16)}
MORE_ON_GPU = {"256 x 3 s": equal(256, 3.0, 20.0)}
QUICK_LOADS = {"1 x 1 s": equal(1, 1.0, 0.5), "4 x 1 s": equal(4, 1.0, 0.5), MIXED: mixed(6, 3.0, 0.5, tried=4)}
LOADS_OF = {"b6": ("1 x 3 s", "16 x 3 s")}  # twenty times b2's arithmetic: mixed lengths would take half an hour


@dataclass(frozen=True)
class Way:
    """batch_seconds: padded audio of a call; 0: each utterance alone; infinite: all together. In parallel: each thread
    makes calls of its own, rather than all threads sharing each call."""

    batch_seconds: float
    parallel: bool = False

    def batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Rows of each call, by falling length so that little is padded."""
        batches: list[list[int]] = []
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
            longest = lengths[batches[-1][0]] if batches else 0
            if batches and longest * (len(batches[-1]) + 1) <= self.batch_seconds * SAMPLING_RATE:
                batches[-1].append(row)
            else:
                batches.append([row])
        return batches


TOGETHER, ALONE, PARALLEL = "together", "one by one", "one by one, a thread each"
WAYS = {
    TOGETHER: Way(math.inf),
    ALONE: Way(0.0),
    PARALLEL: Way(0.0, parallel=True),
    "batches of 15 s": Way(15.0),
    "batches of 60 s": Way(60.0),
    "batches of 600 s": Way(600.0),
}
ON_CPU = (TOGETHER, ALONE, PARALLEL, "batches of 15 s", "batches of 60 s")
ON_GPU = (TOGETHER, "batches of 60 s", "batches of 600 s")


def fitting(ways: Iterable[str], lengths: Sequence[int], masked: bool) -> dict[str, list[list[int]]]:
    """{way: rows of each call} of the ways that a load can take, without those that come to the same calls."""
    found: dict[str, list[list[int]]] = {}
    seen = []
    for name in ways:
        way, batches = WAYS[name], WAYS[name].batches(lengths)
        padded = any(lengths[rows[0]] != lengths[rows[-1]] for rows in batches)
        if padded and (not masked or math.isinf(way.batch_seconds)):
            continue  # all of them padded to the longest is nobody's way
        if way.parallel and len(batches) == 1 or (batches, way.parallel) in seen:
            continue
        seen.append((batches, way.parallel))
        found[name] = batches
    return found


# ---------------------------------------------------------------- backends


@dataclass(frozen=True)
class Plan:
    """What an engine is prepared for: calls of one shape or of any (None), with padding or not, side by side or not."""

    shape: tuple[int, int] | None
    padded: bool
    parallel: bool


@dataclass
class Engine:
    """run: waveforms [B, T], mask [B, T] or None -> embeddings [B, D] on the CPU. note: what it turned out to be."""

    run: Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]
    note: str = ""


@dataclass
class Setup:
    """A model in both implementations, and where its files go."""

    reference: nn.Module
    ours: nn.Module
    device: str
    threads: int
    folder: Path
    pool: ThreadPoolExecutor  # of `threads` threads with a core each
    export_seconds: dict[str, float] = field(default_factory=dict)

    def onnx(self, mask: bool) -> Path:
        """The exported file, with the input `attention_mask` or without."""
        name = "with mask" if mask else "without mask"
        path = self.folder / f"{name.replace(' ', '_')}.onnx"
        if not path.exists():
            start = time.perf_counter()
            export_onnx(self.ours, path, mask=mask)
            self.export_seconds[name] = time.perf_counter() - start
        return path


@dataclass(frozen=True)
class Backend:
    """prepare: what embeds, given a plan. exact: float32, so that its embeddings must be the reference's."""

    prepare: Callable[[Setup, Plan], Engine]
    ways: tuple[str, ...] = ON_CPU
    masked: bool = True
    exact: bool = True
    models: tuple[str, ...] | None = None  # None: all
    tries: bool = True  # False: takes the first way that fits


def of_torch(setup: Setup, model: nn.Module, dtype: torch.dtype | None = None) -> Engine:
    """A model of torch; dtype: of autocast."""

    @torch.inference_mode()  # here, because it is a thread's own
    def run(waves, mask):
        waves = waves.to(setup.device)
        with torch.autocast(setup.device, dtype=dtype, enabled=dtype is not None):
            out = model(waves) if mask is None else model(waves, mask.to(setup.device))
        return getattr(out, "embeddings", out).float().cpu()

    return Engine(run)


def prepare_reference(setup: Setup, plan: Plan, dtype: torch.dtype | None = None) -> Engine:
    return of_torch(setup, setup.reference, dtype)


def prepare_eager(setup: Setup, plan: Plan) -> Engine:
    return of_torch(setup, setup.ours)


def prepare_bfloat16(setup: Setup, plan: Plan) -> Engine:
    return of_torch(setup, copy.deepcopy(setup.ours).to(torch.bfloat16))


def prepare_compiled(setup: Setup, plan: Plan, dtype: torch.dtype = torch.float32, **options) -> Engine:
    """Compiled by inductor, for one shape or for all."""
    model = copy.deepcopy(setup.ours).to(dtype)
    return of_torch(setup, torch.compile(model, dynamic=plan.shape is None, **options))


def prepare_onnxruntime(setup: Setup, plan: Plan) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1 if plan.parallel else setup.threads
    options.add_session_config_entry("session.force_spinning_stop", "1")  # its idle threads leave the cores to others
    path = str(setup.onnx(plan.padded))
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return Engine(lambda waves, mask: torch.from_numpy(session.run(None, feeds(waves, mask))[0]))


def prepare_openvino(setup: Setup, plan: Plan, precision: str | None = None) -> Engine:
    """precision: "f32", or None for what OpenVINO chooses on this processor."""
    import openvino

    core = openvino.Core()
    model = core.read_model(setup.onnx(plan.padded))
    if plan.shape is not None:
        model.reshape({each.any_name: list(plan.shape) for each in model.inputs})
    hints = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": setup.threads}
    if plan.parallel:
        hints |= {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": setup.threads}
    if precision is not None:
        hints["INFERENCE_PRECISION_HINT"] = precision
    compiled, local = core.compile_model(model, "CPU", hints), threading.local()

    def run(waves, mask):
        if not hasattr(local, "request"):
            local.request = compiled.create_infer_request()  # a thread's own
        return torch.from_numpy(local.request.infer(feeds(waves, mask))[0].copy())

    chosen = compiled.get_property("INFERENCE_PRECISION_HINT")
    return Engine(run, f"computes in {getattr(chosen, 'to_string', chosen.__str__)()}")


def feeds(waves: torch.Tensor, mask: torch.Tensor | None) -> dict:
    return {"input_values": waves.numpy()} | ({} if mask is None else {"attention_mask": mask.numpy()})


# Compiled for loads of one shape only, and of b2 only: a shape takes a minute, any length had not ended after 25.
FREEZING = {"options": {"freezing": True}}
COMPILED = Backend(partial(prepare_compiled, **FREEZING), ways=(TOGETHER,), masked=False, models=("b2",))
PLAIN = Backend(prepare_reference, ways=(TOGETHER, ALONE), masked=False, tries=False)  # as its users run it
HALF = dict(dtype=torch.bfloat16)
GRAPHS = {"mode": "reduce-overhead"}  # CUDA graphs
# A new backend is one entry here.
BACKENDS: dict[str, dict[str, Backend]] = {
    "cpu": {
        REFERENCE: PLAIN,
        "reference, cut at will": Backend(prepare_reference, masked=False),
        "eager": Backend(prepare_eager),
        "compiled": COMPILED,
        "ONNX Runtime": Backend(prepare_onnxruntime),
        "OpenVINO, float32": Backend(partial(prepare_openvino, precision="f32")),
        "OpenVINO, its own precision": Backend(prepare_openvino, exact=False),
        "eager, bfloat16": Backend(prepare_bfloat16, exact=False),
    },
    "cuda": {
        REFERENCE: PLAIN,
        "reference, autocast": replace(PLAIN, prepare=partial(prepare_reference, **HALF), exact=False),
        "eager": Backend(prepare_eager, ways=ON_GPU),
        "eager, bfloat16": Backend(prepare_bfloat16, ways=ON_GPU, exact=False),
        "compiled": Backend(prepare_compiled, ways=(TOGETHER,), masked=False),
        "compiled, CUDA graphs": Backend(partial(prepare_compiled, **GRAPHS), ways=(TOGETHER,), masked=False),
        "compiled, CUDA graphs, bfloat16": Backend(
            partial(prepare_compiled, **HALF, **GRAPHS), ways=(TOGETHER,), masked=False, exact=False
        ),
    },
}


# ---------------------------------------------------------------- measuring


class Contestant:
    """A backend with a model: its engines, and the fastest way for each load."""

    def __init__(self, backend: Backend, setup: Setup):
        self.backend, self.setup = backend, setup
        self._engines: dict[Plan, Engine] = {}

    def fit(self, waves: list[torch.Tensor], tried: int) -> tuple[Callable[[], torch.Tensor], dict]:
        """Waveforms [T] each -> (what embeds them all [N, D], facts on how). Tries its ways on the first `tried`.

        Raises NoWay where it cannot take such a load.
        """
        lengths = [len(wave) for wave in waves]
        ways = fitting(self.backend.ways, lengths, self.backend.masked)
        if not ways:
            raise NoWay
        if not self.backend.tries:
            ways = dict(list(ways.items())[:1])
        facts: dict[str, Any] = {"first_call_s": {}, "tried_s": {}}
        for name, batches in ways.items():
            some = fitting([name], lengths[:tried], self.backend.masked).get(name, batches)
            exported = sum(self.setup.export_seconds.values())
            first = self._seconds(waves, some, name)  # prepares, compiles, warms up
            facts["first_call_s"][name] = first - (sum(self.setup.export_seconds.values()) - exported)
            facts["tried_s"][name] = min(self._seconds(waves, some, name) for _ in range(3 if first < 0.5 else 1))
        facts["way"] = min(facts["tried_s"], key=facts["tried_s"].get)
        facts["note"] = self._engine(waves, ways[facts["way"]], facts["way"]).note
        return partial(self._embed, waves, ways[facts["way"]], facts["way"]), facts

    def _seconds(self, *arguments) -> float:
        start = time.perf_counter()
        self._embed(*arguments)
        return time.perf_counter() - start

    def _embed(self, waves: list[torch.Tensor], batches: list[list[int]], way: str) -> torch.Tensor:
        """Embeddings [n, D] of the utterances in `batches`, in the order of their rows."""
        engine = self._engine(waves, batches, way)
        padded = self._padded(waves, batches)

        def call(rows):
            return engine.run(*collate([waves[row] for row in rows], padded))

        answers = (self.setup.pool.map if WAYS[way].parallel else map)(call, batches)
        found = {
            row: one for rows, some in zip(batches, answers, strict=True) for row, one in zip(rows, some, strict=True)
        }
        return torch.stack([found[row] for row in sorted(found)])

    def _engine(self, waves, batches, way: str) -> Engine:
        shapes = {(len(rows), len(waves[rows[0]])) for rows in batches}
        shape = shapes.pop() if len(shapes) == 1 else None
        plan = Plan(shape, self._padded(waves, batches), WAYS[way].parallel)
        if plan not in self._engines:
            self._engines[plan] = self.backend.prepare(self.setup, plan)
        return self._engines[plan]

    @staticmethod
    def _padded(waves, batches) -> bool:
        return any(len(waves[rows[0]]) != len(waves[rows[-1]]) for rows in batches)


class NoWay(Exception):
    """A backend cannot take a load."""


def collate(waves: list[torch.Tensor], padded: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Waveforms [T] each -> [B, longest T], and the mask [B, longest T] where some are padded."""
    if not padded:
        return torch.stack(waves), None
    batch = nn.utils.rnn.pad_sequence(waves, batch_first=True)
    lengths = torch.tensor([len(wave) for wave in waves])
    return batch, (torch.arange(batch.shape[1]) < lengths[:, None]).long()


def measure_load(contestants: dict[str, Contestant], load: Load, fewest: int) -> dict:
    """{backend: facts}: how each cut the load, its error, seconds and speedup; or why it was not timed."""
    noise = torch.Generator().manual_seed(1)
    waves = [torch.randn(length, generator=noise) * 0.1 for length in load.lengths]
    calls, expected = {}, None
    rows: dict[str, dict[str, Any]] = {}
    for name, contestant in contestants.items():
        try:
            call, facts = contestant.fit(waves, load.tried)
            answer = call()
            expected = answer if expected is None else expected
            facts["error"] = float(((answer - expected).norm(dim=1) / expected.norm(dim=1)).max())
            if contestant.backend.exact and not facts["error"] <= FLOAT32_AGREES:
                raise RuntimeError(f"its embeddings are not the reference's: relative error {facts['error']:.1e}")
        except NoWay:
            continue
        except (ImportError, ValueError, RuntimeError) as error:  # one that is not installed or wrong ends no others
            if name == REFERENCE:
                raise
            print(f"  {name} is left out: {error}", file=sys.stderr)
            rows[name] = {"left_out": type(error).__name__}
            continue
        calls[name], rows[name] = call, facts
    times = take_turns(calls, load.seconds, fewest)
    for name, values in times.items():
        rows[name] |= {"seconds": quartiles(values), "rounds": len(values)}
        rows[name] |= {
            "speedup": speedup(times, REFERENCE, name),
            "audio_s_per_s": load.audio_seconds / rows[name]["seconds"]["median"],
        }
    return rows


def main():
    """Measures case by case and writes what is known after each; the tables and the picture at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    parser.add_argument("--models", nargs="+", choices=SIZES, help="[b2 b0 b6]")
    parser.add_argument("--loads", nargs="+", choices=[*LOADS, *MORE_ON_GPU], help="[all]")
    parser.add_argument(
        "--backends", nargs="+", metavar="NAME", help="besides the reference, as OUT.md names them [all]"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    models = arguments.models or (["nano"] if arguments.quick else ["b2", "b0", "b6"])
    for network in map(network_of, models):
        refuse_no_checkout(arguments.reference, network)
    sys.path.insert(0, str(arguments.reference))
    known = {name for some in BACKENDS.values() for name in some}
    if unknown := sorted({*(arguments.backends or ())} - known):
        parser.error(f"--backends: {', '.join(unknown)} not among {', '.join(sorted(known))}")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(arguments.threads)
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # compilers' workers may still write
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{folder}/inductor"  # compiling is timed: nothing is there already
        record = resumed(arguments, device)
        for model in models:
            measure_model(model, arguments, device, Path(folder), record)
    finish(record, arguments.out)


def resumed(arguments, device: str) -> dict:
    """The record in OUT.json, or a new one. Raises ValueError where that one was measured otherwise."""
    settings = {
        "machine": machine(device),
        "device": device,
        "threads": arguments.threads,
        "quick": arguments.quick,
        "versions": {name: version(name) for name in ("torch", "onnxruntime", "openvino")},
    }
    target = arguments.out.with_suffix(".json")
    if target.exists():
        record = json.loads(target.read_text())
        if record["settings"] != settings:
            raise ValueError(
                f"{target} was measured with {record['settings']}, not {settings}: remove it to begin anew."
            )
    else:
        record = {"commands": [], "settings": settings, "loads": {}, "parts": {}, "export_s": {}, "ceilings": None}
    given = [each for each in sys.argv[1:] if each != str(arguments.reference)]
    command = shlex.join(["python", "benchmarks/embedding_speed.py", "REFERENCE_CHECKOUT", *given])
    record["commands"] += [command] if command not in record["commands"] else []
    return record


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def measure_model(model: str, arguments, device: str, folder: Path, record: dict):
    """All loads of a model, then what bounds its parts."""
    loads = QUICK_LOADS if arguments.quick else LOADS | (MORE_ON_GPU if device == "cuda" else {})
    loads = {name: loads[name] for name in LOADS_OF.get(model, loads) if name in loads}
    wanted = set(arguments.loads or loads) - {name for name in loads if f"{model}, {name}" in record["loads"]}
    todo = {name: load for name, load in loads.items() if name in wanted}
    if not todo and (device == "cuda" or model in record["parts"]):
        return
    reference, ours = (each.to(device) for each in build_pair(model))
    (folder / model).mkdir()
    with single_threads(arguments.threads) as pool:
        setup = Setup(reference, ours, device, arguments.threads, folder / model, pool)
        wanted = {REFERENCE, *(arguments.backends or BACKENDS[device])}
        backends = {
            name: each for name, each in BACKENDS[device].items() if name in wanted and model in (each.models or SIZES)
        }
        contestants = {name: Contestant(backend, setup) for name, backend in backends.items()}
        for name, load in todo.items():
            print(f"{model}, {name}", flush=True)
            rows = measure_load(contestants, load, fewest=2 if arguments.quick else 5)
            tell(rows)
            record["loads"][f"{model}, {name}"] = {"model": model, "load": name, "backends": rows}
            record["export_s"].setdefault(model, {}).update(setup.export_seconds)
            save(record, arguments.out)
    if device == "cpu" and model not in record["parts"]:
        if record["ceilings"] is None:
            record["ceilings"] = asdict(measure_ceilings())
        ceilings = Ceilings.from_record(record["ceilings"])
        batches = {name: load for name, load in loads.items() if len(set(load.lengths)) == 1}
        seconds = 0.5 if arguments.quick else 10.0
        record["parts"][model] = {
            name: measure_parts(ours, torch.randn(len(load.lengths), load.lengths[0]) * 0.1, ceilings, seconds)
            for name, load in batches.items()
        }
        save(record, arguments.out)


def single_threads(count: int) -> ThreadPoolExecutor:
    """`count` threads in which torch uses one core each; in this one it goes on with `count`."""
    started = threading.Barrier(count + 1)

    def start():
        torch.set_num_threads(1)
        torch.get_num_threads()  # a thread keeps the number that holds when it first asks
        started.wait()

    torch.get_num_threads()
    pool = ThreadPoolExecutor(count, initializer=start)
    for _ in range(count):  # each call starts a thread, as none is free before all have started
        pool.submit(int)
    started.wait()
    torch.set_num_threads(count)
    return pool


def save(record: dict, out: Path):
    content = json.dumps(record, indent=1) + "\n"
    replace_file(out.with_suffix(".json"), lambda file: file.write_text(content))


# ---------------------------------------------------------------- telling


# (load, whose, times the reference's speed), of b2 on a processor; whose: a backend, or the best of all of ours.
BEST = "the best"
GOALS = (("16 x 3 s", "eager", 1.6), ("16 x 3 s", BEST, 2.8), (MIXED, BEST, 3.0), ("1 x 3 s", BEST, 1.8))


def tell(rows: dict):
    for name, row in rows.items():
        if "left_out" not in row:
            print(
                f"  {name:<30} {spread(row['seconds'], 1e3)} ms  x {spread(row['speedup'])}  {row['way']}", flush=True
            )


def spread(values: dict[str, float], scale: float = 1.0) -> str:
    """median [quartiles] in three digits."""
    numbers = [three_digits(scale * values[name]) for name in ("median", "low", "high")]
    return f"{numbers[0]} [{numbers[1]}, {numbers[2]}]"


def three_digits(value: float) -> str:
    digits = 2 - math.floor(math.log10(abs(value))) if value else 0
    return f"{value:,.{max(0, digits)}f}"


def finish(record: dict, out: Path):
    """OUT.md and OUT.png from the record."""
    figure = plot(record)
    replace_file(out.with_suffix(".png"), lambda file: figure.savefig(file, dpi=110, format="png"))
    text = report(record, out.with_suffix(".png").name)
    replace_file(out.with_suffix(".md"), lambda file: file.write_text(text))


def report(record: dict, picture: str) -> str:
    """Markdown: what was compared and how, goals, a table per model and load, then what bounds the parts."""
    settings = record["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in settings["versions"].items() if number)
    some = QUICK_LOADS[MIXED] if settings["quick"] else LOADS[MIXED]
    lengths = len(some.lengths), max(some.lengths) / SAMPLING_RATE, some.audio_seconds
    quick = "; a quick try" if settings["quick"] else ""
    text = f"""# Speed of embeddings

```bash
{chr(10).join(record["commands"])}
```

![Speed beside the reference's, and what bounds it]({picture})

{settings["machine"]}; threads of every contestant: {settings["threads"]}; {versions}{quick}.
Published shapes with a hop of 15 ms, random weights, the same in both implementations. Every float32 embedding was
compared with the reference's before anything was timed (at most {FLOAT32_AGREES:g} apart, relative to its length);
error: the largest of a load. The contestants take turns in an order drawn anew each round. Times and speeds: median
[quartiles] over rounds; a speed is the reference's time by the contestant's in the same round.

How a load is cut into calls is part of the contest: one utterance a call, batches of so much padded audio (with a
mask; answers do not change), or calls side by side with a thread each. Each contestant has the way that was fastest
when tried once. "{REFERENCE}" is run as it comes: equal lengths in one batch, other lengths one by one, since it has
no mask; "reference, cut at will" has the choice, too. {MIXED}: {lengths[0]} utterances of 1 to {lengths[1]:.0f} s,
drawn evenly, {lengths[2]:.0f} s together.
"""
    if settings["device"] == "cpu" and not settings["quick"]:
        text += goals_table(record)
    for case, one in record["loads"].items():
        text += load_table(case, one["backends"], settings["device"] == "cuda")
    text += preparation(record)
    if record["ceilings"] is not None:
        text += ceilings_text(record["ceilings"])
        for model, batches in record["parts"].items():
            for load, facts in batches.items():
                text += parts_table(f"{model}, {load}", facts)
    return text


def goals_table(record: dict) -> str:
    lines = [
        "",
        "## Goals: b2, times the reference's speed",
        "",
        "| load | whose | goal | measured | by |",
        "|---|---|---|---|---|",
    ]
    for load, whose, goal in GOALS:
        case = record["loads"].get(f"b2, {load}")
        if case is None:
            continue
        ours = {name: row for name, row in case["backends"].items() if "speedup" in row and "reference" not in name}
        exact = {name: row for name, row in ours.items() if BACKENDS["cpu"][name].exact}
        groups = {"": {whose: ours[whose]}} if whose in ours else {" in float32": exact, " at any precision": ours}
        for suffix, rows in groups.items():
            name = max(rows, key=lambda name: rows[name]["speedup"]["median"])
            lines.append(f"| {load} | {whose}{suffix} | {goal} | {spread(rows[name]['speedup'])} | {name} |")
    return "\n".join(lines) + "\n"


def load_table(case: str, rows: dict, hours: bool) -> str:
    rate = "hours of audio a second" if hours else "s of audio a second"
    lines = ["", f"## {case}", "", f"| | calls | ms | {rate} | times the reference's speed | error | rounds |"]
    lines.append("|---|---|---:|---:|---:|---:|---:|")
    for name, row in rows.items():
        if "left_out" in row:
            lines.append(f"| {name} | left out: {row['left_out']} | | | | | |")
            continue
        speed = three_digits(row["audio_s_per_s"] / (3600 if hours else 1))
        note = f" ({row['note']})" if row["note"] else ""
        cells = [f"{name}{note}", row["way"], spread(row["seconds"], 1e3), speed, spread(row["speedup"])]
        cells += [f"{row['error']:.0e}" if row["error"] else "-", str(row["rounds"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def preparation(record: dict) -> str:
    """What comes before the first embedding: exports, and the slowest first call of each contestant."""
    lines = ["", "## Preparation, once", "", "| model | what | s |", "|---|---|---:|"]
    for model, exports in record["export_s"].items():
        lines += [f"| {model} | ONNX export {name} | {three_digits(seconds)} |" for name, seconds in exports.items()]
        slowest: dict[str, float] = {}
        for case in record["loads"].values():
            for name, row in case["backends"].items():
                if case["model"] == model and "left_out" not in row:
                    slowest[name] = max(slowest.get(name, 0.0), *row["first_call_s"].values())
        lines += [f"| {model} | {name}: slowest first call | {three_digits(s)} |" for name, s in slowest.items()]
    return "\n".join(lines) + "\n"


def ceilings_text(ceilings: dict) -> str:
    rates = "; ".join(f"{name} {rate:,.0f} GFLOP/s" for name, rate in ceilings["gflops"].items())
    sizes = Ceilings.from_record(ceilings).triad
    lines = [
        f"| {name} | " + " | ".join(f"{ceilings[name][size]:.0f}" for size in ceilings[name]) + " |"
        for name in ("copy", "triad")
    ]
    heads = " | ".join(f"{size / 2**20:g} MiB" for size in sizes)
    return f"""
## What bounds it

A large matrix product by the faster of BLAS and oneDNN: {rates}. Passes over memory, GB/s by the bytes they touch:

| | {heads} |
|---|{"---:|" * len(sizes)}
{chr(10).join(lines)}

Each part of the network in eager mode, float32, operation by operation as torch executes them: arithmetic; traffic,
each operation's inputs, outputs and weights counted once; the least time that the ceilings allow for these operations
(by the one that binds; the bandwidth is that for as many bytes as each operation touches), and how far above it the
part is. Fewer passes over memory would lower the bound itself.
"""


def parts_table(case: str, facts: dict) -> str:
    total = sum(part["seconds"] for part in facts["parts"].values())
    lines = ["", f"### {case}: {1e3 * facts['seconds']:.1f} ms, parts together {1e3 * total:.1f} ms", ""]
    lines.append("| part | ms | share | operations | GFLOP | MB | GFLOP/s | GB/s | least ms | binds | above |")
    lines.append("|---|" + "---:|" * 8 + "---|---:|")
    for name, part in sorted(facts["parts"].items(), key=lambda item: -item[1]["seconds"]):
        cells = [
            name,
            three_digits(1e3 * part["seconds"]),
            f"{100 * part['seconds'] / total:.0f} %",
            str(part["calls"]),
        ]
        cells += [three_digits(1e-9 * part["flop"]), three_digits(1e-6 * part["bytes"])]
        cells += [three_digits(part["gflops"]), three_digits(part["gbs"]), three_digits(1e3 * part["bound_seconds"])]
        cells += [part["binds"], f"{part['above_bound']:.1f} x" if part["above_bound"] else "-"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def plot(record: dict) -> Figure:
    """Above, speeds by load, a panel per model; below, roofline and time per part of the first model measured."""
    models = list(dict.fromkeys(case["model"] for case in record["loads"].values()))
    figure = Figure(figsize=(15, 11), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.1))
    for ax, model in zip(above.subplots(1, len(models), squeeze=False).flat, models, strict=True):
        plot_speeds(ax, model, record)
    above.axes[0].legend(fontsize=8, title="float32 unless named otherwise", title_fontsize=8)
    if record["ceilings"] is not None:
        model = "b2" if "b2" in record["parts"] else next(iter(record["parts"]))
        load, facts = list(record["parts"][model].items())[-1]
        roofs, bars = below.subplots(1, 2)
        plot_roofline(roofs, record["ceilings"], facts["parts"], f"{model}, {load}: parts under the roofs")
        plot_parts(bars, facts["parts"], f"{model}, {load}: time and bound")
    return figure


def plot_speeds(ax, model: str, record: dict):
    """Bars by load and backend, with quartiles; goals as lines."""
    cases = {case["load"]: case["backends"] for case in record["loads"].values() if case["model"] == model}
    timed = {name for rows in cases.values() for name, row in rows.items() if "speedup" in row} - {REFERENCE}
    names = [name for name in BACKENDS[record["settings"]["device"]] if name in timed]
    width = 0.85 / len(names)
    for i, name in enumerate(names):
        here = [
            (at, rows[name]["speedup"]) for at, rows in enumerate(cases.values()) if "speedup" in rows.get(name, {})
        ]
        x, values = [at + (i - (len(names) - 1) / 2) * width for at, _ in here], [value for _, value in here]
        heights = [value["median"] for value in values]
        errors = [[v["median"] - v["low"] for v in values], [v["high"] - v["median"] for v in values]]
        ax.bar(x, heights, width, yerr=errors, label=name, color=f"C{i}", error_kw={"linewidth": 0.8})
    for load, _, goal in GOALS if model == "b2" else ():
        if load in cases:
            at = list(cases).index(load)
            ax.hlines(goal, at - 0.45, at + 0.45, colors="black", linestyles=":", linewidth=1.2)
    ax.axhline(1, color="black", linewidth=0.8)
    ax.set(title=model + (" (dotted: goals)" if model == "b2" else ""), ylabel="times the reference's speed")
    ax.set_xticks(range(len(cases)), cases)
    ax.grid(axis="y", alpha=0.3)


def plot_roofline(ax, ceilings: dict, parts: dict, title: str):
    """Parts by FLOP per byte and GFLOP/s, below the roofs of products and of memory in and out of the cache."""
    roofs = Ceilings.from_record(ceilings)
    peak, rates = roofs.gflops["float32"], [roofs.bandwidth(size) for size in roofs.triad]
    for name, rate in (("in the cache", max(rates)), ("from memory", rates[-1])):
        x = [2.0**-5, peak / rate, 2.0**9]
        ax.plot(x, [min(peak, rate * at) for at in x], label=f"{name}: {rate:.0f} GB/s; {peak:.0f} GFLOP/s")
    for i, (name, part) in enumerate(sorted(parts.items(), key=lambda item: -item[1]["seconds"])):
        if part["flop"] and part["bytes"]:
            at = part["flop"] / part["bytes"], part["gflops"]
            ax.scatter(
                *at, s=20 + 900 * part["seconds"] / sum(p["seconds"] for p in parts.values()), color=f"C{i}", alpha=0.7
            )
            ax.annotate(name, at, fontsize=7, xytext=(6, -3), textcoords="offset points")
    ax.set(xscale="log", yscale="log", xlabel="FLOP per byte moved", ylabel="GFLOP/s", title=title + " (area: time)")
    ax.legend(fontsize=8)
    ax.grid(alpha=0.3, which="both")


def plot_parts(ax, parts: dict, title: str):
    """Measured and least time of each part."""
    ordered = sorted(parts.items(), key=lambda item: item[1]["seconds"])
    for height, shift, key, label in (
        (0.4, 0.2, "seconds", "measured"),
        (0.4, -0.2, "bound_seconds", "least possible"),
    ):
        ax.barh([at + shift for at in range(len(ordered))], [1e3 * p[key] for _, p in ordered], height, label=label)
    ax.set_yticks(range(len(ordered)), [f"{name} ({part['binds']})" for name, part in ordered], fontsize=8)
    ax.set(xlabel="ms", title=title)
    ax.legend(loc="lower right")
    ax.grid(axis="x", alpha=0.3)


if __name__ == "__main__":
    main()

"""What joint batches bring to many callers at once: throughput, latencies, memory, and no answer that is another's.

    python benchmarks/service_load.py --out docs/results/service_load [--models nano b2] [--parts ...]

Four ways to ask, with the same utterances of mixed lengths (noise of 1 to 6 s) and adapters (the base and four of
LoRA, linear, r=8, made here), take turns, at 1, 16 and 64 callers who ask without pause:

- "lock": each caller embeds its own utterance in a bank, which does one at a time, as before there were batches;
- "one pass at a time": `MicroBatcher` with one worker, which has all cores, in one process with the callers;
- "batches": `MicroBatcher` as it is by default, a worker for each core;
- "http": `mrl-redimnet serve`'s application in a process of its own, files uploaded, 2 % of them broken.

Beside them stand the rates of the same bank offline: sorted batches of several sizes, one after the other with all
cores and side by side with one core each, of which the fastest is the best rate, and utterances 16 at a time as they
come, divided as `MicroBatcher` divides them, side by side. The goals are ratios: throughput at 16 callers by the best
rate, and p99 at 16 callers by what 16 utterances take in the best batches (the p50 of one caller, times the share that
a batch of 16 takes of 16 times that).

Then 100,000 requests (--quick: 2,000) to a tiny network from 16 callers are compared, number by number, with the
answers alone, and the service of the first model is loaded over HTTP by 16 and by 64 callers for ten minutes each
(--quick: 5 s): every answer is compared with that alone, the service's own count of requests with that of the callers,
and its memory is read. OUT.md and OUT.json are rewritten after each part, and continued. Run it while nothing else
runs; only the first part measures times.
"""

import argparse
import http.client
import io
import json
import random
import re
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import soundfile
import torch
from adapter_costs import ADAPTERS, NO_DATA, SWAPPED, build_base, give_effect, paragraph, table_row
from memory import resident
from timing import machine
from transformers.utils.logging import disable_progress_bar

from mrl_redimnet import MRLReDimNetConfig, MRLReDimNetModel, SpeakerEncoder
from mrl_redimnet.adapters import AdapterFacts, Base, fingerprint
from mrl_redimnet.adapters.strategies import Vanilla
from mrl_redimnet.encoder import padded
from mrl_redimnet.saving import save_model
from mrl_redimnet.serving.batcher import BATCH_SECONDS, MicroBatcher, passes
from mrl_redimnet.speed.threads import side_by_side, workers_for

CALLERS = (1, 16, 64)
KINDS = 4  # adapters, beside the base
UTTERANCES = 64
SHORTEST, LONGEST = 1.0, 6.0
BATCHES = (4, 8, 16)
BAD_SHARE = 0.02
PARTS = ("rates", "values", "long")
AS_THEY_COME = "16 as they come"
AGREEMENT = 1e-3  # of the length of an embedding: how far an answer may be from that alone


@dataclass(frozen=True)
class Effort:
    """turns of every way, seconds of a turn, rounds of offline batches, requests that are checked by value, seconds of
    the long load.
    """

    turns: int = 3
    seconds: float = 20.0
    offline: int = 2
    checked: int = 100_000
    long: float = 600.0


QUICK = Effort(turns=1, seconds=3.0, offline=1, checked=2_000, long=5.0)


@dataclass(frozen=True)
class Job:
    """An utterance, [samples] and as a WAV file, and its adapter."""

    waveform: np.ndarray
    file: bytes
    adapter: str | None


def main():
    """Measures; prints and writes what is known after each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    parser.add_argument("--models", nargs="+", default=["nano", "b2"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--wait-ms", type=float, default=10.0)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--seconds", type=float, help="of each turn [20]")
    parser.add_argument("--quick", action="store_true", help="little of everything: to see that it runs")
    parser.add_argument("--serve", nargs=2, metavar=("FOLDER", "PORT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    disable_progress_bar()
    if arguments.serve:
        serve(Path(arguments.serve[0]), int(arguments.serve[1]), arguments.wait_ms)
        return
    effort = QUICK if arguments.quick else Effort()
    if arguments.seconds is not None:
        effort = replace(effort, seconds=arguments.seconds)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    record = {"commands": [], "machine": machine(), "threads": arguments.threads}
    record |= {"torch": torch.__version__, "wait_ms": arguments.wait_ms, "models": {}}
    if (before := arguments.out.with_suffix(".json")).exists():
        earlier, kept = json.loads(before.read_text()), ("commands", "models", *PARTS)
        if earlier["machine"] != record["machine"]:
            parser.error(f"{before} is of another machine ({earlier['machine']}): give another --out")
        record |= {key: value for key, value in earlier.items() if key in kept}
    if (command := shlex.join(["python", *sys.argv])) not in record["commands"]:
        record["commands"].append(command)

    def write():
        arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        arguments.out.with_suffix(".md").write_text(report(record))

    for model in arguments.models if "rates" in arguments.parts else ():
        with tempfile.TemporaryDirectory() as folder:
            save_all(model, Path(folder))
            record["models"][model] = measured(Path(folder), effort, arguments)
        write()
        print(f"{model}: measured", flush=True)
    if "values" in arguments.parts:
        with tempfile.TemporaryDirectory() as folder:
            save_all("tiny", Path(folder))
            record["values"] = by_value(load(Path(folder)), effort.checked)
        write()
        print("compared by value", flush=True)
    if "long" in arguments.parts:
        with tempfile.TemporaryDirectory() as folder:
            save_all(arguments.models[0], Path(folder))
            record["long"] = long_load(Path(folder), effort.long, arguments)
        write()
    print(report(record))


# ----------------------------------------------------------------------------------------------------------------------
# What is asked


def base_of(model: str):
    """A network with random weights, or the packaged one; "tiny" is for answers, not for times."""
    if model == "nano":
        return SpeakerEncoder.from_pretrained("nano", device="cpu").model.base_model
    if model != "tiny":
        return build_base(model)
    torch.manual_seed(0)
    stages = [
        {"frequency_stride": stride, "blocks": 1, "expansion": 1, "reduction": 8, "time_stride": 1} for stride in (2, 2)
    ]
    config = MRLReDimNetConfig(
        base_channels=8, stages=stages, num_mel_bins=24, embedding_size=32, matryoshka_dims=[16, 32]
    )
    return MRLReDimNetModel(config).eval()


def save_all(model: str, folder: Path):
    """The base and its adapters, below `folder`."""
    base = base_of(model)
    facts = AdapterFacts("noise", Base(model, None, fingerprint(base)))
    save_model(base, folder / "base")
    for seed in range(KINDS):
        strategy = Vanilla(base_of(model), ADAPTERS[SWAPPED], NO_DATA)
        give_effect(strategy, seed)
        strategy.save(folder / f"a{seed}")
        facts.save(folder / f"a{seed}")


def load(folder: Path) -> SpeakerEncoder:
    """What `save_all` wrote."""
    encoder = SpeakerEncoder.from_pretrained(folder / "base", device="cpu")
    for number in range(KINDS):
        encoder.adapters.add(f"a{number}", folder / f"a{number}")
    return encoder


def jobs(seconds: tuple[float, float] = (SHORTEST, LONGEST)) -> list[Job]:
    """Noise of drawn lengths, with drawn adapters."""
    rng = np.random.default_rng(0)
    found = []
    for number in range(UTTERANCES):
        samples = round(rng.uniform(*seconds) * 16_000)
        wave = (0.1 * rng.standard_normal(samples)).astype(np.float32)
        file = io.BytesIO()
        soundfile.write(file, wave, 16_000, format="WAV", subtype="FLOAT")
        found.append(Job(wave, file.getvalue(), None if number % (KINDS + 1) == 0 else f"a{number % KINDS}"))
    return found


# ----------------------------------------------------------------------------------------------------------------------
# Rates and latencies


def measured(folder: Path, effort: Effort, arguments: argparse.Namespace) -> dict:
    """Every way, in turns."""
    encoder, asked = load(folder), jobs()
    workers = workers_for(encoder.device)
    sets = {f"batches of {size}": sorted_batches(asked, size) for size in BATCHES}
    divided = {AS_THEY_COME: rounds(asked, encoder, workers)}
    offline: dict[str, list[float]] = {}
    latencies: dict[tuple[str, int], list[float]] = {}
    rates: dict[tuple[str, int], list[float]] = {}
    memory: list[float] = []

    def lock(job: Job):
        encoder.adapters.embed(torch.from_numpy(job.waveform)[None], adapter=job.adapter)

    with (
        MicroBatcher(encoder, wait_ms=arguments.wait_ms, workers=1) as alone,
        MicroBatcher(encoder, wait_ms=arguments.wait_ms) as batcher,
        Server(folder, arguments) as server,
    ):
        ways: dict[str, Callable[[Job], object]] = {
            "lock": lock,
            "one pass at a time": lambda job: alone.embed(job.waveform, job.adapter),
            "batches": lambda job: batcher.embed(job.waveform, job.adapter),
            "http": server.embed,
        }
        for way in ways.values():
            way(asked[0])
        for _ in range(effort.turns):
            for how, count, found in (("", 1, sets), (", side by side", workers, sets), ("", workers, divided)):
                for name, batches in found.items():
                    rates_of = offline.setdefault(name + how, [])
                    rates_of += [offline_rate(encoder, batches, count) for _ in range(effort.offline)]
            for name, way in ways.items():
                for callers in CALLERS:
                    times, rate = together(way, asked, callers, effort.seconds)
                    latencies.setdefault((name, callers), []).extend(times)
                    rates.setdefault((name, callers), []).append(rate)
                    if name == "http":
                        memory.append(server.memory())
        bad = dict(server.statuses)
    return {
        "offline_per_second": {size: float(np.median(found)) for size, found in offline.items()},
        "ways": {
            name: {
                str(callers): {
                    "per_second": float(np.median(rates[name, callers])),
                    "per_second_range": [min(rates[name, callers]), max(rates[name, callers])],
                    "p50_ms": 1000 * float(np.quantile(latencies[name, callers], 0.5)),
                    "p99_ms": 1000 * float(np.quantile(latencies[name, callers], 0.99)),
                    "calls": len(latencies[name, callers]),
                }
                for callers in CALLERS
            }
            for name in ways
        },
        "http_statuses": {str(status): count for status, count in sorted(bad.items())},
        "http_memory_mib": memory,
    }


def sorted_batches(asked: list[Job], size: int) -> list[list[Job]]:
    """Of like lengths."""
    ordered = sorted(asked, key=lambda job: -len(job.waveform))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def rounds(asked: list[Job], encoder: SpeakerEncoder, workers: int) -> list[list[Job]]:
    """Sixteen at a time in a drawn order, each divided as the service does it."""
    drawn, found = random.Random(1).sample(asked, len(asked)), []
    for start in range(0, len(drawn), 16):
        some = drawn[start : start + 16]
        window = int(encoder.config.window_seconds * 16_000)
        for rows in passes([len(job.waveform) for job in some], round(BATCH_SECONDS * 16_000), window, 16 // workers):
            found.append([some[row] for row in rows])
    return found


def offline_rate(encoder: SpeakerEncoder, batches: list[list[Job]], workers: int) -> float:
    """Utterances a second, with so many batches at once."""

    def embed(batch: list[Job]):
        lengths = torch.tensor([len(job.waveform) for job in batch])
        encoder.embed_padded(padded(job.waveform for job in batch), lengths, [job.adapter for job in batch])

    began = time.perf_counter()
    for _ in side_by_side(embed, batches, workers):
        pass
    return sum(map(len, batches)) / (time.perf_counter() - began)


def together(way: Callable, asked: list[Job], callers: int, seconds: float) -> tuple[list[float], float]:
    """Seconds of every call of so many threads that ask without pause, and calls a second."""
    found: list[float] = []
    start = threading.Barrier(callers)

    def work(number: int):
        rng = random.Random(number)
        start.wait()
        end = time.perf_counter() + seconds
        while (began := time.perf_counter()) < end:
            way(rng.choice(asked))
            found.append(time.perf_counter() - began)

    began = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        for done in [pool.submit(work, number) for number in range(callers)]:
            done.result()
    return found, len(found) / (time.perf_counter() - began)


# ----------------------------------------------------------------------------------------------------------------------
# Over HTTP


def serve(folder: Path, port: int, wait_ms: float):
    """The service, in a process of its own."""
    import uvicorn

    from mrl_redimnet.serving.app import create_app
    from mrl_redimnet.serving.service import Service

    encoder = load(folder)
    service = Service(encoder, batcher=MicroBatcher(encoder, wait_ms=wait_ms))
    uvicorn.run(create_app(service), port=port, log_level="error", access_log=False)


class Server:
    """That process, and clients of it: a connection for each thread."""

    def __init__(self, folder: Path, arguments: argparse.Namespace):
        self.port = 8765
        command = [sys.executable, __file__, "--out", "-", "--serve", str(folder), str(self.port)]
        command += ["--threads", str(arguments.threads), "--wait-ms", str(arguments.wait_ms)]
        self.process = subprocess.Popen(command)
        self.local, self.rng, self.statuses = threading.local(), random.Random(0), {}
        self.lock = threading.Lock()

    def __enter__(self):
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port)
                connection.request("GET", "/ready")
                if connection.getresponse().status == 200:
                    return self
            except OSError:
                if self.process.poll() is not None:
                    raise RuntimeError("The service did not start.") from None
                time.sleep(0.2)

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait()

    def embed(self, job: Job) -> list[float] | None:
        """Uploads a file; gets its embedding, or None for one that is broken, as now and then one is."""
        if not hasattr(self.local, "connection"):
            self.local.connection = http.client.HTTPConnection("127.0.0.1", self.port)
        with self.lock:
            broken = self.rng.random() < BAD_SHARE
        body = job.file[: len(job.file) // 2].replace(b"RIFF", b"JUNK") if broken else job.file
        path = f"/embed?adapter={job.adapter or 'none'}"
        self.local.connection.request("POST", path, body, {"Content-Type": "audio/wav"})
        answer = self.local.connection.getresponse()
        text = answer.read()
        if answer.status != (422 if broken else 200):
            raise RuntimeError(f"The service answered {answer.status}.")
        with self.lock:
            self.statuses[answer.status] = self.statuses.get(answer.status, 0) + 1
        return None if broken else json.loads(text)["embeddings"][0]["embedding"]

    def answered(self) -> dict[str, int]:
        """How many uploads the service itself counts, by status."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        connection.request("GET", "/metrics")
        text = connection.getresponse().read().decode()
        found: dict[str, int] = {}
        for status, count in re.findall(r'requests_total\{[^}]*route="/embed"[^}]*status="(\d+)"[^}]*\} (\S+)', text):
            found[status] = found.get(status, 0) + round(float(count))
        return found

    def memory(self) -> float:
        """MiB of the process."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * 4096 / 2**20


# ----------------------------------------------------------------------------------------------------------------------
# By value


def by_value(encoder: SpeakerEncoder, count: int) -> dict:
    """Asks `count` times, from 16 callers, and compares every answer with that alone. RuntimeError for a wrong one."""
    asked, alone = jobs((0.1, 0.4)), []
    for job in asked:
        wave, lengths = torch.from_numpy(job.waveform)[None], torch.tensor([len(job.waveform)])
        alone.append(encoder.embed_padded(wave, lengths, [job.adapter])[0])
    alone = np.stack(alone)
    nearest = min(float(np.linalg.norm(a - b) / np.linalg.norm(a)) for i, a in enumerate(alone) for b in alone[i + 1 :])
    passes, worst, began = [], [], time.perf_counter()
    before = resident()

    def work(number: int):
        rng = random.Random(number)
        for _ in range(count // 16):
            index = rng.randrange(len(asked))
            answer = batcher.embed(asked[index].waveform, asked[index].adapter)
            error = float(np.linalg.norm(answer.numbers - alone[index]) / np.linalg.norm(alone[index]))
            if not error <= AGREEMENT or answer.weights != encoder.weights(asked[index].adapter):
                raise RuntimeError(f"An answer is not that to the request: relative error {error:.1e}.")
            worst.append(error)

    with MicroBatcher(encoder, on_pass=lambda one: passes.append(one.rows)) as batcher:
        with ThreadPoolExecutor(16) as pool:
            for done in [pool.submit(work, number) for number in range(16)]:
                done.result()
    if len(worst) != count // 16 * 16:
        raise RuntimeError(f"Of {count} requests {len(worst)} were answered rightly.")
    return {
        "requests": len(worst),
        "worst_relative_error": max(worst),
        "nearest_other_answer": nearest,
        "rows_in_a_pass": float(np.mean(passes)),
        "grown_mib": (resident() - before) / 2**20,
        "seconds": time.perf_counter() - began,
    }


def long_load(folder: Path, seconds: float, arguments: argparse.Namespace) -> list[dict]:
    """The service under 16 and under 64 callers. RuntimeError for an answer that is wrong, lost, or given twice."""
    asked, encoder, found = jobs(), load(folder), []
    alone = []
    for job in asked:
        wave, lengths = torch.from_numpy(job.waveform)[None], torch.tensor([len(job.waveform)])
        alone.append(encoder.embed_padded(wave, lengths, [job.adapter])[0])
    expected = {id(job): numbers / np.linalg.norm(numbers) for job, numbers in zip(asked, alone, strict=True)}
    worst: list[float] = []

    def checked(job: Job):
        answer = server.embed(job)
        if answer is not None:
            given = np.array(answer)
            worst.append(float(np.linalg.norm(given / np.linalg.norm(given) - expected[id(job)])))

    with Server(folder, arguments) as server:
        for callers in CALLERS[1:]:
            memory, ended = [], threading.Event()

            def watch(memory=memory, ended=ended):
                while not ended.wait(min(10.0, seconds / 5)):
                    memory.append(server.memory())

            watcher = threading.Thread(target=watch)
            watcher.start()
            try:
                times, rate = together(checked, asked, callers, seconds)
            finally:
                ended.set()
                watcher.join()
            found.append({"callers": callers, "requests": len(times), "per_second": rate, "memory_mib": memory})
        own = {str(status): count for status, count in server.statuses.items()}
        if server.answered() != own or sum(own.values()) != sum(part["requests"] for part in found):
            raise RuntimeError(f"The callers count {own}, the service {server.answered()}.")
    if len(worst) != own["200"] or not max(worst) <= AGREEMENT:
        raise RuntimeError(f"An answer is not that to the request: {max(worst):.1e} of its length away.")
    return [{**part, "statuses": own, "worst": max(worst)} for part in found]


# ----------------------------------------------------------------------------------------------------------------------
# Report


def report(record: dict) -> str:
    """Markdown."""
    text = ["# Many callers at once", "", "```bash", *record["commands"], "```", ""]
    text.append(
        paragraph(
            f"{record['machine']}, threads: {record['threads']}, torch {record['torch']}, float32, an idle network "
            f"waits {record['wait_ms']:g} ms. Noise of {SHORTEST:g} to {LONGEST:g} s, the base and {KINDS} adapters "
            f"({SWAPPED}) mixed. Every caller asks without pause. The callers of `http` run on the same cores as the "
            f"service; {100 * BAD_SHARE:g} % of their files are broken."
        )
    )
    for model, found in record["models"].items():
        text += ["", *model_report(model, found)]
    if "values" in record:
        value = record["values"]
        text += [
            "",
            "## No answer is another's",
            "",
            paragraph(
                f"{value['requests']:,} requests from 16 callers to a tiny network, in passes of "
                f"{value['rows_in_a_pass']:.1f} rows: the worst answer is {value['worst_relative_error']:.1e} of its "
                f"length away from that alone; the nearest answer to another request is "
                f"{value['nearest_other_answer']:.1e} away. The process grew by {value['grown_mib']:.0f} MiB."
            ),
        ]
    if "long" in record:
        text += ["", "## A long load over HTTP, of the first network", ""]
        columns = ["callers", "requests", "memory, MiB: after a tenth", "after half", "at last", "most"]
        text += [table_row(columns), table_row(["---"] * len(columns))]
        for part in record["long"]:
            memory = part["memory_mib"]
            points = [memory[len(memory) // 10], memory[len(memory) // 2], memory[-1], max(memory)]
            text.append(
                table_row(
                    [str(part["callers"]), f"{part['requests']:,}", *(f"{point:,.0f}" for point in points)],
                )
            )
        counts = ", ".join(f"{count:,} answered {status}" for status, count in sorted(part["statuses"].items()))
        text += [
            "",
            paragraph(
                f"In all {counts}, as the callers count them and as the service does; the worst embedding is "
                f"{part['worst']:.1e} of its length away from that alone."
            ),
        ]
    return "\n".join(text) + "\n"


def model_report(model: str, found: dict) -> list[str]:
    """A table, the goals, memory."""
    offline = found["offline_per_second"]
    best, same = max(offline.values()), offline[AS_THEY_COME]
    columns = ["", "callers", "utterances a second", "by the best offline rate", "p50, ms", "p99, ms", "calls"]
    text = [f"## {model}", "", table_row(columns), table_row(["---"] * len(columns))]
    for size, rate in offline.items():
        text.append(
            table_row(
                [
                    f"offline, {size}",
                    "",
                    f"{rate:.1f}",
                    f"{rate / best:.2f}",
                    "",
                    "",
                    "",
                ]
            )
        )
    for way, counts in found["ways"].items():
        for callers, row in counts.items():
            low, high = row["per_second_range"]
            cells = [f"{row['per_second']:.1f} [{low:.1f}, {high:.1f}]", f"{row['per_second'] / best:.2f}"]
            cells += [f"{row['p50_ms']:.0f}", f"{row['p99_ms']:.0f}", str(row["calls"])]
            text.append(table_row([way, callers, *cells]))
    goals = []
    for way in ("lock", "one pass at a time", "batches", "http"):
        counts = found["ways"][way]
        ratio = counts["16"]["p99_ms"] / (16 * 1000 / best)
        goals.append(
            f"{way}: {counts['16']['per_second'] / best:.2f} of the best offline rate, "
            f"{counts['16']['per_second'] / same:.2f} of that as they come, p99 {ratio:.2f} times what 16 utterances "
            "take in the best batches"
        )
    statuses = ", ".join(f"{count:,} answered {status}" for status, count in found["http_statuses"].items())
    first, last = found["http_memory_mib"][0], found["http_memory_mib"][-1]
    return [
        *text,
        "",
        paragraph(f"At 16 callers: {'; '.join(goals)}. Goals: at least 0.9 of the best, at most 3."),
        "",
        paragraph(f"Over HTTP: {statuses}. Memory of the service: {first:.0f} MiB at first, {last:.0f} MiB at last."),
    ]


if __name__ == "__main__":
    main()

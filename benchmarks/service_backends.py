"""The same client against the single process, the PostgreSQL store, and Ray Serve: the same answers, and how fast.

    python benchmarks/service_backends.py nano --recordings FOLDER --postgres postgresql://... --out docs/results/NAME

FOLDER holds a folder of audio for each speaker. `examples/service_client.py` enrols the first utterance of everybody,
identifies and verifies the second, embeds at 64 dimensions, forgets everybody, and is then told that nobody is
enrolled. All answers of the services are compared with those of the first. Then some callers upload the utterances as
fast as they are answered. The database should be empty.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from adapter_costs import paragraph, table_row
from timing import machine

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from service_client import ServiceError, SpeakerService

PORT = 8790


def main():
    """Parses the command line, asks every service, writes the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--recordings", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--postgres", required=True, metavar="ADDRESS")
    parser.add_argument("--speakers", type=int, default=12)
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--calls", type=int, default=160)
    parser.add_argument("--out", type=Path, required=True, help="without suffix")
    arguments = parser.parse_args()
    speakers = {
        folder.name: sorted(file for file in folder.rglob("*") if file.is_file())[:2]
        for folder in sorted(arguments.recordings.iterdir())[: arguments.speakers]
    }
    rows, first = [], None
    with tempfile.TemporaryDirectory() as folder:
        command, ray = [sys.executable, "-m", "mrl_redimnet_cli", "serve"], "examples/serve_with_ray.py"
        ways = {
            "one process, SQLite": [*command, arguments.model, "--store", f"{folder}/speakers.db"],
            "one process, PostgreSQL": [*command, arguments.model, "--store", arguments.postgres],
            "Ray Serve, two replicas, PostgreSQL": [
                sys.executable, ray, arguments.model, "--store", arguments.postgres, "--replicas", "2"
            ],
        }  # fmt: skip
        for name, line in ways.items():
            with Running([*line, "--port", str(PORT)]) as service:
                answers = asked(service, speakers)
                first = first or answers
                worst = difference(first, answers)
                rate, p99 = loaded(service, speakers, arguments.callers, arguments.calls)
            rows.append([name, f"{len(answers)}", f"{worst:.1e}", f"{rate:.1f}", f"{1000 * p99:.0f}"])
            print(rows[-1], flush=True)
    head = ["service", "answers", "furthest from the first's", "utterances a second", "p99, ms"]
    text = "\n".join(table_row(cells) for cells in [head, ["---"] * len(head), *rows])
    about = paragraph(
        f"{machine()}; {len(speakers)} speakers of one enrolled utterance, {arguments.callers} callers and "
        f"{arguments.calls} calls. Services, callers and database share the cores. Times of one run."
    )
    page = f"# One client, three services\n\n```bash\n{shlex.join(['python', *sys.argv])}\n```\n\n{about}\n\n{text}\n"
    arguments.out.with_suffix(".md").write_text(page)


class Running:
    """A service in a process of its own, ready for requests."""

    def __init__(self, line: list[str]):
        self.log = tempfile.NamedTemporaryFile(suffix=".log")
        self.process = subprocess.Popen(line, stdout=self.log, stderr=subprocess.STDOUT)

    def __enter__(self) -> SpeakerService:
        service = SpeakerService(f"http://127.0.0.1:{PORT}")
        while True:
            try:
                service.ask("GET", "/ready")
                return service
            except (OSError, ServiceError, json.JSONDecodeError):
                if self.process.poll() is not None:
                    raise RuntimeError(Path(self.log.name).read_text()) from None
                time.sleep(0.5)

    def __exit__(self, *error):
        self.process.terminate()
        self.process.wait()


def asked(service: SpeakerService, speakers: dict[str, list[Path]]) -> list[dict]:
    """The answers to everything that a client asks. RuntimeError where somebody who is forgotten is found."""
    answers = [service.enrol(name, files[:1], consent="form 17") for name, files in speakers.items()]
    for name, files in speakers.items():
        answers += [service.identify(files[1]), service.verify(files[1], speaker=name), service.embed(files, dim=64)]
    answers += [service.forget(name) for name in speakers]
    try:
        service.identify(next(iter(speakers.values()))[1])
    except ServiceError as error:
        return [*answers, {"code": error.code}]
    raise RuntimeError("Everybody was forgotten, and somebody was identified.")


def leaves(answer: object) -> list:
    """The values in an answer, in its order, without times."""
    if isinstance(answer, dict):
        kept = [value for key, value in answer.items() if key not in ("created", "updated")]
        return [*answer, *(leaf for value in kept for leaf in leaves(value))]
    if isinstance(answer, list):
        return [leaf for value in answer for leaf in leaves(value)]
    return [answer]


def difference(first: list[dict], answers: list[dict]) -> float:
    """The largest difference of two fractions in the same place. RuntimeError where answers differ otherwise."""
    worst = 0.0
    for one, other in zip(leaves(first), leaves(answers), strict=True):
        if isinstance(one, float):
            worst = max(worst, abs(one - other))
        elif one != other:
            raise RuntimeError(f"Other answers: {one} and {other}.")
    return worst


def loaded(service: SpeakerService, speakers: dict, callers: int, calls: int) -> tuple[float, float]:
    """Utterances a second, and the 99 % quantile of seconds until an answer."""
    files = [file for both in speakers.values() for file in both]
    took, lock = [], threading.Lock()

    def ask(file: Path):
        began = time.perf_counter()
        service.embed([file])
        with lock:
            took.append(time.perf_counter() - began)

    began = time.perf_counter()
    with ThreadPoolExecutor(callers) as pool:
        for done in [pool.submit(ask, file) for file in islice(cycle(files), calls)]:
            done.result()
    return calls / (time.perf_counter() - began), float(np.quantile(took, 0.99))


if __name__ == "__main__":
    main()

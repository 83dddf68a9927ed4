"""What an installation costs, with and without extras: seconds, disk, and the time until a command answers.

    python benchmarks/install_cost.py docs/results/install

The wheel of this checkout is built and installed into a new environment, everything downloaded anew; commands are then
timed in it. Service and page are started as well, the first time right after the installation. Needs `make
.tools/bin/uv` first. Writes install.json, and the first part of install.md.
"""

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import tempfile
import time
import urllib.request
from pathlib import Path

from timing import machine

ROOT = Path(__file__).resolve().parents[1]
UV = ROOT / ".tools" / "bin" / "uv"
ALONE = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
# What `verify` needs of other libraries in any case.
BASE = (
    "from transformers import AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification, "
    "AutoModelForAudioXVector, PreTrainedModel, PretrainedConfig, SequenceFeatureExtractor"
)
CALLS = {
    "`mrl-redimnet --help`": ["-c", "from mrl_redimnet_cli import main; main(['--help'])"],
    "a misspelt path": [
        "-c",
        "from mrl_redimnet_cli import main; exit(main(['verify', 'nowhere', 'a', '--test', 'b']))",
    ],
    "import torch": ["-c", "import torch"],
    "torch, and transformers' base and auto classes": ["-c", BASE],
    "what `verify` imports": ["-c", "import mrl_redimnet"],
    "the README's first example": ["-c", re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[0]],
}
FAILS = {"a misspelt path": 2}  # exit status of calls that are to fail
INSTALLS = {"mrl-redimnet": "", "mrl-redimnet[all]": "[all]", "mrl-redimnet[demo]": "[demo]"}
# By the installation that has them: a command that serves, and what it is asked.
SERVERS = {"mrl-redimnet[all]": (["serve", "nano"], "/ready"), "mrl-redimnet[demo]": (["demo"], "/")}
PORT = 8123
REST = "\n## Both ends of the ranges\n"  # where the part of the page begins that other commands made


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="path of the results without suffix")
    parser.add_argument("--python", default="3.11")
    parser.add_argument("--repeats", type=int, default=7, help="of each call, after one that is not counted")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run(UV, "build", "--quiet", "--wheel", "--out-dir", folder, ROOT)
        (wheel,) = Path(folder).glob("*.whl")
        records = {
            name: measure(name, Path(folder) / f"env{i}", f"{wheel}{extras}", arguments)
            for i, (name, extras) in enumerate(INSTALLS.items())
        }
    report = {"machine": machine(), "python": arguments.python, "installs": records}
    arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    page = arguments.out.with_suffix(".md")
    rest = page.read_text().partition(REST)[2] if page.exists() else ""
    page.write_text(table(report) + (f"{REST}{rest}" if rest else ""))
    print(table(report))


def measure(name: str, environment: Path, requirement: str, arguments) -> dict:
    """Installs without a cache, then times the calls."""
    run(UV, "venv", "--quiet", "--python", arguments.python, environment)
    start = time.perf_counter()
    run(UV, "pip", "install", "--quiet", "--no-cache", "--python", environment, requirement)
    seconds = time.perf_counter() - start
    (packages,) = environment.glob("lib/python*/site-packages")
    sizes = {entry.name: size_of(entry) for entry in packages.iterdir()}
    torch = sum(size for name, size in sizes.items() if name.startswith(("torch", "nvidia", "triton", "cuda")))
    listed = run(UV, "pip", "list", "--quiet", "--python", environment, "--format", "json")
    python = environment / "bin" / "python"
    starts = [started(environment, *SERVERS[name]) for _ in range(4)] if name in SERVERS else []
    return {
        "starts": starts,
        "seconds": seconds,
        "packages": len(json.loads(listed)),
        "bytes": sum(sizes.values()),
        "bytes_of_torch": torch,
        "calls": {name: timed(python, call, FAILS.get(name, 0), arguments.repeats) for name, call in CALLS.items()},
    }


def timed(python: Path, call: list[str], status: int, repeats: int) -> dict[str, float]:
    """Median and extremes of the seconds of a process; the first, which fills caches, is not counted."""
    times = []
    for _ in range(repeats + 1):
        with tempfile.TemporaryDirectory() as folder:  # what a call writes is not the next one's
            start = time.perf_counter()
            done = subprocess.run([python, *call], capture_output=True, text=True, cwd=folder, env=ALONE)
            times.append(time.perf_counter() - start)
        if done.returncode != status:
            raise RuntimeError(f"{call[1]} ended with {done.returncode}: {done.stderr}")
    return {"median": statistics.median(times[1:]), "low": min(times[1:]), "high": max(times[1:])}


def started(environment: Path, command: list[str], path: str) -> float:
    """Seconds from a command to its first answer."""
    url, begun = f"http://127.0.0.1:{PORT}{path}", time.perf_counter()
    server = subprocess.Popen(
        [environment / "bin" / "mrl-redimnet", *command, "--port", str(PORT)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=ALONE,
    )  # fmt: skip
    try:
        while server.poll() is None:
            try:
                with urllib.request.urlopen(url):
                    return time.perf_counter() - begun
            except OSError:  # not listening, or not ready
                time.sleep(0.05)
        raise RuntimeError(f"{shlex.join(command)} ended with {server.returncode} before it answered.")
    finally:
        server.terminate()
        server.wait()


def size_of(path: Path) -> int:
    return sum(file.lstat().st_size for file in [path, *path.rglob("*")] if file.is_file() and not file.is_symlink())


def run(*command) -> str:
    return subprocess.run([str(part) for part in command], check=True, stdout=subprocess.PIPE, text=True).stdout


def table(report: dict) -> str:
    installs = report["installs"]
    lines = [
        "# Installation",
        "",
        f"{report['machine']}, Python {report['python']}. Seconds of an installation with every download, by uv; "
        "seconds of a process from start to end: median [lowest, highest].",
        "",
        "| | " + " | ".join(f"`{name}`" for name in installs) + " |",
        "|---" * (1 + len(installs)) + "|",
    ]
    rows = {
        "packages": lambda each: str(each["packages"]),
        "GB on disk": lambda each: f"{each['bytes'] / 1e9:.2f}",
        "of these torch with its CUDA libraries": lambda each: f"{each['bytes_of_torch'] / 1e9:.2f}",
        "seconds to install": lambda each: f"{each['seconds']:.0f}",
    }
    for name, cell in rows.items():
        lines.append(f"| {name} | " + " | ".join(map(cell, installs.values())) + " |")
    for name in CALLS:
        cells = [each["calls"][name] for each in installs.values()]
        shown = [f"{cell['median']:.2f} [{cell['low']:.2f}, {cell['high']:.2f}]" for cell in cells]
        lines.append(f"| {name}, s | " + " | ".join(shown) + " |")
    for name, (command, path) in SERVERS.items():
        first, *others = installs[name]["starts"]
        shown = f"{statistics.median(others):.1f} [{min(others):.1f}, {max(others):.1f}], the first time {first:.1f}"
        cells = [shown if install == name else "" for install in installs]
        lines.append(f"| `mrl-redimnet {shlex.join(command)}` until `{path}` answers, s | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

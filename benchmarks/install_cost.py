"""What an installation costs, with and without extras: seconds, disk, and the time until a command answers.

    python benchmarks/install_cost.py docs/results/install

The wheel of this checkout is built and installed into a new environment, everything downloaded anew; commands are then
timed in it. Needs `make .tools/bin/uv` first. Writes install.json and install.md.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
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
    "the README's first example": ["-c", re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)[1]],
}
FAILS = {"a misspelt path": 2}  # exit status of calls that are to fail


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
            name: measure(Path(folder) / f"env{i}", f"{wheel}{extras}", arguments)
            for i, (name, extras) in enumerate({"mrl-redimnet": "", "mrl-redimnet[all]": "[all]"}.items())
        }
    report = {"machine": machine(), "python": arguments.python, "installs": records}
    arguments.out.with_suffix(".json").write_text(json.dumps(report, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(table(report))
    print(table(report))


def measure(environment: Path, requirement: str, arguments) -> dict:
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
    return {
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
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()

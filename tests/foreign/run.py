"""Runs other libraries' own test suites on this project, and the documents' lines in environments of their own, and
writes docs/results/foreign.md: `make test-foreign`.

transformers' tests come from the source distribution of the version that is installed, by pip, into build/foreign.
PEFT's are in no distribution: PEFT_CHECKOUT names a checkout of its repository; without it they are left out. The
documents' lines are those of doors_suite.py; uv makes their environments in build/foreign, once, and node's packages
come from npm.
Fails when a test fails or is skipped for a reason that reasons.yaml does not list, or when a listed one passes.
"""

import argparse
import os
import platform
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

from bookkeeping import (
    OUTCOMES,
    Reason,
    Result,
    counts,
    doors_table,
    judge,
    read_reasons,
    read_results,
    reasons_table,
)

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "foreign"
PACKAGES = CACHE / "packages"

SUITES = {
    "transformers": {
        "TestNano": "`ModelTesterMixin`, three model classes, nano",
        "TestReDimNet2Nano": "`ModelTesterMixin`, three model classes, redimnet2-nano",
        "TestFeatureExtractor": "`SequenceFeatureExtractionTestMixin` with `FeatureExtractionSavingTestMixin`",
        "TestConfig": "`ConfigTester`",
    },
    "peft": {
        "TestCustomModel": "PEFT's tests of custom models, a small network with LoRA, DoRA, AdaLoRA and IA3",
        "TestCommon": "More of `PeftCommonTester`, the same adapters",
    },
}

DOORS = "doors"
# What the tests of transformers import from files that its source distribution lacks.
STAND_INS = {
    "__init__.py": "",
    "exporters/__init__.py": "",
    "exporters/test_export.py": "class ExportTesterMixin:\n    pass\n",
    "generation/__init__.py": "",
    "generation/test_utils.py": "class GenerationTesterMixin:\n    pass\n",
    "utils/__init__.py": "",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}


def fetch_transformers(pip: list[str]) -> Path:
    """The unpacked source distribution of the installed version, with stand-ins for what it lacks."""
    name = f"transformers-{version('transformers')}"
    folder = CACHE / name
    if not folder.exists():
        requirement = name.replace("-", "==")
        downloads = ["download", "--quiet", "--no-deps", "--no-binary", "transformers", "--dest", str(CACHE)]
        subprocess.run([*pip, *downloads, requirement], check=True)
        with tarfile.open(CACHE / f"{name}.tar.gz") as archive:
            archive.extractall(CACHE, filter="data")
    for file, text in STAND_INS.items():
        if not (path := folder / "tests" / file).exists():
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
    return folder


def fetch_packages(pip: list[str]):
    """What the tests import and this project does not."""
    if not (PACKAGES / "parameterized").exists():
        subprocess.run(
            [*pip, "install", "--quiet", "--no-deps", "--target", str(PACKAGES), "parameterized"], check=True
        )
    # PEFT's common tests name one class of it, for tests of image models, which are not run.
    (PACKAGES / "diffusers.py").write_text("class StableDiffusionPipeline:\n    pass\n")


def results_file(library: str) -> Path:
    """Where pytest writes what a library's suites gave."""
    return CACHE / f"{library}.xml"


def run(library: str, folder: Path | None, uv: str):
    """Runs a library's suites; `folder` holds its package `tests`, None for the doors, which have none. uv: as named
    on the command line."""
    junit = results_file(library)
    junit.unlink(missing_ok=True)
    paths = os.pathsep.join(str(path) for path in (folder, PACKAGES)) if folder else ""
    # The suites have markers of their own. A process of pytest ends with 1 when tests failed.
    options = ["-p", "no:cacheprovider", "-o", "strict_markers=false", "-o", "junit_family=xunit1", "--quiet"]
    options += ["--junitxml", str(junit)]
    options.append("--tb=no" if folder else "--tb=short")  # of the doors every failure is news
    command = [sys.executable, "-m", "pytest", *options, str(HERE / f"{library}_suite.py")]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths, "RUN_SLOW": "1", "UV": uv})
    if done.returncode not in (0, 1) or not junit.exists():
        sys.exit(f"{library}: its tests could not be run, see above.")


def commit(checkout: Path) -> str:
    """Where a checkout stands, for people."""
    command = ["git", "-C", str(checkout), "log", "-1", "--format=commit %h of %cs"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stdout.strip() or "an unknown commit"


DOORS_TEXT = """## The documents' lines

The lines that stand in the documents, each in a process of its own and an environment with nothing installed but what
is named and what that needs; this package is there only where it is named (as its wheel). Versions are those of
requirements.lock, of the packages that it has; diart's are the newest that can be imported together. Models and
adapters are the packaged `nano` and `nano-children`, which come from a Hub on this machine where a line names one; the
recordings are those in the package. Furthest from ours: the largest distance of an embedding from that of
`SpeakerEncoder`, relative to its length, or of a score; in brackets what is allowed. "Four digits": the line prints no
more of a number.
"""


def page(results: dict[str, list[Result]], reasons: dict[str, list[Reason]], checkout: Path | None) -> str:
    """docs/results/foreign.md."""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))
    lines = [
        "# Other libraries' test suites on this project",
        "",
        "```bash",
        "PEFT_CHECKOUT=/path/to/peft make test-foreign",
        "```",
        "",
        f"Python {platform.python_version()}, {versions}, on the CPU, slow tests included. transformers' tests are",
        "those of its source distribution of the same version. This page is written by the command. The reasons stand",
        "in `tests/foreign/reasons.yaml`; a failure or a skip that they do not name makes the command fail. A test of",
        "which one part was skipped, such as one of three model classes, counts as skipped.",
        "",
        "| suite | collected | passed | failed | skipped | failures that are ours |",
        "|---|---|---|---|---|---|",
    ]
    doors = results.get(DOORS, [])
    results = {library: found for library, found in results.items() if library != DOORS}
    for library, found in results.items():
        for suite, title in SUITES[library].items():
            row = counts(found, suite)
            ours = sum(
                result.suite == suite
                for reason in reasons[library]
                if reason.outcome == "failed" and reason.whose == "ours"
                for result in reason.results
            )
            lines.append("| " + " | ".join(str(each) for each in (title, *row.values(), ours)) + " |")
    lines.append("")
    if checkout is None:
        lines += ["PEFT's tests were left out: `PEFT_CHECKOUT` did not name a checkout of its repository.", ""]
    else:
        lines += [f"PEFT's tests are those of {commit(checkout)} of its repository; its package has none.", ""]
    for library in results:
        for outcome in OUTCOMES[1:]:
            lines += [f"## {library}: {outcome}", "", *reasons_table(reasons[library], outcome), ""]
    return "\n".join([*lines, DOORS_TEXT, *doors_table(doors), ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pip", help="the pip that downloads, by default the one of this Python")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "foreign.md", help="the page to write")
    parser.add_argument("--uv", default="uv", help="the uv that makes environments [uv]")
    parser.add_argument("--last", action="store_true", help="judge what the last run gave instead of running again")
    parser.add_argument(
        "--only", nargs="+", choices=[*SUITES, DOORS], help="run these again, and judge the last run of the others"
    )
    arguments = parser.parse_args()
    pip = [arguments.pip] if arguments.pip else [sys.executable, "-m", "pip"]

    CACHE.mkdir(parents=True, exist_ok=True)
    fetch_packages(pip)
    folders: dict[str, Path | None] = {"transformers": fetch_transformers(pip)}
    checkout = Path(os.environ["PEFT_CHECKOUT"]) if os.environ.get("PEFT_CHECKOUT") else None
    if checkout is None:
        print("PEFT's tests are skipped: PEFT_CHECKOUT names no checkout of its repository, and its package has none.")
    elif not (checkout / "tests" / "testing_common.py").exists():
        sys.exit(f"PEFT_CHECKOUT: {checkout} has no tests/testing_common.py; expected a checkout of PEFT's repository.")
    else:
        folders["peft"] = checkout

    folders[DOORS] = None

    for library, folder in folders.items():
        if not arguments.last and library in (arguments.only or folders):
            run(library, folder, arguments.uv)
        elif not results_file(library).exists():
            sys.exit(f"{library}: there is no last run in {results_file(library)}: run it first.")
    results = {library: read_results(results_file(library)) for library in folders}
    reasons = {library: read_reasons(HERE / "reasons.yaml", library) for library in results}
    faults = [fault for library in results for fault in judge(results[library], reasons[library])]
    arguments.out.write_text(page(results, reasons, checkout))
    print(f"Wrote {arguments.out}.")
    if faults:
        sys.exit("\n".join([*faults, f"{len(faults)} results are not as tests/foreign/reasons.yaml says."]))


if __name__ == "__main__":
    main()

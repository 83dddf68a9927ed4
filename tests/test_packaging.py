"""What is imported is declared, what the command line says is true, and what need not be imported is not."""

import argparse
import ast
import importlib
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import soundfile
from conftest import tiny_model, waves

import mrl_redimnet_cli
from mrl_redimnet.saving import code_files, save_model
from mrl_redimnet_cli import names

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"mrl_redimnet", "mrl_redimnet_cli", *(file.stem for file in ROOT.glob("*.py"))}
SOURCES = [
    *ROOT.glob("*.py"),
    *(file for folder in ("src", "adapters", "hub_cards") for file in (ROOT / folder).rglob("*.py")),
]


def distribution(requirement: str) -> str:
    """The normalised name in a requirement."""
    return re.sub(r"[-_.]+", "-", re.match(r"[\w.-]+", requirement)[0]).lower()


def declared(extra: str | None) -> set[str]:
    """The distributions of an extra (None: of the package itself), with those of the extras it names."""
    given = PROJECT["dependencies"] if extra is None else PROJECT["optional-dependencies"][extra]
    found = {distribution(requirement) for requirement in given}
    for requirement in given:
        if distribution(requirement) == PROJECT["name"]:
            for inner in re.search(r"\[(.*)\]", requirement)[1].split(","):
                found |= declared(inner.strip())
    return found | (set() if extra is None else declared(None))


def third_party(tree: ast.AST) -> list[tuple[str, int, str | None]]:
    """Imported top-level modules that are neither ours nor Python's: name, line, and the extra they stand in."""
    found: list[tuple[str, int, str | None]] = []

    def visit(node: ast.AST, extra: str | None):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if isinstance(node, ast.With):
            call = node.items[0].context_expr
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "extra":
                extra = call.args[0].value
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules = [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else modules
        for module in {module.split(".")[0] for module in modules} - OURS - sys.stdlib_module_names:
            found.append((module, node.lineno, extra))
        for child in ast.iter_child_nodes(node):
            visit(child, extra)

    visit(tree, None)
    return found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_every_import_is_declared(file):
    distributions = packages_distributions()
    missing = [
        f"line {line}: {module} is not in {'the dependencies' if extra is None else f'the extra {extra}'}"
        for module, line, extra in third_party(ast.parse(file.read_text()))
        if not {distribution(name) for name in distributions.get(module, [module])} & declared(extra)
    ]
    assert missing == []


def test_every_dependency_has_both_ends_of_its_range():
    tools = {"ruff", "wandb", "trackio", "fsspec"}  # formatters and dates as versions have no next major one
    for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
        for requirement in group:
            if distribution(requirement) not in tools | {PROJECT["name"]}:
                assert ">=" in requirement and "<" in requirement, requirement


def test_lock_meets_the_declared_ranges():
    packaging = pytest.importorskip("packaging.requirements")
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    locked = {distribution(line): line for line in lines if re.match(r"\w", line)}
    for extra in (None, "dev"):
        for name in declared(extra) - {PROJECT["name"]}:
            version = re.search(r"==([\w.+]+)", locked[name])[1]
            for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()):
                for requirement in group:
                    if distribution(requirement) == name:
                        assert packaging.Requirement(requirement).specifier.contains(version), requirement


def test_every_file_at_the_top_is_installed_and_each_of_a_model_travels_with_it():
    modules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["py-modules"]
    assert modules == sorted(file.stem for file in ROOT.glob("*.py"))
    assert [file.name for file in code_files()] == sorted(file.name for file in ROOT.glob("*_mrl_redimnet.py"))


def test_files_that_are_no_code_are_packaged():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"][
        "mrl_redimnet"
    ]
    package = ROOT / "src/mrl_redimnet"
    files = [path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")]
    assert {"py.typed", "published.json"} <= {file.name for file in files}
    for file in (*files, package / "models/any/model.safetensors", package / "models/any/config.json"):
        assert any(file.relative_to(package).match(pattern) for pattern in patterns), file


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize("place", [*names.CHOICES, *names.VALUES])
def test_command_line_says_what_the_package_has(place):
    module, _, name = place.rpartition(".")
    own = getattr(importlib.import_module(f"mrl_redimnet.{module}"), name)
    assert names.CHOICES[place] == tuple(own) if place in names.CHOICES else names.VALUES[place] == own


def test_every_command_is_a_module():
    shared = {"__init__", "__main__", "arguments", "names"}
    files = {file.stem for file in (ROOT / "src/mrl_redimnet_cli").glob("*.py")} - shared
    assert files == {module.__name__.rpartition(".")[2] for module in mrl_redimnet_cli.COMMANDS}
    for parser in parsers(mrl_redimnet_cli.make_parser()):
        assert parser.get_default("run").__doc__, parser.prog
        for action in parser._actions:  # noqa: SLF001 argparse has no public list of them
            assert action.help, f"{parser.prog}: {action.dest} has no help"


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """The parsers of all commands and of what these have below them."""
    actions = parser._actions  # noqa: SLF001
    below = [action for action in actions if isinstance(action, argparse._SubParsersAction)]  # noqa: SLF001
    for action in below:
        for inner in action.choices.values():
            yield from parsers(inner)
    if not below:
        yield parser


HEAVY = {"torch", "transformers", "numpy", "datasets", "peft", "mrl_redimnet"}


@pytest.mark.parametrize(
    ("line", "status", "told"),
    [
        (["--help"], 0, "speaker embeddings"),
        (["verify", "--help"], 0, "Is this the enrolled speaker?"),
        (["verfy"], 2, "invalid choice: 'verfy'"),
        (["evaluate", "--scoring", "cosin"], 2, "invalid choice: 'cosin'"),
        (
            ["verify", "me/model", "nobody.wav", "--test", "nobody.wav"],
            2,
            "ENROL: no file nobody.wav; TEST: no file nobody.wav.",
        ),
        (["verify", "nomodel", "nobody.wav", "--test", "nobody.wav"], 2, "nomodel is not a folder"),
        (["embed", "me/model", "./nowhere", "--out", "x"], 2, "no file or folder ./nowhere"),
        (["adapters", "info", "nowhere"], 2, "nowhere is not a folder"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_and_mistakes_import_nothing_heavy(line, status, told, tmp_path):
    code = f"""import sys
from mrl_redimnet_cli import main
try:
    status = main(sys.argv[1:])
except SystemExit as end:
    status = end.code
print(sorted({HEAVY!r} & set(sys.modules)), status)"""
    done = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, text=True, cwd=tmp_path)
    assert told in done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == f"[] {status}", done.stderr


# What `verify` imports of ours: nothing of training, plotting, simulation or PEFT.
VERIFIES = """
adapters adapters.facts adapters.hub adapters.placement audio audio.io audio.levels audio.scan audio.waveforms
audio.windows convert data data.utterances encoder extras files fingerprints hub_cards hub_cards.report
hub_cards.results plotting
published recordings rotation rows saving scoring scoring.calibration scoring.decisions scoring.scorers
scoring.trials tables speed speed.blocks speed.linear speed.loss speed.maps speed.norms speed.recompute speed.threads
""".split()
# And of others, beside what the classes of transformers it needs import.
BASE = """import torch
from transformers import (AutoConfig, AutoFeatureExtractor, AutoModel, AutoModelForAudioClassification,
    AutoModelForAudioXVector, PretrainedConfig, PreTrainedModel, SequenceFeatureExtractor)"""
READS = {
    "av",
    "fsspec",
    "soundfile",
    "torchaudio",
    "numpy",
    "tqdm",
    "safetensors",
    "huggingface_hub",
    "yaml",
    "accelerate",
    "tokenizers",
}


@pytest.mark.slow
def test_verify_imports_what_it_needs(tmp_path):
    save_model(tiny_model(), tmp_path / "model")
    for number, wave in enumerate(waves(16_000, 12_000)):
        soundfile.write(tmp_path / f"{number}.wav", wave.numpy(), 16_000)
    code = f"""import sys
{BASE}
before = {{module.split(".")[0] for module in sys.modules}}
from mrl_redimnet_cli import main
status = main(sys.argv[1:])
others = {{module.split(".")[0] for module in sys.modules}} - before - set(sys.stdlib_module_names)
ours = {{m.removeprefix("mrl_redimnet.") for m in sys.modules if m.startswith("mrl_redimnet.")}}
print(status, sorted(ours), sorted(others), sep="\\n")"""
    line = ["verify", "model", "0.wav", "--test", "1.wav", "--threshold", "-1"]
    done = subprocess.run([sys.executable, "-c", code, *line], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    status, ours, others = done.stdout.splitlines()[-3:]
    assert status == "0" and set(ast.literal_eval(ours)) <= set(VERIFIES)
    others = {name for name in ast.literal_eval(others) if not name.startswith("_")} - OURS
    heavy = {
        "peft",
        "datasets",
        "pandas",
        "pyarrow",
        "matplotlib",
        "faiss",
        "pyroomacoustics",
        "tensorboard",
        "evaluate",
    }
    assert not others & heavy and others <= READS, others


def test_the_training_script_names_what_it_needs():
    """For `uv run train_hf.py` and `hf jobs uv run` (PEP 723): this package with its extra, and its Pythons."""
    header = re.search(r"^# /// script\n(.*?)^# ///$", (ROOT / "train_hf.py").read_text(), re.DOTALL | re.MULTILINE)[1]
    named = tomllib.loads(re.sub(r"^# ?", "", header, flags=re.MULTILINE))
    assert named == {"requires-python": PROJECT["requires-python"], "dependencies": [f"{PROJECT['name']}[train]"]}

"""What is imported is declared, what the command line says is true, and what need not be imported is not."""

import ast
import importlib
import re
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import mrl_redimnet_cli
from mrl_redimnet_cli import names

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"configuration_mrl_redimnet", "feature_extraction_mrl_redimnet", "modeling_mrl_redimnet", "mrl_redimnet",
        "mrl_redimnet_cli", "train_hf"}  # fmt: skip
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


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize("place", [*names.CHOICES, *names.VALUES])
def test_command_line_says_what_the_package_has(place):
    module, _, name = place.rpartition(".")
    own = getattr(importlib.import_module(f"mrl_redimnet.{module}"), name)
    assert names.CHOICES[place] == tuple(own) if place in names.CHOICES else names.VALUES[place] == own


def test_every_command_names_a_function():
    runs = re.findall(
        r'run="([\w.]+):(\w+)"', "".join(f.read_text() for f in (ROOT / "src/mrl_redimnet_cli").glob("*.py"))
    )
    assert len(runs) >= len(mrl_redimnet_cli.COMMANDS)
    for module, name in runs:
        function = getattr(importlib.import_module(module), name)
        assert callable(function) and function.__doc__, f"{module}:{name}"


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

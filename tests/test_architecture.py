"""The rooms of the package, and that each knows only what lies below it."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# From the ground up. A room may import rooms of lower floors alone; rooms on one floor do not know each other.
FLOORS = (
    {"configuration_mrl_redimnet", "masking_mrl_redimnet", "pipeline_mrl_redimnet"},
    {"feature_extraction_mrl_redimnet", "frontend_mrl_redimnet", "losses_mrl_redimnet", "pretrained_mrl_redimnet"},
    {"modeling_mrl_redimnet"},
    {"speed"},
    {"extras", "files", "fingerprints", "published", "recordings", "settings", "streams", "tables"},
    {"audio", "plotting", "rows"},
    {"hub_cards", "convert", "data", "scoring"},
    {"saving"},
    {"adapters"},
    {"encoder", "export"},
    {"demo", "diarization", "evaluation", "extraction", "rotation", "serving"},
    {"training"},
    {"train_hf", "mrl_redimnet_cli"},
)
FLOOR_OF = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def sources() -> dict[str, Path]:
    """Every module of the project, by its full name."""
    found = {f"mrl_redimnet.{folder}.{file.stem}": file for folder in ("adapters", "hub_cards")
             for file in (ROOT / folder).glob("*.py")}  # fmt: skip
    for file in (ROOT / "src").rglob("*.py"):
        found[".".join(file.relative_to(ROOT / "src").with_suffix("").parts)] = file
    found |= {file.stem: file for file in ROOT.glob("*.py")}
    return {name.removesuffix(".__init__"): file for name, file in found.items()}


SOURCES = sources()
# The code beside it that uses it.
OTHERS = [file for folder in ("tests", "benchmarks", "examples", "metrics") for file in (ROOT / folder).rglob("*.py")]


def room_of(module: str) -> str | None:
    """The room of one of our modules; None of the package itself, which hands names on, and of other libraries."""
    first, *rest = module.split(".")
    if first != "mrl_redimnet":
        return first if first in FLOOR_OF else None
    if not rest:
        return None
    return rest[0]


def imports(module: str) -> Iterator[tuple[str, int]]:
    """The modules of ours that a module imports when it runs, with lines; not what only type hints need."""
    tree = ast.parse(SOURCES[module].read_text())
    hints = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node not in hints:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in SOURCES else node.module, node.lineno
        elif isinstance(node, ast.Import) and node not in hints:
            yield from ((alias.name, node.lineno) for alias in node.names)


def test_every_module_has_a_room():
    assert {room for module in SOURCES if (room := room_of(module))} == set(FLOOR_OF)


def test_imports_go_downwards():
    wrong = []
    for module in SOURCES:
        here = room_of(module)
        for imported, line in imports(module):
            there = room_of(imported)
            if here is None or there is None or here == there:
                continue
            if FLOOR_OF[there] >= FLOOR_OF[here]:
                wrong.append(f"{module}, line {line}: {here} imports {imported}")
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other():
    graph = {module: {name for name, _ in imports(module) if name in SOURCES} - {module} for module in SOURCES}
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names them


def defined(module: str) -> set[str]:
    """The names that a module's own lines at the top level make."""
    made: set[str] = set()
    for node in ast.parse(SOURCES[module].read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            made.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            made |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return made


def test_names_are_imported_from_the_model_file_that_defines_them():
    """The files that travel with a model import names of each other, which nobody else should take from there."""
    of_model = {module: defined(module) for module in SOURCES if module.endswith("_mrl_redimnet")}
    wrong = []
    for file in [*SOURCES.values(), *OTHERS]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module in of_model:
                strangers = {alias.name for alias in node.names} - of_model[node.module]
                wrong += [f"{file.relative_to(ROOT)}, line {node.lineno}: {name}" for name in sorted(strangers)]
    assert of_model and not wrong, "\n".join(wrong)


def test_no_private_name_crosses_a_module():
    """Neither of another module of the project nor of a library; what ruff's SLF001 sees are attributes alone."""
    wrong = []
    for file in [*SOURCES.values(), *OTHERS]:
        ours = file not in OTHERS
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            if ours and isinstance(node, ast.Import):
                names = [part for alias in node.names for part in alias.name.split(".")]
            if ours and isinstance(node, ast.ImportFrom) and node.module != "__future__":
                names += (node.module or "").split(".")
            wrong += [f"{file.relative_to(ROOT)}, line {node.lineno}: {name}" for name in names if name.startswith("_")]
    assert not wrong, "\n".join(wrong)


def test_own_errors_have_one_base():
    """Somebody who calls the package may catch all of its errors by one class, and each by a built-in one as well."""
    for module, file in SOURCES.items():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ClassDef) and node.name.endswith("Error") and node.name != "MRLReDimNetError":
                base, *others = (ast.unparse(base) for base in node.bases)
                assert base in ("MRLReDimNetError", "AudioError"), f"{module}: {node.name}({base})"
                assert others or base == "AudioError", f"{module}: {node.name} has no built-in base"

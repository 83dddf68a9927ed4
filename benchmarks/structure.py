"""The structure of two checkouts of this project side by side: sizes, longest functions, docstrings.

python benchmarks/structure.py OTHER_CHECKOUT --out docs/results/structure.md
"""

import argparse
import ast
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
HUB_FILE = "modeling_mrl_redimnet.py"
TRICKS = ("saved_tensors_hooks", "ContextVar(", "ops.aten")


def main():
    """Parses the command line, counts, prints and writes a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="a checkout of another commit")
    parser.add_argument("--out", type=Path, help="the table [only printed]")
    arguments = parser.parse_args()
    counts = [counted(folder) for folder in (arguments.other, HERE)]
    lines = ["# The structure before and after", "", "```bash", "python benchmarks/structure.py OTHER_CHECKOUT",
             "```", "", "|  | before | after |", "|---|---|---|"]  # fmt: skip
    lines += [f"| {name} | {counts[0][name]} | {counts[1][name]} |" for name in counts[1]]
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.out:
        arguments.out.write_text(text)


def counted(root: Path) -> dict[str, str]:
    """Every count of a checkout, as text."""
    package = sorted((root / "src").rglob("*.py"))
    library = [*package, *root.glob("*_mrl_redimnet.py"), root / "train_hf.py",
               *(file for room in ("adapters", "hub_cards") for file in (root / room).glob("*.py"))]  # fmt: skip
    trees = {file: ast.parse(file.read_text()) for file in library}
    hub = sorted(root.glob("*_mrl_redimnet.py"))
    loop = next(n for n in trees[root / "train_hf.py"].body if isinstance(n, ast.FunctionDef) and n.name == "train")
    folders: dict[str, int] = {}
    for file in package:
        if file.name != "__init__.py":
            folder = file.parent.relative_to(root / "src").as_posix()
            folders[folder] = folders.get(folder, 0) + 1
    longest = max((length(f), f.name, file.relative_to(root)) for file, tree in trees.items() for f in functions(tree))
    public = [node for tree in trees.values() for node in public_names(tree)]
    return {
        f"lines of {HUB_FILE}": f"{lines(root / HUB_FILE):,}",
        "files that travel to the Hub, their lines": f"{len(hub)}, {sum(map(lines, hub)):,}",
        "custom autograd functions in them": str(
            sum("autograd.Function" in bases(node) for file in hub for node in ast.walk(trees[file]))
        ),
        "saved-tensor hooks, context variables, private aten calls in them": str(
            sum(file.read_text().count(word) for file in hub for word in TRICKS)
        ),
        "modules per folder of src": ", ".join(f"{name} {count}" for name, count in sorted(folders.items())),
        "longest function, in lines without its docstring": f"{longest[0]} (`{longest[1]}`, {longest[2]})",
        "lines of train_hf.py": f"{lines(root / 'train_hf.py'):,}",
        "branches in its `train`": str(sum(isinstance(n, ast.If | ast.IfExp) for n in ast.walk(loop))),
        "public names, of these without docstring": f"{len(public)}, {sum(not ast.get_docstring(n) for n in public)}",
        "lines of README.md": f"{lines(root / 'README.md'):,}",
    }


def lines(file: Path) -> int:
    return len(file.read_text().splitlines())


def functions(tree: ast.AST) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def length(function: ast.FunctionDef) -> int:
    """Lines from the signature to the end, without the docstring."""
    whole = function.end_lineno - function.lineno + 1
    first = function.body[0]
    return whole - (first.end_lineno - first.lineno + 1 if ast.get_docstring(function) else 0)


def bases(node: ast.AST) -> str:
    return " ".join(map(ast.unparse, node.bases)) if isinstance(node, ast.ClassDef) else ""


def public_names(tree: ast.Module) -> list[ast.ClassDef | ast.FunctionDef]:
    """Public functions and classes of a module, and the public methods of these; not `forward`, which a class tells."""
    found = [n for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and not n.name.startswith("_")]
    methods = [
        method
        for node in found
        if isinstance(node, ast.ClassDef)
        for method in node.body
        if isinstance(method, ast.FunctionDef) and not method.name.startswith("_") and method.name != "forward"
    ]
    return [*found, *methods]


if __name__ == "__main__":
    main()

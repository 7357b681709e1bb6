"""The import rules of the project, checked by reading the source; nothing is imported."""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("benchmarks", "ssl4mis", "networks", "data_prep")
FABRIC = ("lightning_fabric", "lightning", "pytorch_lightning")
TORCH = ("torch", "torchvision", "torchmetrics", "monai", "safetensors.torch", *FABRIC)

# From bottom to top: a module may import its own layer and the layers below. The longest matching name counts, so that
# a module of ssl4mis that is not named here belongs to "ssl4mis", the layer of the parts.
LAYERS = (
    ("networks", "data_prep"),
    tuple(f"ssl4mis.{m}" for m in
          "errors docstring method batch losses schedules ops copy_paste matching attacks augment inference distance "
          "correlation metrics optional surface optimizers edt components kernels calibration".split()),
    ("ssl4mis.methods",),
    ("ssl4mis",),
    ("ssl4mis.run", "ssl4mis.sweep", "ssl4mis.predict", "ssl4mis.reproduce"),
    ("benchmarks",),
)

# Tables and reports are rebuilt from records, and suites are listed, on machines without torch.
TORCH_FREE = tuple(f"ssl4mis/{m}.py" for m in
                   "records peeks selection statistics analysis leaderboard plots pictures document report suites "
                   "docstring literature".split())
TORCH_FREE += ("benchmarks/leaderboard.py", "benchmarks/report.py", "benchmarks/literature.py")


class Rule(NamedTuple):
    """Files (patterns relative to the root) that may not import the forbidden names, anywhere in the file."""

    files: tuple[str, ...]
    forbidden: tuple[str, ...]
    exempt: tuple[str, ...] = ()


METHODS_FORBIDDEN = ("methods", "trainer", "loading", "evaluator", "run", "records")
RULES = {
    "data_prep": Rule(("data_prep/**/*.py",), (*TORCH, "ssl4mis", "networks", "benchmarks")),
    "networks": Rule(("networks/**/*.py",), ("ssl4mis", "data_prep", "benchmarks")),
    "methods": Rule(
        ("ssl4mis/methods/**/*.py",), (*(f"ssl4mis.{m}" for m in METHODS_FORBIDDEN), "data_prep", "benchmarks", *FABRIC)
    ),
    "trainer": Rule(("ssl4mis/trainer.py",), ("ssl4mis.methods",)),
    "fabric": Rule(tuple(f"{p}/**/*.py" for p in PACKAGES), FABRIC, exempt=("ssl4mis/trainer.py",)),
    **{f"torch-free {file}": Rule((file,), (*TORCH, "networks")) for file in TORCH_FREE},
}


class Import(NamedTuple):
    target: str
    line: int
    lazy: bool  # inside a function or for type checkers: not executed when the module is imported


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(node: ast.AST, package: str) -> list[str]:
    """Absolute names that one statement or call imports; `from a import b` gives a and a.b."""
    match node:
        case ast.Import():
            return [alias.name for alias in node.names]
        case ast.ImportFrom():
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            return [base, *(f"{base}.{alias.name}" for alias in node.names)]
        case ast.Call(func=ast.Attribute(attr="import_module") | ast.Name(id="import_module" | "__import__")):
            first = node.args[0] if node.args else None
            first = first.values[0] if isinstance(first, ast.JoinedStr) and first.values else first
            name = first.value if isinstance(first, ast.Constant) and isinstance(first.value, str) else ""
            return [name.rstrip(".")] if name and not name.startswith(".") else []
    return []


def imports(path: Path, root: Path) -> list[Import]:
    """Every import of a file, also in functions, and `import_module` of a literal or of an f-string's literal start."""
    name = module_name(path, root)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = []

    def visit(node: ast.AST, lazy: bool) -> None:
        found.extend(Import(target, node.lineno, lazy) for target in imported(node, package))
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for child in node.body:
                visit(child, True)
            for child in node.orelse:
                visit(child, lazy)
            return
        lazy = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, lazy)

    visit(ast.parse(path.read_text(encoding="utf-8"), str(path)), False)
    return found


def project(root: Path) -> dict[str, Path]:
    files = (path for package in PACKAGES for path in (root / package).rglob("*.py"))
    return {module_name(path, root): path for path in files}


def within(name: str, prefixes: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in prefixes)


def place(path: Path, root: Path, line: int) -> str:
    return f"{path.relative_to(root).as_posix()}:{line}"


def checked_files(rule: Rule, root: Path) -> list[Path]:
    """Files of a rule; an existing folder in which its pattern finds nothing is an error, a missing file is not."""
    files = []
    for pattern in rule.files:
        hits = sorted(root.glob(pattern))
        folder = root / pattern.partition("/**")[0]
        assert hits or "**" not in pattern or not folder.exists(), f"{pattern} matches no file in {folder}"
        files += [path for path in hits if path.relative_to(root).as_posix() not in rule.exempt]
    return files


def forbidden_imports(rule: Rule, root: Path) -> list[str]:
    return sorted(
        {
            f"{place(path, root, found.line)} imports {found.target}"
            for path in checked_files(rule, root)
            for found in imports(path, root)
            if within(found.target, rule.forbidden)
        }
    )


def resolve(target: str, modules: dict[str, Path]) -> str | None:
    """Longest prefix of an imported name that is a module of the project."""
    parts = target.split(".")
    names = (".".join(parts[:n]) for n in range(len(parts), 0, -1))
    return next((name for name in names if name in modules), None)


def parents(dotted: str) -> list[str]:
    """a, a.b and a.b.c of a.b.c: what importing the last one executes."""
    parts = dotted.split(".")
    return [".".join(parts[: n + 1]) for n in range(len(parts))]


def torch_chains(start: Path, root: Path) -> list[str]:
    """Ways from a file to torch: all imports of the file itself, then what importing those modules executes."""
    modules, name = project(root), module_name(start, root)
    chains = {module: module for module in parents(name) if module in modules}
    todo, broken = list(chains), []
    while todo:
        module = todo.pop()
        for found in imports(modules[module], root):
            if found.lazy and module != name:
                continue
            if within(found.target, TORCH):
                broken.append(f"{chains[module]} -> {found.target} ({place(modules[module], root, found.line)})")
            for reached in parents(resolve(found.target, modules) or ""):
                if reached in modules and reached not in chains:
                    chains[reached] = f"{chains[module]} -> {reached}"
                    todo.append(reached)
    return sorted(broken)


def layer(module: str) -> int:
    matches = [(len(name), n) for n, names in enumerate(LAYERS) for name in names if within(module, (name,))]
    return max(matches)[1]


def edges(root: Path) -> Iterator[tuple[str, str, Import]]:
    """Importing module, imported module of the project, import; the facade `ssl4mis/__init__.py` is left out."""
    modules = project(root)
    for module, path in modules.items():
        for found in imports(path, root):
            target = resolve(found.target, modules)
            if target and target != module and "ssl4mis" not in (module, target):
                yield module, target, found


def upward_imports(root: Path) -> list[str]:
    modules = project(root)
    return sorted(
        {
            f"{place(modules[module], root, found.line)} imports {target}, which is above it"
            for module, target, found in edges(root)
            if layer(target) > layer(module)
        }
    )


def circle(root: Path) -> list[str]:
    """One circle of imports that run when the modules are imported; empty when there is none."""
    sorter = TopologicalSorter()
    for module, target, found in edges(root):
        # `from . import b` in a.c names its own package a, which does not need a.c to be complete.
        if not found.lazy and not module.startswith(f"{target}.") and not target.startswith(f"{module}."):
            sorter.add(module, target)
    try:
        sorter.prepare()
    except CycleError as error:
        return error.args[1]
    return []


@pytest.mark.parametrize("name", RULES)
def test_rule(name):
    if not checked_files(RULES[name], ROOT):
        pytest.skip(f"none of {', '.join(RULES[name].files)} exists")
    assert forbidden_imports(RULES[name], ROOT) == []


@pytest.mark.parametrize("file", TORCH_FREE)
def test_nothing_that_a_table_needs_imports_torch(file):
    if not (ROOT / file).exists():
        pytest.skip(f"{file} does not exist")
    assert torch_chains(ROOT / file, ROOT) == []


def test_imports_go_downward_only():
    assert upward_imports(ROOT) == []


def test_no_circle_of_imports():
    assert circle(ROOT) == []


def test_every_package_has_files_and_an_init():
    """Folders without `__init__.py` would be missing from the built package."""
    folders = {path.parent for name, path in project(ROOT).items() if not within(name, ("benchmarks",))}
    assert [str(folder.relative_to(ROOT)) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


# The checker itself, on small trees.


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


BROKEN = [
    ("data_prep", "data_prep/la.py", "import torch"),
    ("data_prep", "data_prep/la.py", "import torch.nn.functional as F"),
    ("data_prep", "data_prep/deep/er.py", "def f():\n    from monai.transforms import Crop"),
    ("data_prep", "data_prep/la.py", "from ssl4mis import metrics"),
    ("data_prep", "data_prep/la.py", "if TYPE_CHECKING:\n    import networks"),
    ("networks", "networks/vnet.py", "from data_prep.spec import Protocol"),
    ("networks", "networks/vnet.py", "import importlib\nimportlib.import_module('ssl4mis.losses')"),
    ("methods", "ssl4mis/methods/a.py", "from .b import B"),
    ("methods", "ssl4mis/methods/a.py", "from . import b"),
    ("methods", "ssl4mis/methods/a.py", "from ..trainer import fit"),
    ("methods", "ssl4mis/methods/a.py", "from ssl4mis import records"),
    ("methods", "ssl4mis/methods/a.py", "try:\n    import lightning_fabric\nexcept ImportError:\n    pass"),
    ("trainer", "ssl4mis/trainer.py", "def f(x):\n    return import_module(f'ssl4mis.methods.{x}')"),
    ("fabric", "ssl4mis/run.py", "from lightning.fabric import Fabric"),
    ("fabric", "benchmarks/speed/step.py", "from lightning_fabric import Fabric"),
    ("torch-free ssl4mis/report.py", "ssl4mis/report.py", "def f():\n    import torch"),
]


@pytest.mark.parametrize(("rule", "file", "text"), BROKEN)
def test_checker_catches(tmp_path, rule, file, text):
    [message] = {line.partition(" ")[0] for line in forbidden_imports(RULES[rule], tree(tmp_path, {file: text}))}
    assert message.startswith(f"{file}:")


@pytest.mark.parametrize(
    ("rule", "file", "text"),
    [
        ("data_prep", "data_prep/la.py", "import numpy\nfrom .spec import DataError\nimport torchlike\n'import torch'"),
        ("methods", "ssl4mis/methods/a.py", "import torch\nfrom ssl4mis.method import Method\nfrom ..ops import blur"),
        ("methods", "ssl4mis/methods/a.py", "from ssl4mis.method import Method, run\nimport ssl4mis.runner"),
        ("fabric", "ssl4mis/trainer.py", "from lightning_fabric import Fabric"),
    ],
)
def test_checker_accepts(tmp_path, rule, file, text):
    assert forbidden_imports(RULES[rule], tree(tmp_path, {file: text, "ssl4mis/x.py": ""})) == []


def test_checker_refuses_a_pattern_that_matches_nothing(tmp_path):
    (tmp_path / "networks").mkdir()
    with pytest.raises(AssertionError, match="matches no file"):
        checked_files(RULES["networks"], tmp_path)
    assert checked_files(RULES["data_prep"], tmp_path) == []


@pytest.mark.parametrize(
    ("files", "chains"),
    [
        ({"ssl4mis/report.py": "from . import config", "ssl4mis/config.py": "import torch"}, 1),
        ({"ssl4mis/report.py": "def f():\n    from .config import C", "ssl4mis/config.py": "import monai"}, 1),
        ({"ssl4mis/report.py": "import data_prep", "data_prep/__init__.py": "from .a import f",
          "data_prep/a.py": "class A:\n    import torch"}, 1),
        ({"ssl4mis/report.py": "", "ssl4mis/__init__.py": "from .a import M", "ssl4mis/a.py": "import torch"}, 1),
        ({"ssl4mis/report.py": "from .config import C", "ssl4mis/config.py": "def f():\n    import torch"}, 0),
        ({"ssl4mis/report.py": "from .config import C", "ssl4mis/config.py": "if TYPE_CHECKING:\n    import torch"}, 0),
    ],
)  # fmt: skip
def test_checker_follows_chains_to_torch(tmp_path, files, chains):
    assert len(torch_chains(tmp_path / "ssl4mis/report.py", tree(tmp_path, files))) == chains


@pytest.mark.parametrize(
    ("file", "text", "upward"),
    [
        ("ssl4mis/losses.py", "from . import trainer", True),
        ("ssl4mis/losses.py", "def f():\n    from ssl4mis.methods.a import A", True),
        ("ssl4mis/methods/a.py", "import ssl4mis.trainer as t", True),
        ("ssl4mis/trainer.py", "from ssl4mis.run import main", True),
        ("networks/vnet.py", "from ssl4mis.losses import dice", True),
        ("ssl4mis/run.py", "import benchmarks.run", True),
        ("ssl4mis/run.py", "from ssl4mis import trainer, losses\nfrom .methods import a", False),
        ("ssl4mis/losses.py", "import torch\nfrom ssl4mis import __version__\nfrom . import batch", False),
        ("benchmarks/run.py", "from ssl4mis.run import main", False),
    ],
)
def test_checker_knows_the_direction(tmp_path, file, text, upward):
    names = ("ssl4mis/__init__", "ssl4mis/trainer", "ssl4mis/run", "ssl4mis/losses", "ssl4mis/batch", "benchmarks/run")
    empty = {f"{name}.py": "" for name in (*names, "ssl4mis/methods/__init__", "ssl4mis/methods/a")}
    assert bool(upward_imports(tree(tmp_path, {**empty, file: text}))) == upward


def test_checker_finds_a_circle(tmp_path):
    files = {"ssl4mis/a.py": "from .b import f", "ssl4mis/b.py": "from . import a", "ssl4mis/__init__.py": ""}
    assert set(circle(tree(tmp_path, files))) == {"ssl4mis.a", "ssl4mis.b"}
    assert circle(tree(tmp_path, {"ssl4mis/b.py": "def f():\n    from . import a"})) == []

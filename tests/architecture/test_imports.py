"""The import arrows between the rooms, read from the source files: nothing is imported here.

    pallas_kernels <- dynaexq_jax <- convert

and inside dynaexq_jax: policy, residency and traffic run without jax, on numpy alone.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pallas_kernels", "dynaexq_jax", "convert")
MAX_LINES = 400

# What each room may not import; dynaexq_jax/cli is excepted inside functions.
FORBIDDEN = {
    "pallas_kernels": {"dynaexq_jax", "convert"},
    "dynaexq_jax": {"convert"},
    "convert": set(),
}
NUMPY_ONLY = ("dynaexq_jax.policy", "dynaexq_jax.residency", "dynaexq_jax.traffic")
NUMPY_ONLY_MAY_IMPORT = {"numpy", "pallas_kernels.levels"}
NEEDS_A_DEVICE = {"jax", "jaxlib", "flax", "orbax"}


def _module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    _module_name(path): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _import_nodes(node: ast.AST, lazy: bool = False) -> Iterator[tuple[ast.AST, bool]]:
    """Import statements below `node`, each with whether it runs only when something is called."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child, lazy
        inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _import_nodes(child, lazy or inside or _is_type_checking(child))


def imports(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, bool]]:
    """The dotted names that a module imports, and whether lazily; submodules by their own name."""
    for node, lazy in _import_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, lazy) for alias in node.names)
            continue
        assert isinstance(node, ast.ImportFrom)
        source = node.module or ""
        if node.level:
            parents = module.split(".")
            keep = len(parents) - node.level + (1 if is_package else 0)
            source = ".".join([*parents[:keep], *([source] if source else [])])
        for alias in node.names:
            submodule = f"{source}.{alias.name}"
            yield (submodule if submodule in MODULES else source), lazy


def _imports_of(module: str) -> list[tuple[str, bool]]:
    path = MODULES[module]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return list(imports(tree, module, path.name == "__init__.py"))


def _in(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def _numpy_only_modules() -> list[str]:
    return [name for name in MODULES if any(_in(name, package) for package in NUMPY_ONLY)]


def test_parser_sees_every_kind_of_import() -> None:
    source = (
        "import jax.numpy as jnp\nfrom convert import main\nfrom . import errors\n"
        "if TYPE_CHECKING:\n    import flax\n"
        "class A:\n    def f(self):\n        from ..convert import cli\n"
    )
    found = list(imports(ast.parse(source), "dynaexq_jax.engine.loop", False))
    assert found == [
        ("jax.numpy", False),
        ("convert", False),
        ("dynaexq_jax.engine", False),
        ("flax", True),
        ("dynaexq_jax.convert", True),
    ]
    assert list(imports(ast.parse("from . import errors"), "dynaexq_jax", True)) == [
        ("dynaexq_jax.errors", False)
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_package_has_modules(package: str) -> None:
    assert package in MODULES


@pytest.mark.parametrize("module", MODULES)
def test_arrows(module: str) -> None:
    room = module.split(".")[0]
    for name, lazy in _imports_of(module):
        target = name.split(".")[0]
        excepted = lazy and _in(module, "dynaexq_jax.cli") and target == "convert"
        assert excepted or target not in FORBIDDEN[room], f"{module} imports {name}"
        assert target not in {"tests", "benchmarks", "examples"}, f"{module} imports {name}"


@pytest.mark.parametrize("package", NUMPY_ONLY)
def test_numpy_only_packages_exist(package: str) -> None:
    assert package in MODULES


@pytest.mark.parametrize("module", _numpy_only_modules())
def test_numpy_only_packages_import_numpy_only(module: str) -> None:
    for name, _ in _imports_of(module):
        top = name.split(".")[0]
        allowed = (
            top in sys.stdlib_module_names or top == "dynaexq_jax" or name in NUMPY_ONLY_MAY_IMPORT
        )
        assert allowed, f"{module} imports {name}; it may import {sorted(NUMPY_ONLY_MAY_IMPORT)}"


@pytest.mark.parametrize("module", _numpy_only_modules())
def test_numpy_only_packages_reach_no_jax(module: str) -> None:
    """Followed through our own modules as far as imports run at import time.

    dynaexq_jax/__init__.py, which offers the runtime to users, is not part of the way.
    """
    seen, waiting = set(), [(module, module)]
    while waiting:
        name, way = waiting.pop()
        assert name.split(".")[0] not in NEEDS_A_DEVICE, f"{way} is imported at module level"
        if name in seen or name not in MODULES:
            continue
        seen.add(name)
        waiting += [(n, f"{way} -> {n}") for n, lazy in _imports_of(name) if not lazy]


@pytest.mark.parametrize("module", MODULES)
def test_file_is_small_and_says_what_it_is(module: str) -> None:
    text = MODULES[module].read_text(encoding="utf-8")
    lines = len(text.splitlines())
    assert lines <= MAX_LINES, f"{module} has {lines} lines, more than {MAX_LINES}: split it"
    assert ast.get_docstring(ast.parse(text)), f"{module} has no module docstring"

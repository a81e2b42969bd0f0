"""The house rules that no linter knows, read off the source: floors, imports, determinism, sizes."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

FLOORS = {
    "kernels": 0,
    "contracts": 1,
    "scenario": 1,
    "memory": 2,
    "workload": 2,
    "metrics": 2,
    "scheduler": 3,
    "routing": 3,
    "loops": 4,
    "costs": 5,
    "engine": 5,
    "runtime": 6,
    "deployment": 7,
    "api": 8,
    "server": 9,
    "study": 9,
    "report": 9,
    "cli": 10,
}
CONTRACTS = {"tokens", "ports", "batch", "messages", "request", "sampling"}
"""The modules on floor 1 that speak of one another: one room without a folder."""

IMPORTERS = {
    "time": (
        "testbed/runtime/wall",
        "testbed/runtime/paced",
        "testbed/engine/",
        "testbed/server/",
        "testbed/study/",
        "testbed/api.py",
        "testbed/cli/",
        "kernels/",
    ),
    "random": (),
    "threading": ("testbed/runtime/wall", "testbed/runtime/paced", "testbed/engine/", "testbed/server/"),
    "asyncio": ("testbed/server/", "testbed/study/bench/"),
    "simpy": ("testbed/runtime/virtual", "testbed/runtime/world.py", "testbed/runtime/channels.py"),
    "torch": ("testbed/runtime/wall", "testbed/engine/", "kernels/"),
    "triton": ("testbed/engine/", "kernels/"),
    "kernels": (),
    "pickle": (),
    "marshal": (),
    "shelve": (),
    "dill": (),
    "cloudpickle": (),
}
"""Modules that not everybody may import, with the beginnings of the paths that may."""

RAW_BITS = {"Philox", "PCG64", "SeedSequence"}
"""All that the deterministic floors may use of ``numpy.random``: its distributions change between versions."""

LINES_MAX = 70


def sources() -> list[str]:
    files = [*(ROOT / "testbed").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    return sorted(file.relative_to(ROOT).as_posix() for file in files)


@cache
def tree(source: str) -> ast.Module:
    return ast.parse((ROOT / source).read_text(encoding="utf-8"), source)


def room_of(module: str) -> str | None:
    """The room of a dotted module name; None for what is not ours, and for the package itself."""
    parts = module.split(".")
    if parts[0] != "testbed" or len(parts) == 1:
        return None
    return "contracts" if parts[1] in CONTRACTS else parts[1]


def module_of(source: str) -> str:
    name = source.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    return name if name.startswith("testbed") else f"testbed.{name}"


def floor_of(source: str) -> int:
    room = room_of(module_of(source))
    return FLOORS[room] if room else 0


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, absolute module name) of every import, also those inside functions and for type checkers."""
    for node in ast.walk(tree(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module_of(source).split(".")
                keep = len(package) - node.level + source.endswith("__init__.py")
                base = ".".join([*package[:keep], *filter(None, [node.module])])
            yield node.lineno, base
            if base == "testbed":
                yield from ((node.lineno, f"testbed.{alias.name}") for alias in node.names)


def called(node: ast.AST) -> str:
    return node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""


def deterministic(source: str) -> bool:
    return 1 <= floor_of(source) <= 4


@pytest.mark.parametrize("source", sources())
def test_imports_go_down(source: str) -> None:
    room = room_of(module_of(source))
    for line, module in imports(source):
        other = room_of(module)
        if other is None or other == room or room is None:
            continue
        assert other in FLOORS, f"{source}:{line} imports {module}, a room without a floor"
        same_ground = FLOORS[other] == FLOORS[room] == 1
        assert FLOORS[other] < FLOORS[room] or same_ground, f"{source}:{line} ({room}) imports {module} ({other})"


def test_every_room_has_a_floor() -> None:
    rooms = {room for source in sources() if (room := room_of(module_of(source)))}
    assert rooms <= set(FLOORS), f"no floor: {sorted(rooms - set(FLOORS))}"
    assert {"scenario", "scheduler", "cli"} <= rooms  # the walk sees the house at all


@pytest.mark.parametrize("source", sources())
def test_only_some_may_import(source: str) -> None:
    for line, module in imports(source):
        allowed = IMPORTERS.get(module.split(".")[0])
        assert allowed is None or source.startswith(allowed), f"{source}:{line} imports {module}"


@pytest.mark.parametrize("source", sources())
def test_nothing_received_is_executed(source: str) -> None:
    for node in ast.walk(tree(source)):
        assert called(node) not in ("eval", "exec", "compile"), f"{source}:{node.lineno}"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("torch", "load"), f"{source}:{node.lineno}: torch.load unpickles"


def iterated(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, (ast.For, ast.AsyncFor)):
        return [node.iter]
    if isinstance(node, (ast.ListComp, ast.GeneratorExp, ast.DictComp)):
        return [generator.iter for generator in node.generators]
    if called(node) in ("list", "tuple", "enumerate", "zip", "map", "iter", "next", "dict"):
        return list(node.args)  # type: ignore[attr-defined]
    return []


def is_set(node: ast.expr) -> bool:
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.BitOr, ast.BitAnd, ast.Sub, ast.BitXor)):
        return is_set(node.left) or is_set(node.right)
    return isinstance(node, (ast.Set, ast.SetComp)) or called(node) in ("set", "frozenset")


@pytest.mark.parametrize("source", sources())
def test_no_order_comes_from_a_set(source: str) -> None:
    for node in ast.walk(tree(source)):
        for iterable in iterated(node):
            assert not is_set(iterable), f"{source}:{iterable.lineno} iterates a set: use a dict or sorted()"


@pytest.mark.parametrize("source", [source for source in sources() if deterministic(source)])
def test_nothing_differs_between_processes(source: str) -> None:
    for node in ast.walk(tree(source)):
        assert called(node) not in ("hash", "id"), f"{source}:{node.lineno} calls {called(node)}()"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr == "random":
            assert node.attr in RAW_BITS, f"{source}:{node.lineno} uses numpy.random.{node.attr}"
        if isinstance(node, ast.ImportFrom) and node.module == "numpy.random":
            names = {alias.name for alias in node.names}
            assert names <= RAW_BITS | {"BitGenerator"}, f"{source}:{node.lineno} imports {sorted(names)}"
        if isinstance(node, ast.Attribute):
            assert node.attr not in ("now", "utcnow", "today") or not (
                isinstance(node.value, ast.Name) and node.value.id in ("datetime", "date")
            ), f"{source}:{node.lineno} reads the wall clock"


def annotated(node: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """(name, annotation) of variables, fields, arguments, and of functions for what they return."""
    if isinstance(node, ast.AnnAssign):
        yield (
            (node.target.id if isinstance(node.target, ast.Name) else getattr(node.target, "attr", "")),
            node.annotation,
        )
    elif isinstance(node, ast.arg) and node.annotation:
        yield node.arg, node.annotation
    elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.returns:
        yield node.name, node.returns


@pytest.mark.parametrize("source", [source for source in sources() if room_of(module_of(source)) != "costs"])
def test_nanoseconds_are_whole(source: str) -> None:
    """The cost model adds up fractions and rounds once; everybody else keeps time in integers."""
    for node in ast.walk(tree(source)):
        for name, annotation in annotated(node):
            is_float = isinstance(annotation, ast.Name) and annotation.id == "float"
            assert not (name.endswith("_ns") and is_float), f"{source}:{annotation.lineno} {name}: float"


@pytest.mark.parametrize("source", sources())
def test_functions_fit_a_screen(source: str) -> None:
    for node in ast.walk(tree(source)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= LINES_MAX, f"{source}:{node.lineno} {node.name} has {lines} lines"


def test_one_trap_carries_virtual_time() -> None:
    """Coroutines reach SimPy through a single ``yield``: an ``__await__`` or a ``types.coroutine`` in world.py."""
    traps = []
    for source in sources():
        for node in ast.walk(tree(source)):
            if not isinstance(node, ast.FunctionDef):
                continue
            decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
            if node.name == "__await__" or any(name.endswith("coroutine") for name in decorators):
                traps += [source for inner in ast.walk(node) if isinstance(inner, (ast.Yield, ast.YieldFrom))]
    assert set(traps) <= {"testbed/runtime/world.py"}
    assert len(traps) <= 1


def test_the_packages_are_listed() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {file.parent.relative_to(ROOT) for file in (ROOT / "testbed").rglob("__init__.py")}
    assert set(project["tool"]["setuptools"]["packages"]) == {".".join(f.parts) for f in folders} | {"testbed.kernels"}

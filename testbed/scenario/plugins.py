"""The user's own loop, strategy, policy or cost model, found by its name in a scenario."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from testbed.scenario.describe import did_you_mean
from testbed.scenario.errors import InputError

_OURS = Path(__file__).parents[1]
_loaded: dict[str, str] = {}
"""Files of the modules that plugins came from, each with the name under which a scenario named it."""


def is_plugin(name: str) -> bool:
    """Whether ``name`` is a plugin path (``package.module:name`` or ``file.py:name``) and no word of ours."""
    return ":" in name


def load_plugin(name: str, base_dir: str | Path = ".", *, where: str = "") -> Any:
    """The object that ``package.module:name`` or ``file.py:name`` names.

    A relative file is looked for in ``base_dir``, then in the working directory; a package is imported as Python
    does, and also from ``base_dir``. ``where`` is the scenario field that named it. Raises InputError when there is
    no such file, module or name, and with the user's own file and line when his code fails while it is imported.
    """
    module_name, colon, attribute = name.rpartition(":")
    if not colon or not module_name or not attribute.isidentifier():
        remedy = "write package.module:name or path/to/file.py:name"
        raise InputError(f"{name!r} is not a plugin path", where=where, remedy=remedy)
    base = Path(base_dir)
    is_file = module_name.endswith(".py")
    module = _import_file(module_name, base, where) if is_file else _import_module(module_name, base, where)
    if module.__file__ and module.__name__.partition(".")[0] != "testbed":
        _loaded[module.__file__] = module_name if is_file else Path(module.__file__).name
    try:
        return getattr(module, attribute)
    except AttributeError:
        public = [known for known in vars(module) if not known.startswith("_")]
        hint = did_you_mean(attribute, public) or f"it has: {', '.join(public) or 'nothing'}"
        raise InputError(f"{module_name} has no {attribute!r}", where=where, remedy=hint) from None


def load_callable(name: str, base_dir: str | Path = ".", *, where: str, takes: tuple[str, ...] = ()) -> Any:
    """``load_plugin`` for a part that is called with the arguments ``takes``.

    Raises InputError when it cannot be called, or not with these arguments.
    """
    part = load_plugin(name, base_dir, where=where)
    _check_callable(part, name, where, takes)
    return part


def load_object(name: str, base_dir: str | Path = ".", *, where: str, method: str, takes: tuple[str, ...]) -> Any:
    """What the class ``name`` makes when it is called without arguments: an object that has ``method``, which is called
    with the arguments ``takes``. Raises InputError when one of the two cannot be called so."""
    with own_faults():
        own = load_callable(name, base_dir, where=where)()
    if not callable(getattr(own, method, None)):
        remedy = f"give it def {method}({', '.join(('self', *takes))})"
        raise InputError(f"{name} has no method {method!r}", where=where, remedy=remedy)
    _check_callable(getattr(own, method), f"{name}.{method}", where, takes)
    return own


def _check_callable(part: Any, name: str, where: str, takes: tuple[str, ...]) -> None:
    form = f"({', '.join(takes)})" if takes else "without arguments"
    if not callable(part):
        raise InputError(f"{name} is {part!r}, which cannot be called", where=where, remedy=f"it is called {form}")
    try:
        inspect.signature(part).bind(*takes)
    except TypeError as error:
        message = f"{name} cannot be called {'with ' if takes else ''}{form}: {error}"
        raise InputError(message, where=where, remedy="see docs/extending.md for its form") from None
    except ValueError:  # a callable that does not tell its signature
        pass


def load_coroutine(name: str, base_dir: str | Path = ".", *, where: str, takes: tuple[str, ...] = ()) -> Any:
    """``load_callable`` for a coroutine function. Raises InputError for anything else."""
    part = load_callable(name, base_dir, where=where, takes=takes)
    if not inspect.iscoroutinefunction(part):
        kind = "a class" if inspect.isclass(part) else "no coroutine function"
        remedy = f"write async def {part.__name__ if hasattr(part, '__name__') else 'loop'}({', '.join(takes)})"
        raise InputError(f"{name} is {kind}", where=where, remedy=remedy)
    return part


@contextmanager
def own_faults() -> Iterator[None]:
    """What the user's own part raises leaves this block as an InputError with file, line and function.

    It is the part's fault where the innermost frame of the traceback lies in its file, but for those of the libraries
    that it calls.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename in _loaded or _is_ours(f.filename)]
        if not frames or frames[-1].filename not in _loaded:
            raise
        last = frames[-1]
        at = f"{_loaded[last.filename]}:{last.lineno}"
        message = f"{type(error).__name__}: {error}"
        raise InputError(message, where=f"in {at}, {last.name}", remedy=f"mend {at}: {last.line}") from error


def _is_ours(file_name: str) -> bool:
    """Whether a file is one of testbed's own."""
    return Path(file_name).is_relative_to(_OURS)


def _import_file(file_name: str, base: Path, where: str) -> ModuleType:
    candidates = [base / file_name, Path(file_name)]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        remedy = f"paths are relative to the scenario's folder ({base.resolve()}) or the working directory"
        raise InputError(f"there is no file {file_name}", where=where, remedy=remedy)
    module_name = f"testbed_plugin_{'_'.join(path.resolve().with_suffix('').parts[1:])}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module  # before execution: dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise _import_failed(file_name, error, where) from error
    return module


def _import_module(module_name: str, base: Path, where: str) -> ModuleType:
    added = str(base.resolve())
    sys.path.insert(0, added)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        parents = [module_name.rsplit(".", cut)[0] for cut in range(module_name.count(".") + 1)]
        if error.name not in parents:
            raise _import_failed(module_name, error, where) from error
        remedy = f"install it, put it beside the scenario ({added}), or write path/to/file.py:name"
        raise InputError(f"there is no module {error.name}", where=where, remedy=remedy) from None
    except Exception as error:
        raise _import_failed(module_name, error, where) from error
    finally:
        sys.path.remove(added)


def _import_failed(name: str, error: Exception, where: str) -> InputError:
    """The innermost line outside of Python's import machinery is the line to mend."""
    if isinstance(error, SyntaxError) and error.filename:
        at = f"{error.filename}:{error.lineno}"
    else:
        frames = [
            frame
            for frame in traceback.extract_tb(error.__traceback__)
            if "importlib" not in frame.filename and frame.filename != __file__
        ]
        at = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else name
    message = f"importing {name} failed at {at}: {type(error).__name__}: {error}"
    return InputError(message, where=where, remedy=f"mend {at}")

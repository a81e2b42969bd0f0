"""The user's own loop, strategy, policy or cost model, found by its name in a scenario."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from testbed.scenario.describe import did_you_mean
from testbed.scenario.errors import InputError


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
    try:
        return getattr(module, attribute)
    except AttributeError:
        public = [known for known in vars(module) if not known.startswith("_")]
        hint = did_you_mean(attribute, public) or f"it has: {', '.join(public) or 'nothing'}"
        raise InputError(f"{module_name} has no {attribute!r}", where=where, remedy=hint) from None


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

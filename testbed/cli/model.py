"""``testbed model``: model folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from testbed.scenario.errors import InputError

app = typer.Typer(help="Make a small model to try the engine with.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def _model() -> None:
    """Make ``init`` a command of its own though it is the only one."""


@app.command()
def init(
    preset: Annotated[str, typer.Argument(help="A preset (see `testbed presets models`) or a config.json.")],
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.", show_default=False)],
    layers: Annotated[int, typer.Option()] = 2,
    hidden: Annotated[int, typer.Option(help="Hidden size; other sizes keep their proportion to it.")] = 64,
    heads: Annotated[int | None, typer.Option(help="Query heads; default 4.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="Default: half as many, or all, as in the preset.")] = None,
    head_dim: Annotated[int | None, typer.Option()] = None,
    intermediate: Annotated[int | None, typer.Option(help="Width of the MLP, or of each expert.")] = None,
    experts: Annotated[int | None, typer.Option(help="Default: at most 8.")] = None,
    vocab: Annotated[int | None, typer.Option(help="Default: that of the tokenizer.")] = None,
    std: Annotated[float, typer.Option(help="Deviation of the random weights.")] = 0.02,
    seed: Annotated[int, typer.Option()] = 0,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
) -> None:
    """Write a tiny model of the preset's family, with random weights and a tokenizer, as transformers loads it."""
    try:
        from testbed.engine.models.create import Sizes, create_model
    except ModuleNotFoundError as error:
        message = f"making a model needs {error.name}, which is not installed"
        raise InputError(message, where="model init", remedy="pip install 'testbed[engine]'") from error
    sizes = Sizes(layers, hidden, heads, kv_heads, head_dim, intermediate, experts, vocab)
    print(create_model(preset, folder, sizes, std=std, seed=seed, dtype=dtype))

"""Load generators that people measure servers with: how each is installed, run, and what its result file says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INSTALL_S, RUN_S = 1800, 900
"""Nothing takes so long."""
FOLDER = Path(os.environ.get("TESTBED_CLIENTS") or Path(tempfile.gettempdir()) / "testbed-clients")
"""Where the tools are, each in a virtual environment of its own."""
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}


@dataclass(frozen=True)
class Load:
    """What a tool is to send: random prompts, at the times of a Poisson process."""

    url: str
    model: str
    tokenizer: Path
    requests: int
    rate_per_s: float
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True)
class Reported:
    """What a tool says."""

    requests: int
    """That it counts as successful."""
    failed: int
    ttft_ms: float
    """Median."""
    itl_ms: float
    """Median: of all gaps, or of the requests' means (see ``Tool``)."""


@dataclass(frozen=True)
class Tool:
    """One of them."""

    name: str
    package: str
    """As pip takes it, with its version."""
    needs: tuple[str, ...]
    """None: all that the package says. Else the package is installed alone, and then these: what the benchmark imports
    of an engine that nobody wants to install for its client."""
    program: tuple[str, ...]
    """In the environment's ``bin``."""
    arguments: Callable[[Load, Path], list[str]]
    read: Callable[[Path], Reported]
    itl: str
    """What its inter-token latency is: ``gaps`` or ``requests``."""
    environment: dict[str, str]
    uncounted: int = 0
    """Requests that it may leave out of its count although they ended well."""

    @property
    def home(self) -> Path:
        """Its virtual environment."""
        return FOLDER / self.package.partition("==")[0]

    @property
    def installed(self) -> bool:
        """Whether it was installed to the end."""
        return (self.home / "complete").is_file()

    def install(self) -> None:
        """Into an environment of its own. Raises CalledProcessError, with pip's last words as its output."""
        pip = [str(self.home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run([sys.executable, "-m", "venv", "--clear", str(self.home)], INSTALL_S)
        _run([*pip, *(["--no-deps"] if self.needs else []), self.package], INSTALL_S)
        if self.needs:
            _run([*pip, *self.needs], INSTALL_S)
        (self.home / "complete").touch()

    def run(self, load: Load, folder: Path) -> Reported:
        """Run it to its end, in ``folder``. Raises CalledProcessError."""
        command = [str(self.home / "bin" / self.program[0]), *self.program[1:], *self.arguments(load, folder)]
        _run(command, RUN_S, cwd=folder, env={**os.environ, **self.environment})
        return self.read(folder)


def _run(command: list[str], timeout_s: float, **options: Any) -> None:
    subprocess.run(
        command, timeout=timeout_s, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )


# -- AIPerf -----------------------------------------------------------------------------------------------------------


def aiperf_arguments(load: Load, folder: Path) -> list[str]:
    """Chat, counted by the server: our oracle's tokens are other tokens once their text is encoded again."""
    length = ["--synthetic-input-tokens-mean", str(load.prompt_tokens), "--synthetic-input-tokens-stddev", "0"]
    length += ["--output-tokens-mean", str(load.output_tokens), "--output-tokens-stddev", "0"]
    pace = ["--request-rate", str(load.rate_per_s), "--arrival-pattern", "poisson"]
    pace += ["--request-count", str(load.requests), "--workers-max", "1"]
    where = ["--url", load.url, "-m", load.model, "--tokenizer", str(load.tokenizer)]
    how = ["--endpoint-type", "chat", "--streaming", "--use-server-token-count", "--extra-inputs", "ignore_eos:true"]
    output = ["--ui", "none", "--no-gpu-telemetry", "--output-artifact-dir", str(folder), "--random-seed", "1"]
    return ["profile", *where, *how, *length, *pace, *output]


def aiperf_read(folder: Path) -> Reported:
    """Of ``profile_export_aiperf.json``."""
    found = json.loads((folder / "profile_export_aiperf.json").read_text(encoding="utf-8"))
    return Reported(
        requests=int(found["request_count"]["avg"]),
        failed=sum(int(error["count"]) for error in found["error_summary"]),
        ttft_ms=found["time_to_first_token"]["p50"],
        itl_ms=found["inter_token_latency"]["p50"],
    )


# -- GuideLLM ---------------------------------------------------------------------------------------------------------


GUIDELLM_AT_ONCE = 4
"""Requests that may be open at a time. Its clock starts before it is ready to send, and what was due by then leaves in
one burst (40 requests at a rate of 4/s were seen within 4.6 s): then the time of its own event loop is in what it
reports."""


def guidellm_arguments(load: Load, folder: Path) -> list[str]:
    """Chat, its own default."""
    return [
        "run",
        *("--backend", f"kind=openai_http,target={load.url},model={load.model}"),
        *("--profile", f"kind=poisson,rate={load.rate_per_s},max_concurrency={GUIDELLM_AT_ONCE}"),
        *("--constraint", f"kind=max_requests,count={load.requests}"),
        *("--tokenizer", f"kind=huggingface_auto,model={load.tokenizer}"),
        *("--data", f"kind=synthetic_text,prompt_tokens={load.prompt_tokens},output_tokens={load.output_tokens}"),
        *("--output", f"kind=json,path={folder / 'benchmarks.json'}"),
        "--disable-console",
    ]


def guidellm_read(folder: Path) -> Reported:
    """Of ``benchmarks.json``."""
    (benchmark,) = json.loads((folder / "benchmarks.json").read_text(encoding="utf-8"))["benchmarks"]
    metrics, totals = benchmark["metrics"], benchmark["metrics"]["request_totals"]
    return Reported(
        requests=totals["successful"],
        failed=totals["errored"] + totals["incomplete"],
        ttft_ms=metrics["time_to_first_token_ms"]["successful"]["median"],
        itl_ms=metrics["inter_token_latency_ms"]["successful"]["median"],
    )


# -- SGLang's benchmark -----------------------------------------------------------------------------------------------


def sglang_arguments(backend: str) -> Callable[[Load, Path], list[str]]:
    """``backend``: ``sglang`` (``/generate``) or ``sglang-oai`` (``/v1/completions``)."""

    def arguments(load: Load, folder: Path) -> list[str]:
        length = ["--random-input-len", str(load.prompt_tokens), "--random-output-len", str(load.output_tokens)]
        data = ["--dataset-name", "random-ids", *length, "--random-range-ratio", "1", "--seed", "1"]
        pace = ["--num-prompts", str(load.requests), "--request-rate", str(load.rate_per_s)]
        where = ["--base-url", load.url, "--model", load.model, "--tokenizer", str(load.tokenizer)]
        return ["--backend", backend, *where, *data, *pace, "--output-file", str(folder / "result.jsonl")]

    return arguments


def sglang_read(folder: Path) -> Reported:
    """Of the one line of its file. It counts only what succeeded."""
    found = json.loads((folder / "result.jsonl").read_text(encoding="utf-8"))
    return Reported(found["completed"], 0, found["median_ttft_ms"], found["median_itl_ms"])


SGLANG_NEEDS = (
    *("aiohttp", "apache-tvm-ffi==0.1.11", "compressed-tensors", "datasets", "gguf", "ipython", "msgspec", "numpy"),
    *("orjson", "packaging", "pillow", "psutil", "pybase64", "pyzmq", "requests", "sentencepiece==0.2.1", "starlette"),
    *("torch==2.15.0", "torchvision==0.29.2", "tqdm", "transformers==5.23.0"),
)
"""Of ``sglang.benchmark.serving``: the package imports its engine's utilities wherever it is imported."""
SERVING = ("python", "-m", "sglang.benchmark.serving")

TOOLS = (
    # Offline, AIPerf takes a tokenizer's folder for the name of a repository.
    Tool("AIPerf", "aiperf==0.13.0", (), ("aiperf",), aiperf_arguments, aiperf_read, "requests", {}),
    # GuideLLM may end before it has counted its last request: seen as 39 successful, 1 still "processing" and none
    # failed, where the server had sent all of 40 to their ends.
    Tool("GuideLLM", "guidellm==0.8.1", (), ("guidellm",), guidellm_arguments, guidellm_read, "requests", OFFLINE, 1),
    *(
        Tool(
            f"sglang.bench_serving --backend {backend}",
            "sglang==0.5.23",
            SGLANG_NEEDS,
            SERVING,
            sglang_arguments(backend),
            sglang_read,
            "gaps",
            OFFLINE,
        )
        for backend in ("sglang", "sglang-oai")
    ),
)

"""Clients that people have run against the server to the end, and the times that they report are the server's own.

The ``openai`` package: every test of ``tests/server/test_openai_client.py`` and ``tests/server/clients``. AIPerf,
GuideLLM and SGLang's benchmark: each is installed in a virtual environment of its own, sends its load to a modelled
deployment (Llama 3.1 70B on four H100, paced), and its result file is held against what the server recorded. At smoke
size only tools that are installed already are run (``TESTBED_CLIENTS`` names their folder), and times are shown but
not judged.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from testbed.metrics.run import Run
from testbed.server.options import OWN_TOKENIZER
from tests.evidence.evidence import Evidence
from tests.server import page
from tests.server.clients.tools import TOOLS, Load, Reported, Tool
from tests.server.serving import serving

ROOT = Path(__file__).parents[2]
OPENAI_TESTS = ("tests/server/test_openai_client.py", "tests/server/clients")
OPENAI_S = 900
NEAR_SHARE, NEAR_MS = 0.05, 3.0
"""A client's median is right when it is off by no more than the greater of the two."""
MODEL = "llama-3.1-70b"
SERVER = ("--backend", "paced", "--model", MODEL, "--set", "engine.parallel.tp=4", "--record", "run")
FULL = Load("", MODEL, OWN_TOKENIZER, requests=60, rate_per_s=2, prompt_tokens=2000, output_tokens=60)
SMOKE = replace(FULL, requests=8, rate_per_s=4, prompt_tokens=200, output_tokens=10)


def openai_checks(folder: Path) -> tuple[int, list[str], list[str]]:
    """(checks, what they are called, lines about those that did not pass)."""
    report = folder / "openai.xml"
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *OPENAI_TESTS]
    ended = subprocess.run(pytest, cwd=ROOT, timeout=OPENAI_S, capture_output=True, text=True, check=False)
    if not report.is_file():
        return 0, [], [f"the tests did not run: {ended.stdout[-500:]}{ended.stderr[-500:]}"]
    cases = ElementTree.parse(report).findall(".//testcase")
    failed = [
        f"FAIL {case.get('name')}: {part.tag}, {part.get('message')}"
        for case in cases
        for part in case
        if part.tag in ("failure", "error", "skipped")
    ]
    return len(cases), sorted({str(case.get("name")).partition("[")[0] for case in cases}), failed


def recorded(run: Run, tool: Tool, load: Load) -> Reported:
    """What the server says of the load, in the tool's own terms. What came before it was the tool's warm-up."""
    rows = range(len(run.requests) - load.requests, len(run.requests))
    requests = run.requests.iloc[rows]
    complete = (requests["finish_reason"] == "length") & (requests["output_tokens"] == load.output_tokens)
    gaps_ms = np.concatenate([np.diff(run.token_times(row)) for row in rows]) / 1e6
    itl_ms = np.median(gaps_ms) if tool.itl == "gaps" else requests["tpot_ms"].median()
    count = int(complete.sum())
    return Reported(count, load.requests - count, float(requests["ttft_ms"].median()), float(itl_ms))


def compare(tool: Tool, load: Load, judged: bool, folder: Path) -> tuple[bool, str, list[str]]:
    """Run a tool: (whether all is well, the result in short, lines about it)."""
    output = folder / "output"
    output.mkdir(parents=True)
    with serving(folder, *SERVER) as server:
        found = tool.run(replace(load, url=server.url), output)
    own = recorded(Run.load(folder / "run"), tool, load)
    ended = own.requests == load.requests and not found.failed
    ended = ended and load.requests - tool.uncounted <= found.requests <= load.requests
    name = f"{tool.name} ({tool.package.replace('==', ' ')})"
    lines = [f"{name}: {found.requests} of {load.requests} requests, {own.requests} complete at the server"]
    near, parts = True, []
    for what, said_ms, own_ms in (("TTFT", found.ttft_ms, own.ttft_ms), ("ITL", found.itl_ms, own.itl_ms)):
        off_ms = said_ms - own_ms
        near = near and abs(off_ms) <= max(NEAR_SHARE * own_ms, NEAR_MS)
        parts.append(f"{what} {off_ms:+.2f} ms")
        lines.append(f"  median {what}: {said_ms:.2f} ms, the server's {own_ms:.2f} ms: {off_ms / own_ms:+.2%}")
    return ended and (near or not judged), f"{tool.name} {', '.join(parts)}", lines


def run_tool(tool: Tool, smoke: bool, folder: Path) -> tuple[bool, str, list[str]]:
    """Install a tool if need be, and compare."""
    if smoke and not tool.installed:
        return True, f"{tool.name} not run", [f"{tool.name}: is not installed here, and not at smoke size"]
    try:
        if not tool.installed:
            tool.install()
        return compare(tool, SMOKE if smoke else FULL, not smoke, folder)
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        said = str(error.stdout or "").strip().splitlines()[-20:]
        return False, f"{tool.name} FAILED", [f"{tool.name}: {error}", *(f"  {line}" for line in said)]


def check(smoke: bool) -> Evidence:
    """The package, then the tools, one after the other."""
    load = page.busy()
    with tempfile.TemporaryDirectory(prefix="testbed-evidence-") as name:
        count, names, failed = openai_checks(Path(name))
        results = [run_tool(tool, smoke, Path(name) / str(place)) for place, tool in enumerate(TOOLS)]
    package = f"openai {version('openai')}"
    evidence = Evidence(
        figure="; ".join([f"{package}: {count - len(failed)} of {count} checks", *(short for _, short, _ in results)]),
        bar="every check; every request of every tool to its end; "
        + ("times are not judged at smoke size" if smoke else f"medians off by at most {NEAR_SHARE:.0%} or 3 ms"),
        passed=count > 0 and not failed and all(well for well, _, _ in results),
        details=(
            *(line for _, _, lines in results for line in lines),
            *failed,
            *(f"{package}: {one.removeprefix('test_').replace('_', ' ')}" for one in names),
        ),
    )
    return evidence if smoke else page.keep("serve.1", evidence, seed="1 of each tool, 0 of the server", load=load)

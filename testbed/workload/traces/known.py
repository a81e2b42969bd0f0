"""Public traces that can be fetched: where from, under what licence, and the checksum that proves them."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from testbed.scenario.errors import InputError

_TIMEOUT_S = 60
_CHUNK_BYTES = 1 << 16


@dataclass(frozen=True)
class KnownTrace:
    """A public trace, or its first ``lines`` lines."""

    name: str
    """The name of the file it is kept under."""
    url: str
    """Its public origin, fixed to a revision; "" where the origin does not hold this file."""
    sha256: str
    licence: str
    citation: str
    lines: int | None = None
    """None: the whole file."""
    note: str = ""


_AZURE = "https://raw.githubusercontent.com/Azure/AzurePublicDataset/b469a113cedca53ddc3bdea71a143dc4b7d8700c/data/"
_MOONCAKE = "https://raw.githubusercontent.com/kvcache-ai/Mooncake/3b5a594133958449a1feaf1c9e0fc1b553e34a28/FAST25-release/traces/"
_VIDUR = (
    "https://raw.githubusercontent.com/microsoft/vidur/7d47513363ec447a741ac5e47241580b47724fbf/data/processed_traces/"
)
_SPLITWISE = "Patel et al., Splitwise: Efficient Generative LLM Inference Using Phase Splitting, ISCA 2024"
_SERVEGEN = "Xiang et al., ServeGen, arXiv 2505.09999"
_SAMPLED = "drawn from the per-client data of alibaba/ServeGen: the origin publishes the laws, not this sample"
_DERIVED = "derived from the texts of LMCache/lmcache-agent-trace: lengths and block ids in place of text"

KNOWN_TRACES = {
    trace.name: trace
    for trace in (
        KnownTrace(
            "azure_llm_2023_code.csv",
            _AZURE + "AzureLLMInferenceTrace_code.csv",
            "54e9a6d2a4bd06ba1e060304b900abbc74cbea53de96506e60fe5bb4f2277fb6",
            "CC-BY-4.0",
            _SPLITWISE,
        ),
        KnownTrace(
            "azure_llm_2023_conv_first30min.csv",
            _AZURE + "AzureLLMInferenceTrace_conv.csv",
            "29e9ee7e8edd874786c0d3336eb84236105c7588a318db54746b794520d85c34",
            "CC-BY-4.0",
            _SPLITWISE,
            lines=10_109,
        ),
        KnownTrace(
            "mooncake_conversation_first30min.jsonl",
            _MOONCAKE + "conversation_trace.jsonl",
            "0b278e6a285958f6f087394ad02026d734591c67f44cccecb0e0f9a59d509b98",
            "Apache-2.0",
            "Qin et al., Mooncake: Trading More Storage for Less Computation, FAST 2025",
            lines=5_719,
        ),
        KnownTrace(
            "arxiv_summarization_lengths_10k.csv",
            _VIDUR + "arxiv_summarization_stats_llama2_tokenizer_filtered_v2.csv",
            "0e26542a450834a52d9bbb48891bf4c454e4a3343d4977eb98ae743bd4799820",
            "MIT",
            "Agrawal et al., Vidur: A Large-Scale Simulation Framework for LLM Inference, MLSys 2024",
            lines=10_001,
        ),
        KnownTrace(
            "servegen_deepseek_r1_10h.csv",
            "",
            "6348ef9d7b3fdd0cb17babb4c444ccce7a037df997eefbe253c9b038eaa8188a",
            "Apache-2.0",
            _SERVEGEN,
            note=_SAMPLED,
        ),
        KnownTrace(
            "servegen_m_small_14h.csv",
            "",
            "cffaffa5d1e208cc8ba053a5f2d293522d87de7e8d8fdd927fb9041cfd1e881e",
            "Apache-2.0",
            _SERVEGEN,
            note=_SAMPLED,
        ),
        KnownTrace(
            "agent_miniswe_10sessions.jsonl",
            "",
            "132b376afb3db48db2c7c07a95603c1a93a87fbc321af70fd0268aaa8ed3eabf",
            "Apache-2.0",
            "LMCache agent traces",
            note=_DERIVED,
        ),
        KnownTrace(
            "agent_taubench_sessions.jsonl",
            "",
            "f051ab0d537fbcf72611056fb3e020b82850d9fd89773eba492d8573b6fa86d7",
            "Apache-2.0",
            "LMCache agent traces",
            note=_DERIVED,
        ),
    )
}


def fetch_trace(name: str, dest: Path | str) -> Path:
    """Download a known trace into the folder ``dest`` and verify it; a file that is already right is kept.

    Beside it goes ``NAME.LICENSE.txt`` with origin, licence and citation. Nothing is left behind, not even
    a new folder, when it fails. Raises InputError for an unknown name, without a network, and for a wrong checksum.
    """
    trace = _known(name)
    path = Path(dest) / trace.name
    if path.is_file() and _sha256(path) == trace.sha256:
        return path
    if not trace.url:
        raise InputError(
            f"{name} cannot be downloaded: {trace.note}",
            where=name,
            remedy="put the file into the folder that TESTBED_DATA names",
        )
    made = [folder for folder in (path.parent, *path.parent.parents) if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        with part.open("wb") as file:
            for chunk in _download(trace):
                file.write(chunk)
        if (found := _sha256(part)) != trace.sha256:
            raise InputError(
                f"wrong checksum {found}, expected {trace.sha256}",
                where=trace.url,
                remedy="the origin has changed or the transfer was cut: try again, or report it",
            )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
        if not path.exists():
            for folder in made:
                folder.rmdir()
    notice = f"{trace.name}\norigin: {trace.url}\nlicence: {trace.licence}\ncite: {trace.citation}\n"
    path.with_name(f"{path.name}.LICENSE.txt").write_text(notice, encoding="utf-8")
    return path


def _known(name: str) -> KnownTrace:
    if name in KNOWN_TRACES:
        return KNOWN_TRACES[name]
    similar = get_close_matches(name, KNOWN_TRACES, n=1)
    remedy = f"did you mean {similar[0]}?" if similar else "`testbed presets traces` lists those that are known"
    raise InputError(f"unknown trace {name}", where=name, remedy=remedy)


def _download(trace: KnownTrace) -> Iterator[bytes]:
    """The bytes of the trace; of a longer origin only as many lines as it has."""
    try:
        with urlopen(trace.url, timeout=_TIMEOUT_S) as response:
            if trace.lines is None:
                while chunk := response.read(_CHUNK_BYTES):
                    yield chunk
            else:
                for _ in range(trace.lines):
                    yield response.readline()
    except (URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        raise InputError(
            f"cannot be downloaded: {reason}",
            where=trace.url,
            remedy="check the network, or put the file into the folder that TESTBED_DATA names",
        ) from error


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()

# ruff: noqa: E501  (a table: one case a line reads better than one case a paragraph)
"""Broken scenarios, traces and command lines, and what the message must say: the place, the field and the remedy."""

from __future__ import annotations

from dataclasses import dataclass, field

BASE = """\
name: broken
model: llama-3.1-8b
device: h100-sxm
engine:
  loop: normal
  chunked_prefill_size: 2048
  page_size: 1
workload:
  arrivals: {kind: poisson, rate_per_s: 4}
  lengths: {prompt_tokens: 512, output_tokens: 64}
  count: 10
slo: {ttft_ms: {p99: 1000}}
"""

TRACE_BASE = """\
name: broken
model: llama-3.1-8b
device: h100-sxm
engine:
  loop: normal
workload:
  requests: {trace: requests.csv}
"""

CSV = "arrival_s,input_tokens,output_tokens,client_id\n0.0,100,10,1\n0.5,200,20,1\n1.0,300,30,2\n"
JSON_LINES = (
    '{"timestamp": 0, "input_length": 600, "output_length": 10, "hash_ids": [0, 1]}\n'
    '{"timestamp": 500, "input_length": 700, "output_length": 20, "hash_ids": [0, 2]}\n'
)


@dataclass(frozen=True)
class Case:
    """A folder of files, a command line in it, and what stderr must contain."""

    name: str
    place: str
    """How the message begins: file:line:column, the option, or the path."""
    says: tuple[str, ...]
    """The field, or what is wrong with it."""
    remedy: tuple[str, ...]
    files: dict[str, str | bytes] = field(default_factory=dict)
    arguments: tuple[str, ...] = ("scenario.yaml",)
    command: str = "simulate"


def at(file: str, place: str) -> str:
    """``file:LINE:COLUMN: ``; with ``place`` LINE alone any column will do."""
    return f"{file}:{place}: " if ":" in place else f"{file}:{place}:"


def edited(name: str, old: str, new: str, place: str, says: str, *remedy: str, base: str = BASE) -> Case:
    """The base scenario with one thing changed; ``place`` is LINE:COLUMN in it."""
    assert base.count(old) == 1, (name, old)
    files: dict[str, str | bytes] = {"scenario.yaml": base.replace(old, new), "requests.csv": CSV}
    return Case(name, at("scenario.yaml", place), (says,), remedy, files)


def in_trace(name: str, old: str, new: str, place: str, says: str, *remedy: str) -> Case:
    """The base trace (CSV) with one thing changed."""
    assert CSV.count(old) == 1, (name, old)
    files: dict[str, str | bytes] = {"scenario.yaml": TRACE_BASE, "requests.csv": CSV.replace(old, new)}
    return Case(name, at("requests.csv", place), (says,), remedy, files)


def in_json_trace(name: str, old: str, new: str, place: str, says: str, *remedy: str) -> Case:
    """The base trace (JSON lines) with one thing changed."""
    assert JSON_LINES.count(old) == 1, (name, old)
    scenario = TRACE_BASE.replace("requests.csv", "requests.jsonl")
    files: dict[str, str | bytes] = {"scenario.yaml": scenario, "requests.jsonl": JSON_LINES.replace(old, new)}
    return Case(name, at("requests.jsonl", place), (says,), remedy, files)


def option(name: str, arguments: tuple[str, ...], place: str, says: str, *remedy: str) -> Case:
    """The sound base scenario with a broken command line."""
    return Case(name, place, (says,), remedy, {"scenario.yaml": BASE}, ("scenario.yaml", *arguments), "simulate")


def plugin(name: str, code: str | bytes, says: str, *remedy: str, path: str = "mine.py:loop") -> Case:
    """The base scenario with a loop of the user's own in ``mine.py``."""
    files: dict[str, str | bytes] = {"scenario.yaml": BASE.replace("loop: normal", f"loop: {path}"), "mine.py": code}
    return Case(name, "scenario.yaml:5:3: ", ("engine.loop", says), remedy, files)


def own(name: str, field: str, code: str, place: str, says: str, remedy: str) -> Case:
    """The base scenario with a part of the user's own in ``mine.py``, whatever way it fails."""
    files: dict[str, str | bytes] = {
        "scenario.yaml": BASE.replace("  loop: normal", f"  {field}: mine.py:Mine"),
        "mine.py": code,
    }
    return Case(name, place, (says,), (remedy,), files)


# fmt: off
FIELDS = [
    edited("unknown field", "loop: normal", "lop: normal", "5:3", "engine.lop: unknown field", "did you mean 'loop'?"),
    edited("unknown top field", "slo:", "slos:", "12:1", "slos: unknown field", "did you mean 'slo'?"),
    edited("unknown nested field", "count: 10", "cuont: 10", "11:3", "workload.cuont", "did you mean 'count'?"),
    edited("unknown field of a kind", "rate_per_s: 4", "rate: 4", "9:29", "workload.arrivals.rate", "rate_per_s"),
    edited("missing field of a kind", ", rate_per_s: 4", "", "9:3", "arrivals.rate_per_s: is required", "above 0"),
    edited("no model", "model: llama-3.1-8b\n", "", "1:1", "model: is required", "llama-3.1-8b"),
    edited("no workload", BASE[BASE.index("workload") : BASE.index("slo")], "", "1:1", "workload: is required", "add it"),
    edited("word for a number", "page_size: 1", "page_size: one", "7:3", "engine.page_size: 'one'", "a whole number"),
    edited("quoted number", "page_size: 1", "page_size: '16'", "7:3", "engine.page_size: '16'", "a whole number"),
    edited("true for a number", "page_size: 1", "page_size: true", "7:3", "engine.page_size: true", "a whole number"),
    edited("fraction of a token", "count: 10", "count: 1.5", "11:3", "workload.count: 1.5", "a whole number above 0"),
    edited("number for a word", "loop: normal", "loop: 3", "5:3", "engine.loop: 3", "auto | normal | overlap"),
    edited("list for a word", "loop: normal", "loop: [a]", "5:3", "engine.loop: a list", "auto | normal | overlap"),
    edited("near word", "loop: normal", "loop: overlp", "5:3", "engine.loop: 'overlp'", "did you mean 'overlap'?"),
    edited("yes for true", "page_size: 1", "priority: yes", "7:3", "engine.priority: 'yes'", "true | false"),
    edited("empty section", "count: 10", "requests:\n  sessions: 3", "12:3", "workload.sessions: 3", "turns"),
    edited("engine is text", BASE[BASE.index("engine") : BASE.index("workload")], "engine: fast\n", "4:1", "engine: 'fast'", "a mapping"),
    edited("zero", "page_size: 1", "page_size: 0", "7:3", "engine.page_size: 0", "at least 1"),
    edited("negative", "chunked_prefill_size: 2048", "chunked_prefill_size: -5", "6:3", "chunked_prefill_size: -5", "-1"),
    edited("fraction above 1", "page_size: 1", "mem_fraction_static: 1.2", "7:3", "mem_fraction_static: 1.2", "below 1"),
    edited("no rate", "rate_per_s: 4", "rate_per_s: 0", "9:29", "workload.arrivals.rate_per_s: 0", "above 0"),
    edited("not a number", "rate_per_s: 4", "rate_per_s: .nan", "9:29", "rate_per_s", "finite number"),
    edited("infinite", "rate_per_s: 4", "rate_per_s: .inf", "9:29", "rate_per_s", "finite number"),
    edited("unknown kind", "poisson", "poison", "9:14", "'poison' is no known kind", "did you mean 'poisson'?"),
    option("unknown fitted table", ("--set", "workload.lengths=chat"), "--set workload.lengths=chat: ", "workload.lengths: chat", "azure-conv-2023", "docs/workloads.md"),
    edited("negative seed", "name: broken", "seed: -1", "1:1", "seed: -1", "at least 0"),
    edited("percentile over 100", "slo:", "percentiles: [50, 150]\nslo:", "12:19", "percentiles.1: 150", "below 100"),
    edited("percentile twice", "slo:", "percentiles: [50, 50]\nslo:", "12:1", "percentiles", "once"),
    edited("no percentile", "slo:", "percentiles: []\nslo:", "12:1", "percentiles: the list is empty", "[50, 90, 99]"),
    edited("limit of p100", "{p99: 1000}", "{p100: 1000}", "12:17", "slo.ttft_ms.p100", "p99"),
    edited("limit of p0", "{p99: 1000}", "{p0: 1000}", "12:17", "slo.ttft_ms.p0", "p50"),
    edited("limit of no latency", "{p99: 1000}", "{p99: 0}", "12:17", "slo.ttft_ms.p99: 0", "above 0"),
    edited("not a plugin path", "loop: normal", "loop: a b:c", "5:3", "engine.loop", "package.module:name"),
    edited("a seed that no file holds", "name: broken", f"seed: {10**30}", "1:1", "seed", "62 bits"),
    edited("sweep", "slo:", "sweep: {seed: [1, 2]}\nslo:", "12:1", "sweep", "compare"),
    edited("no variants", "slo:", "compare: {}\nslo:", "12:1", "compare: names no variants", "compare: {normal"),
    edited("variant path", "slo:", "compare: {a: {engine.lop: auto}}\nslo:", "12:15", "engine.lop", "did you mean 'loop'?"),
    edited("variant value", "slo:", "compare: {a: {engine.loop: x}}\nslo:", "12:15", "engine.loop: 'x'", "auto | normal"),
    edited("variant below a word", "slo:", "compare: {a: {model.x: 1}}\nslo:", "12:15", "model.x", "as a mapping"),
    edited("variant name", "slo:", "compare: {a/b: {seed: 1}}\nslo:", "12:11", "'a/b' cannot name a variant", "folder"),
    edited("variant is no mapping", "slo:", "compare: {a: normal}\nslo:", "12:11", "compare.a: 'normal'", "allowed"),
]

CONFLICTS = [
    edited("pipeline loop without stages", "loop: normal", "loop: pipeline", "5:3", "one stage", "pp: 2"),
    edited("loop of another name", "loop: normal", "loop: disaggregated", "5:3", "engine.loop", "pipeline_async"),
    edited("pipeline with overlap", "loop: normal", "{loop: overlap, parallel: {pp: 2}}", "5:4", "engine.loop", "pp: 1", base=BASE.replace("  loop: normal\n  chunked_prefill_size: 2048\n  page_size: 1\n", "  loop: normal\n")),
    edited("pipeline with the normal loop", "page_size: 1", "parallel: {pp: 2}", "5:3", "engine.loop", "pp: 1"),
    edited("no replica", "page_size: 1", "parallel: {dp: 0}", "7:14", "engine.parallel.dp", "above 0"),
    edited("more replicas than memory", "page_size: 1", "parallel: {dp: 1_000_000}", "7:14", "engine.parallel.dp", "at most 1024"),
    edited("more engines than memory", "slo:", "disaggregation: {decode: 1_000_000}\nslo:", "12:18", "disaggregation.decode", "at most 1024"),
    edited("routing that nobody knows", "slo:", "routing: {policy: fastest}\nslo:", "12:11", "routing.policy", "power_of_two"),
    edited("devices that do not divide heads", "page_size: 1", "parallel: {tp: 3}", "7:14", "engine.parallel.tp", "1, 2, 4"),
    edited("more stages than layers, of constant times", "loop: normal", "kv_tokens: 4000\n  parallel: {pp: 33}", "6:14", "engine.parallel.pp", "at most 32", base=BASE.replace("h100-sxm", "{constant: {prefill_ns: 1}}")),
    edited("a time-out that no clock holds", "slo:", "disaggregation: {transfer_timeout_s: 1e300}\nslo:", "12:18", "transfer_timeout_s", "at most"),
    edited("a latency that no clock holds", "slo:", "disaggregation: {link: {latency_us: 1e300}}\nslo:", "12:25", "link.latency_us", "at most"),
    edited("a link that is never busy", "slo:", "disaggregation: {link: {gb_per_s: 1e300}}\nslo:", "12:25", "link.gb_per_s", "at most"),
    Case("a run of a thousand years", "scenario", ("292 years",), ("a rate that is far too low",), {"scenario.yaml": BASE.replace("rate_per_s: 4", "rate_per_s: 1e-10")}),
    edited("more stages than layers", "  loop: normal\n  chunked_prefill_size: 2048\n  page_size: 1", "  parallel: {pp: 33}", "5:14", "32 layers, fewer than 33 stages", "at most 32"),
    edited("more stages than anybody has", "  loop: normal\n  chunked_prefill_size: 2048\n  page_size: 1", "  parallel: {pp: 1_000_000_000}", "5:14", "engine.parallel.pp", "at most 32"),
    edited("more prefill stages than layers", "slo:", "disaggregation: {prefill_stages: 33}\nslo:", "12:18", "32 layers, fewer than 33 stages", "at most 32"),
    edited("uneven prefill stages", "page_size: 1", "{parallel: {stage_layers: [32]}}", "5:15", "stage_layers: does not go with disaggregation", "leave it out", base=BASE.replace("  loop: normal\n  chunked_prefill_size: 2048\n  page_size: 1\n", "  page_size: 1\n") + "disaggregation: {prefill_stages: 2}\n"),
    edited("stages of another model", "page_size: 1", "parallel: {stage_layers: [31]}", "7:14", "engine.parallel.stage_layers", "sum to 32"),
    Case("a pair on one device", at("scenario.yaml", "12:1"), ("disaggregation: the scenario asks for 2 loops",), ("leave disaggregation out",), {"scenario.yaml": BASE.replace("slo:", "disaggregation: {link: {gb_per_s: 50}}\nslo:")}, command="confirm"),
    edited("copies of experts without balance", "page_size: 1", "experts: {redundant: 8}", "7:13", "engine.experts.redundant", "placement: balanced"),
    edited("tokens sent to all experts", "page_size: 1", "{parallel: {tp: 2}, experts: {dispatch: all_to_all}}", "5:33", "engine.experts.dispatch", "ep: 2", base=BASE.replace("  loop: normal\n  chunked_prefill_size: 2048\n  page_size: 1\n", "  page_size: 1\n")),
    edited("page over chunk", "page_size: 1", "page_size: 100", "6:3", "engine.chunked_prefill_size", "2000", "2100"),
    edited("stall free, uncut", "chunked_prefill_size: 2048", "{chunked_prefill_size: -1, batching: stall_free}", "5:4", "engine.chunked_prefill_size", "2048", base=BASE.replace("  loop: normal\n  chunked_prefill_size: 2048\n  page_size: 1\n", "  chunked_prefill_size: 2048\n")),
    edited("mixed chunk, uncut", "chunked_prefill_size: 2048", "{chunked_prefill_size: -1, batching: mixed_chunk}", "5:4", "engine.chunked_prefill_size", "prefill_first", base=BASE.replace("  loop: normal\n  chunked_prefill_size: 2048\n  page_size: 1\n", "  chunked_prefill_size: 2048\n")),
    edited("budget below rows", "page_size: 1", "batching: stall_free\n  max_running_requests: 4096", "8:3", "engine.max_running_requests", "2048 or less"),
    edited("less than a page", "page_size: 1", "page_size: 64\n  kv_tokens: 63", "8:3", "engine.kv_tokens", "64 or more"),
    edited("SGLang's admission without reserve", "page_size: 1", "rules: {ignore_eos_admission: true, reserve: none}", "7:11", "engine.rules.ignore_eos_admission", "estimate"),
    edited("SGLang's admission on vLLM", "page_size: 1", "preset: vllm-v1\n  rules: {ignore_eos_admission: true}", "8:11", "engine.rules.ignore_eos_admission", "false"),
    edited("order without priority", "page_size: 1", "low_priority_values_first: true", "7:3", "low_priority_values_first", "priority: true"),
    edited("graph size without graphs", "page_size: 1", "cuda_graph: false\n  cuda_graph_max_bs: 8", "8:3", "cuda_graph_max_bs", "remove"),
    edited("window without end", "slo:", "measure: {skip_s: 20, until: {seconds: 10}}\nslo:", "12:23", "measure.until", "smaller skip_s"),
    edited("window of nothing", "slo:", "measure: {until: {}}\nslo:", "12:11", "measure.until", "drained"),
    edited("no room for weights", "llama-3.1-8b", "llama-3.1-70b", "4:1", "no room for keys and values", "parallel.tp"),
    edited("no room in a variant", "slo:", "compare: {small: {seed: 1}, large: {model: llama-3.1-70b, engine.mem_fraction_static: 0.8}}\nslo:", "12:59", "engine.mem_fraction_static: no room for keys and values", "parallel.tp"),
    edited("pool below one request", "page_size: 1", "kv_tokens: 500", "10:3", "512 + 64 tokens exceed", "shorter"),
    edited("request over the context", "page_size: 1", "context_length: 512", "10:3", "exceed the 506 tokens that engine.context_length allows", "shorter"),
    edited("request over the memory", "page_size: 1", "kv_tokens: 512", "10:3", "exceed the 506 tokens that engine.kv_tokens allows", "larger engine.kv_tokens"),
    edited("no end", "  count: 10\n", "", "8:1", "the workload has no end", "count"),
    edited("no requests", "arrivals: {kind: poisson, rate_per_s: 4}", "rate_scale: 1.0", "8:1", "workload", "arrivals"),
    edited("unknown model", "llama-3.1-8b", "llama-3.1-8", "2:1", "model", "llama-3.1-8b"),
    edited("unknown device", "h100-sxm", "h100-smx", "3:1", "device", "h100-sxm"),
    edited("unknown host", "name: broken", "host: sglang-05", "1:1", "host", "sglang-0.5"),
    edited("unknown engine preset", "page_size: 1", "preset: sglang-0.5", "7:3", "engine.preset", "sglang-0.5.1"),
    edited("unknown fitted workload", "{kind: poisson, rate_per_s: 4}", "azure-conv-2024", "9:3", "azure-conv-2024", "azure-conv-2023"),
    edited("constant device without memory", "device: h100-sxm", "device: {constant: {decode_ns: 5}}", "4:1", "engine.kv_tokens", "kv_tokens"),
    edited("dtype that the device lacks", "device: h100-sxm", "device: a100-sxm", "5:3", "fp8", "bfloat16", base=BASE.replace("loop: normal", "quantization: fp8")),
]

TRACES = [
    in_trace("times go back", "1.0,300", "0.4,300", "4:1", "earlier than the row before", "sort"),
    in_trace("negative time", "0.0,100", "-1.0,100", "2:1", "arrival_s", "start of the trace"),
    in_trace("no output", "0.5,200,20", "0.5,200,0", "3", "without output", "zero_output: drop"),
    in_trace("no prompt", "0.5,200,20", "0.5,0,20", "3:5", "input_tokens", "at least 1"),
    in_trace("negative length", "0.5,200,20", "0.5,-200,20", "3:5", "input_tokens", "at least 1"),
    in_trace("length is no number", "0.5,200,20", "0.5,many,20", "3:5", "input_tokens", "finite number"),
    in_trace("time is NaN", "0.5,200", "nan,200", "3:1", "arrival_s", "finite number"),
    in_trace("infinite time", "0.5,200", "inf,200", "3:1", "arrival_s", "finite number"),
    in_trace("prompt over the context", "0.5,200,20", "0.5,200000,20", "3:1", "exceed the 131,066 tokens that engine.context_length allows", "too_long"),
    in_trace("row cut off", "0.5,200,20,1", "0.5,200", "3", "output_tokens", "cut off"),
    in_trace("too many cells", "0.5,200,20,1", "0.5,200,20,1,7", "3:1", "5 cells under 4 columns", "remove"),
    in_trace("unknown columns", "arrival_s,input_tokens", "when,prompt", "1:1", "no known format", "columns expected"),
    in_json_trace("truncated JSON", '"hash_ids": [0, 2]}\n', '"hash_ids": [0', "2", "not valid JSON", "cut off"),
    in_json_trace("not an object", '{"timestamp": 500, "input_length": 700, "output_length": 20, "hash_ids": [0, 2]}', "[1, 2]", "2:1", "not a JSON object", "{...}"),
    in_json_trace("NaN in JSON", '"input_length": 700', '"input_length": NaN', "2", "input_length", "leave the row out"),
    in_json_trace("blocks that do not fit", "[0, 2]", "[0, 2, 3, 4]", "2", "4 blocks for 700 tokens", "512"),
    Case("empty trace", "requests.csv:1:1: ", ("no rows",), ("at least one request",), {"scenario.yaml": TRACE_BASE, "requests.csv": ""}),
    Case("binary trace", "scenario.yaml:7:14: ", ("requests.csv: not a text file",), ("CSV",), {"scenario.yaml": TRACE_BASE, "requests.csv": b"\x80\x81\x00\xff" * 50}),
    Case("missing trace", "scenario.yaml:7:14: ", ("requests.csv",), ("did you mean", "request.csv"), {"scenario.yaml": TRACE_BASE, "request.csv": CSV}),
    Case("trace is a folder", "scenario.yaml:7:14: ", ("requests.csv",), ("trace",), {"scenario.yaml": TRACE_BASE, "requests.csv/inner": ""}),
]

FILES = [
    Case("empty file", "scenario.yaml", ("is empty",), ("model:",), {"scenario.yaml": ""}),
    Case("only comments", "scenario.yaml", ("is empty",), ("model:",), {"scenario.yaml": "# nothing\n"}),
    Case("a list", "scenario.yaml:1:1: ", ("a mapping of fields, not a list",), ("model:",), {"scenario.yaml": "- a\n"}),
    Case("text", "scenario.yaml:1:1: ", ("not text",), ("model:",), {"scenario.yaml": "hello\n"}),
    Case("binary file", "scenario.yaml:1:1: ", ("0xff is not UTF-8",), ("UTF-8",), {"scenario.yaml": b"\xff\xfe\x00\x01"}),
    Case("control characters", "scenario.yaml:1:7: ", ("control character",), ("binary",), {"scenario.yaml": "name: \x00x\n"}),
    Case("latin-1", "scenario.yaml:1:10: ", ("0xe9 is not UTF-8",), ("UTF-8",), {"scenario.yaml": "name: caf\xe9".encode("latin-1")}),
    Case("missing file", "scenario.yaml", ("no such file",), ("did you mean scenarios.yaml?",), {"scenarios.yaml": BASE}),
    Case("missing folder", "some/scenario.yaml", ("no such file",), ("folder some does not exist",), {}, ("some/scenario.yaml",)),
    Case("a folder", "scenario.yaml", ("is a folder",), ("name a file",), {"scenario.yaml/inner": ""}),
    Case("open bracket", "scenario.yaml:2:1: ", ("YAML syntax",), ("brackets",), {"scenario.yaml": "engine: {loop: normal\n"}),
    Case("tab", "scenario.yaml:2:1: ", ("YAML syntax",), ("spaces, not tabs",), {"scenario.yaml": "engine:\n\tloop: normal\n"}),
    Case("bad indentation", "scenario.yaml:3:2: ", ("YAML syntax",), ("indentation",), {"scenario.yaml": "engine:\n  loop: normal\n page_size: 1\n"}),
    Case("two documents", "scenario.yaml:2:1: ", ("YAML syntax",), ("one document",), {"scenario.yaml": "model: a\n---\nmodel: b\n"}),
    Case("duplicate key", "scenario.yaml:6:3: ", ("engine.loop: given twice, first in line 5",), ("keep one",), {"scenario.yaml": BASE.replace("  chunked", "  loop: overlap\n  chunked")}),
    Case("merge key", "scenario.yaml:1:1: ", ("a merge (<<)",), ("plain text",), {"scenario.yaml": "<<: {a: 1}\n"}),
    Case("alias bomb", "scenario.yaml", ("aliases unfold",), ("without aliases",), {"scenario.yaml": "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True))}),
    Case("alias of itself", "scenario.yaml:1:", ("aliases unfold",), ("without aliases",), {"scenario.yaml": "a: &a [*a]\n"}),
    Case("deep nesting", "scenario.yaml", ("YAML syntax",), ("nesting",), {"scenario.yaml": "a: " + "[" * 5000 + "]" * 5000}),
    Case("several errors at once", "scenario.yaml:5:3: ", ("engine.loop: 'norml'", "scenario.yaml:7:3: engine.page_size: 0", "scenario.yaml:11:3: workload.count: 0"), ("did you mean 'normal'?", "at least 1"), {"scenario.yaml": BASE.replace("loop: normal", "loop: norml").replace("page_size: 1", "page_size: 0").replace("count: 10", "count: 0")}),
]

OPTIONS = [
    option("--set without value", ("--set", "engine.loop"), "--set engine.loop: ", "form field=value", "--set engine.loop=normal"),
    option("--set of an unknown field", ("--set", "engine.lop=normal"), "--set engine.lop=normal: ", "engine.lop", "did you mean 'loop'?"),
    option("--set to a wrong value", ("--set", "engine.page_size=0"), "--set engine.page_size=0: ", "engine.page_size: 0", "at least 1"),
    option("--set to no number", ("--set", "routing.cache_threshold=.nan"), "--set routing.cache_threshold=.nan: .nan is not a finite number", "", "write a finite number"),
    option("--set below a word", ("--set", "model.x=1"), "--set model.x=1: ", "no fields", "as a mapping"),
    option("--set with broken YAML", ("--set", "slo={a"), "--set slo={a: ", "YAML syntax", "brackets"),
    option("--set with an empty part", ("--set", "engine..loop=auto"), "--set engine..loop=auto: ", "form field=value", "--set"),
    option("--set that conflicts", ("--set", "engine.page_size=100"), "scenario.yaml:6:3: ", "engine.chunked_prefill_size", "2000"),
    option("bad percentiles", ("--percentiles", "50,101"), "--set percentiles=[50,101]: ", "percentiles.1: 101", "below 100"),
    option("--fail-if without sign", ("--fail-if", "ttft"), "--fail-if 'ttft': ", "FIGURE>NUMBER", "ttft_p99_ms>500"),
    option("--fail-if without number", ("--fail-if", "p99_ttft_ms>fast"), "--fail-if 'p99_ttft_ms>fast': ", "'fast' is not a finite number", "500"),
    Case("output folder in use", "out", ("is not empty",), ("new folder",), {"scenario.yaml": BASE, "out/old": "x"}, ("scenario.yaml", "-o", "out")),
    Case("output is a file", "out", ("is a file",), ("new folder",), {"scenario.yaml": BASE, "out": "x"}, ("scenario.yaml", "-o", "out")),
    Case("no run folder", "runs/x", ("no such run folder",), ("testbed simulate",), {}, ("runs/x",), "report"),
    Case("folder without a run", "x", ("no run.json",), ("testbed simulate",), {"x/y": ""}, ("x",), "report"),
    Case("nothing to compare", "x", ("no run.json",), ("testbed simulate",), {"x/y": ""}, ("x", "x"), "compare"),
    Case("unknown trace to fetch", "azure_llm_2023_kode.csv", ("unknown trace",), ("azure_llm_2023_code.csv",), {}, ("fetch", "azure_llm_2023_kode.csv"), "trace"),
    Case("statistics of nothing", "nowhere.csv", ("no such trace",), ("trace",), {}, ("stats", "nowhere.csv"), "trace"),
]

PLUGINS = [
    plugin("plugin fails", "import math\n\nloop = 1 / 0\n", "mine.py:3: ZeroDivisionError", "mend", "mine.py:3"),
    plugin("plugin with a syntax error", "def loop(:\n", "mine.py:1: SyntaxError", "mend"),
    plugin("plugin without the name", "def event_loop(): ...\n", "mine.py has no 'loop'", "it has: event_loop"),
    plugin("plugin that imports nothing", "import no_such_module\n", "mine.py:1: ModuleNotFoundError", "mend"),
    plugin("missing plugin file", "", "there is no file yours.py", "relative to", path="yours.py:loop"),
    plugin("missing plugin module", "", "there is no module no_such_package", "install", path="no_such_package.loops:loop"),
    plugin("a class for a loop", "class loop:\n    def __init__(self, loop): ...\n", "mine.py:loop is a class", "async def loop(loop)"),
    plugin("a loop without arguments", "async def loop(): ...\n", "too many positional arguments", "docs/extending.md"),
    plugin("a number for a loop", "loop = 3\n", "mine.py:loop is 3, which cannot be called", "called (loop)"),
    own("strategy without its method", "batching", "class Mine: ...\n", "scenario.yaml:5:3: ", "has no method 'next_batch'", "def next_batch(self, scheduler)"),
    own("strategy that fails", "batching", "class Mine:\n    def next_batch(self, scheduler):\n        raise ValueError('oops')\n", "in mine.py:3, next_batch: ", "ValueError: oops", "mend mine.py:3"),
    own("strategy that cannot be made", "batching", "class Mine:\n    def __init__(self):\n        1 / 0\n", "in mine.py:3, __init__: ", "ZeroDivisionError", "mend mine.py:3"),
    own("policy that fails", "policy", "def Mine(waiting, scheduler):\n    waiting.sort(key=lambda one: one.length)\n", "in mine.py:2, <lambda>: ", "AttributeError", "mend mine.py:2"),
    own("policy whose library fails", "policy", "import json\ndef Mine(waiting, scheduler):\n    json.loads('oops')\n", "in mine.py:3, Mine: ", "JSONDecodeError", "mend mine.py:3"),
    own("loop that fails", "loop", "async def Mine(loop):\n    await loop.recv_requests(True)\n    raise KeyError('x')\n", "in mine.py:3, Mine: ", "KeyError: 'x'", "mend mine.py:3"),
    own("loop of another library", "loop", "import asyncio\nasync def Mine(loop):\n    await asyncio.sleep(1)\n", "in mine.py:3, Mine: ", "no running event loop", "mend mine.py:3"),
]

# fmt: on

CASES = [*FIELDS, *CONFLICTS, *TRACES, *FILES, *OPTIONS, *PLUGINS]
assert len({case.name for case in CASES}) == len(CASES)

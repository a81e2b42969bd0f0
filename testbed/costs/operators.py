"""What one device computes in a step, operator by operator, and what each operator costs there.

``Operators`` knows a model, a device and an engine's settings; it holds one curve or function an operator, made once.
Counts are for one rank of a tensor-parallel group. An operator with a measured table is priced from it and never below
its roofline; one without is priced by the profile's formula and listed in ``unmeasured``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from testbed.costs.capacity import kv_dtype, stage_layers
from testbed.costs.devices import DeviceProfile
from testbed.costs.experts import busiest_rank, exchange, expert_load
from testbed.costs.links import leaves_node, move_ns, nodes_of_stage
from testbed.costs.tables import Curve, DecodeAttention, GemmTable, MoeTable, PrefillAttention, between
from testbed.scenario.models import DTYPE_BYTES, ModelSpec
from testbed.scenario.schema import EngineConfig

Count = TypeVar("Count", float, NDArray[np.float64])
_M = [1 << i for i in range(16)]
"""Knots of a curve that a formula fills: exact between them, formulas being convex and nearly linear."""
_HALF = ("bfloat16", "float16")
_SAMPLING_KERNELS = 6
"""Temperature, softmax, sampling and the copies around them: a guess."""
_LAYER_SMALL = {"norms": ("norms",), "rope_kv_write": ("rope", "kv_write", "qk_norm"), "activation": ("activation",)}
"""Elementwise operators of a layer as they are measured, each with what it does of ``small_operators``."""


def _of_dtype(tables: dict[str, Any], dtype: str) -> Any:
    """What is measured in ``dtype``; where float16 is not, bfloat16 stands for it."""
    return tables.get(dtype) or (tables.get("bfloat16") if dtype in _HALF else None)


class Operators:
    """Operator times (ns, float) of a pipeline stage. Raises InputError if the model cannot be split or computed.

    ``seed`` names which experts are popular and which the tokens of a step choose.
    """

    def __init__(
        self, model: ModelSpec, device: DeviceProfile, engine: EngineConfig, stage: int = 0, seed: int = 0
    ) -> None:
        parallel = engine.parallel
        model.check_parallel(parallel.tp, parallel.ep)
        self.model, self.device, self.tp, self.ep = model, device, parallel.tp, parallel.ep
        self.nodes = nodes_of_stage(device, self.tp)
        self.per_node = self.tp // self.nodes
        self.dtype = engine.dtype
        self.weight_dtype = engine.dtype if engine.quantization == "none" else engine.quantization
        self.kv_dtype = kv_dtype(engine)
        device.peak(self.dtype)
        device.peak(self.weight_dtype)
        stages = stage_layers(model, parallel)
        self.layers = stages[stage]
        self.is_first, self.is_last = stage == 0, stage == parallel.pp - 1
        self._next_is_far = not self.is_last and leaves_node(device, self.tp, stage)
        self.heads, self.kv_heads = model.heads // self.tp, model.kv_heads_per_gpu(self.tp)
        self.size = DTYPE_BYTES[self.dtype]
        self.kv_token_bytes = 2 * self.kv_heads * model.head_dim * DTYPE_BYTES[self.kv_dtype]
        self.unmeasured: list[str] = []
        self._load = None
        if self.ep > 1:
            here = range(sum(stages[:stage]), sum(stages[: stage + 1]))
            self._load = expert_load(model.experts, model.experts_per_token, self.ep, engine.experts, here, seed)
        self._sends_tokens = self._load is not None and engine.experts.dispatch == "all_to_all"
        self._gemms = {name: self._gemm(name, *shape, self.weight_dtype) for name, shape in self.shapes().items()}
        if model.is_moe:
            self._gemms["router"] = self._gemm("router", model.experts, model.hidden, self.dtype)
            self._gemms["experts"] = self._experts()
        self._lm_head = self._gemm("lm_head", -(-model.vocab // self.tp), model.hidden, self.dtype)
        self._prefill = self._prefill_attention()
        self._decode = self._decode_attention()
        self._mixed = self._mixed_attention()
        self._reduce = {graph: self._all_reduce(graph) for graph in (True, False)} if self.tp > 1 else {}
        self._exchange = self._all_to_all() if self._sends_tokens else {}
        self._elementwise = self._measured_elementwise()
        self._sampling = self._measured_sampling()
        self._step = self._measured_step()
        skew = device.tables.get("decode_skew", {"tokens": [1], "share": [device.decode_skew]})
        self._skew_tokens: list[int] = skew["tokens"]
        self._skew_share: list[float] = skew["share"]
        self._note_formulas()

    # ---- shapes ------------------------------------------------------------------------------------------------------

    def shapes(self) -> dict[str, tuple[int, int]]:
        """(n, k) of a layer's dense products on this rank."""
        model, dim = self.model, self.model.head_dim
        shapes = {
            "qkv": ((self.heads + 2 * self.kv_heads) * dim, model.hidden),
            "o": (model.hidden, self.heads * dim),
        }
        if not model.is_moe:
            width = -(-model.intermediate // self.tp)
            shapes |= {"gate_up": (2 * width, model.hidden), "down": (model.hidden, width)}
        return shapes

    @property
    def expert_width(self) -> int:
        """Width of a routed expert on this rank."""
        return -(-self.model.moe_intermediate * self.ep // self.tp)

    def small_operators(self) -> dict[str, tuple[int, int]]:
        """A layer's memory-bound operators: bytes moved a token, and kernels."""
        model, size = self.model, self.size
        heads_width = (self.heads + self.kv_heads) * model.head_dim
        written = 2 * self.kv_heads * model.head_dim * (size + DTYPE_BYTES[self.kv_dtype])
        out: dict[str, tuple[int, int]] = {
            "norms": (2 * 4 * model.hidden * size, 2),  # each reads and writes the hidden state and the residual
            "rope": (2 * heads_width * size, 1),
            "kv_write": (written, 1),
        }
        if model.qk_norm:
            out["qk_norm"] = (2 * heads_width * size, 2)
        if model.is_moe:
            out["topk"] = (model.experts * 4 + model.experts_per_token * 8, 1)
        else:
            out["activation"] = (3 * -(-model.intermediate // self.tp) * size, 1)
        if self.weight_dtype != self.dtype:
            inputs = [k for _, k in self.shapes().values()]
            out["quantize"] = (sum(inputs) * (size + DTYPE_BYTES[self.weight_dtype]), len(inputs))
        return out

    @property
    def kernels(self) -> int:
        """Kernels of a step: the operators of every layer, and those before and after the layers."""
        dense = len(self.shapes())
        attention = 2  # one over the splits of the context, one that merges them
        experts = 6 if self.model.is_moe else 0  # router, sorting (2), two grouped products, activation and sum
        small = sum(kernels for _, kernels in self.small_operators().values())
        layer = dense + attention + experts + small + self.reduces + len(self._exchange)
        head = (2 + _SAMPLING_KERNELS + (1 if self.tp > 1 else 0)) if self.is_last else 0
        return self.layers * layer + (1 if self.is_first else 0) + head

    @property
    def reduces(self) -> int:
        """All-reduces of a layer. Where tokens are sent to experts, one: it scatters tokens over the devices behind the
        attention, and gathers them before the next."""
        if self.tp == 1:
            return 0
        return 1 if self._exchange else 2

    # ---- curves ------------------------------------------------------------------------------------------------------

    def _gemm_roofline(self, dtype: str) -> tuple[float, float]:
        return self.device.peak(dtype), self.device.bytes_per_ns / DTYPE_BYTES[dtype]

    def _gemm(self, name: str, n: int, k: int, dtype: str) -> Curve:
        """Time over tokens. The roofline's bytes are the weights: activations may be in the cache."""
        peak, weights_per_ns = self._gemm_roofline(dtype)

        def roofline(m: float, n: int, k: int) -> float:
            return max(2.0 * m * n * k / peak, n * k / weights_per_ns)

        tables = self.device.tables.get("gemm", {})
        data = _of_dtype(tables, dtype)
        if data is None:
            self.unmeasured.append(f"{name} GEMM in {dtype}: formula")
            size = DTYPE_BYTES[dtype]
            times = [self.device.formula_ns(2.0 * m * n * k, size * (n * k + m * (n + k)), dtype) for m in _M]
            return Curve(_M, times)
        table = GemmTable(data)
        if dtype not in tables:
            self.unmeasured.append(f"{name} GEMM in float16: the table of bfloat16")
        if not table.holds(n, k):
            self.unmeasured.append(f"{name} GEMM n={n} k={k}: utilisation of the nearest measured shape")
        return table.curve(n, k, roofline)

    def expected_experts(self, tokens: Count) -> Count:
        """Experts of a layer that ``tokens`` tokens activate when each picks evenly."""
        model = self.model
        missed: Count = (1.0 - model.experts_per_token / model.experts) ** tokens
        return model.experts * (1.0 - missed)

    def _experts(self) -> Curve:
        """Time over tokens of a layer's routed experts, their activation included, on the busiest rank."""
        model, dtype = self.model, self.weight_dtype
        peak, per_ns = self.device.peak(dtype), self.device.bytes_per_ns / DTYPE_BYTES[dtype]

        def roofline(tokens: float, hidden: int, width: int, topk: int, experts: int) -> float:
            active = experts * (1.0 - math.pow(1.0 - topk / experts, tokens))
            return max(6.0 * tokens * topk * hidden * width / peak, 3.0 * active * hidden * width / per_ns)

        shape = (model.hidden, self.expert_width, model.experts_per_token, model.experts)
        data = _of_dtype(self.device.tables.get("moe", {}), dtype)
        if data is None:
            self.unmeasured.append(f"routed experts in {dtype}: formula")
            formula = self.device.formula
            slack = min(formula.compute_efficiency, formula.memory_efficiency)
            launches = 5 * formula.kernel_ns
            return self._of_busiest_rank(Curve(_M, [roofline(m, *shape) / slack + launches for m in _M]))
        table = MoeTable(data)
        if not table.holds(*shape):
            self.unmeasured.append(f"routed experts {shape}: utilisation of the nearest measured shape")
        return self._of_busiest_rank(table.curve(roofline, *shape))

    def _of_busiest_rank(self, every: Curve) -> Curve:
        """The time of a layer's experts on the busiest expert-parallel rank; ``every``: of all experts on one.

        A rank that has every token also writes, activates and sums the rows of pairs whose experts lie elsewhere, as
        SGLang's fused kernels do: the outputs of both products as zeros, then once more through the other kernels.
        """
        if self._load is None:
            return every
        model, formula = self.model, self.device.formula
        self.unmeasured.append(f"experts on the busiest of {self.ep} ranks: tokens drawn, its part of the time of all")
        elsewhere = 0.0
        if not self._sends_tokens:
            row_bytes = (5 * self.expert_width + 2 * model.hidden) * self.size
            pairs = model.experts_per_token * (self.ep - 1) / self.ep
            elsewhere = pairs * row_bytes / (formula.memory_efficiency * self.device.bytes_per_ns)
        return busiest_rank(self._load, every, 5 * formula.kernel_ns, elsewhere)

    def _all_to_all(self) -> dict[str, Curve]:
        """Time over tokens of sending them to the ranks of their experts, and of sending the outputs back."""
        assert self._load is not None
        self.unmeasured.append("dispatch to experts and combining: formula")
        sizes = {"dispatch": DTYPE_BYTES[self.weight_dtype], "combine": DTYPE_BYTES[self.dtype]}
        token_bytes = {name: self.model.hidden * size for name, size in sizes.items()}
        return {name: exchange(self._load, self.device, self.nodes, b, _M) for name, b in token_bytes.items()}

    def _prefill_attention(self) -> PrefillAttention | None:
        data = _of_dtype(self.device.tables.get("prefill", {}), self.dtype)
        if not data:
            self.unmeasured.append(f"prefill attention in {self.dtype}: formula")
            return None
        table = PrefillAttention(data, self.heads, self.kv_heads, self.model.head_dim)
        if not table.exact:
            self.unmeasured.append("prefill attention: nearest measured heads, batch scaled to them")
        if not table.measures_prefix:
            self.unmeasured.append("prefill attention behind a cached prefix: as the whole prompt of equal work")
        if self.kv_dtype not in (self.dtype, *_HALF):
            self.unmeasured.append(f"prefill attention with {self.kv_dtype} KV: the table of {self.dtype}")
        return table

    def _decode_attention(self) -> DecodeAttention | None:
        data = self._of_kv("decode")
        if not data:
            self.unmeasured.append(f"decode attention in {self.dtype} with {self.kv_dtype} KV: formula")
            return None
        table = DecodeAttention(data, self.heads, self.kv_heads, self.model.head_dim)
        if not table.exact:
            self.unmeasured.append("decode attention: nearest measured heads, batch scaled to them")
        return table

    def _mixed_attention(self) -> DecodeAttention | None:
        data = self._of_kv("mixed_decode")
        if not data:
            self.unmeasured.append("attention of a batch that prefills and decodes: the sum of its parts")
            return None
        return DecodeAttention(data, self.heads, self.kv_heads, self.model.head_dim)

    def _of_kv(self, operator: str) -> list[dict[str, Any]] | None:
        """Tables of decode attention by dtype of the KV. Computing is in half precision but for KV in float32."""
        if (self.dtype == "float32") != (self.kv_dtype == "float32"):
            return None
        found: list[dict[str, Any]] | None = _of_dtype(self.device.tables.get(operator, {}), self.kv_dtype)
        return found

    def _all_reduce(self, graph: bool) -> Curve:
        """Time over elements: within the nodes, and then of each device's part between them."""
        curve = self._node_all_reduce(graph)
        if self.nodes == 1:
            return curve
        if graph:
            self.unmeasured.append(f"all-reduce between {self.nodes} nodes: formula")
        element_bytes = 2.0 * (self.nodes - 1) / self.nodes / self.per_node * self.size
        between = [move_ns(self.device, 0.0, element_bytes * x) for x in curve.xs]
        return Curve(curve.xs, [near + far for near, far in zip(curve.ys, between, strict=True)])

    def _node_all_reduce(self, graph: bool) -> Curve:
        """Time over elements, within a node. An eager call costs on the device what the graph's does, plus its copy
        into the shared buffer; the floor of the eager table is launching, which the host profile prices."""
        device, size, formula = self.device, DTYPE_BYTES[self.dtype], self.device.formula
        data = device.tables.get("all_reduce", {})
        in_graph = data.get("graph", {}).get(str(self.per_node))
        if in_graph is None or self.dtype not in _HALF:
            if graph:
                self.unmeasured.append(f"all-reduce over {self.per_node} devices: formula")
            sent = 2.0 * (self.per_node - 1) / self.per_node
            per_element = sent * size / (formula.link_efficiency * device.link_bytes_per_ns)
            knots = [1 << i for i in range(0, 31, 2)]
            return Curve(knots, [formula.all_reduce_ns + per_element * x for x in knots])
        times = in_graph
        eager = data.get("eager", {}).get(str(self.per_node))
        if not graph and eager is not None:
            times = [max(g, g0) for g, g0 in zip(in_graph, (e - eager[0] + in_graph[0] for e in eager), strict=True)]
        return Curve(data["elements"], times).raised(lambda x: x * size / device.link_bytes_per_ns)

    def elementwise_bytes(self) -> dict[str, int]:
        """Bytes that a token moves in each operator of the table ``elementwise``, one layer of it."""
        small = self.small_operators()
        moved = {
            name: sum(small[part][0] for part in parts if part in small)
            for name, parts in _LAYER_SMALL.items()
            if parts[0] in small
        }
        return {**moved, "embedding": 2 * self.model.hidden * self.size}

    def _measured_elementwise(self) -> dict[str, Curve]:
        """Time over tokens of the elementwise operators; empty where they are not measured."""
        data, moved = _of_dtype(self.device.tables.get("elementwise", {}), self.dtype), self.elementwise_bytes()
        if data is None or moved.keys() - data.keys():
            self.unmeasured.append("norms, rope, KV write, activation, embedding: bytes at a stated efficiency")
            return {}
        if any(data[name]["token_bytes"] != token_bytes for name, token_bytes in moved.items()):
            self.unmeasured.append(
                "norms, rope, KV write, activation, embedding: by the bytes of another model's tokens"
            )
        return {name: self._by_bytes(data[name], token_bytes) for name, token_bytes in moved.items()}

    def _by_bytes(self, data: dict[str, Any], token_bytes: int) -> Curve:
        """Time over tokens of ``token_bytes`` each: equal bytes cost alike."""
        tokens = [t * data["token_bytes"] / token_bytes for t in data["tokens"]]
        return Curve(tokens, data["ns"]).raised(lambda t: t * token_bytes / self.device.bytes_per_ns)

    def _measured_sampling(self) -> Curve | None:
        """Time over rows, where measured; equal logits cost alike."""
        data, vocab = self.device.tables.get("sampling"), self.model.vocab
        if data is None:
            self.unmeasured.append("sampling: a constant and the logits' bytes")
            return None
        if data["vocab"] != vocab:
            self.unmeasured.append(f"sampling: by the logits of a vocabulary of {data['vocab']}")
        rows = [r * data["vocab"] / vocab for r in data["rows"]]
        return Curve(rows, data["ns"]).raised(lambda r: 4.0 * r * vocab / self.device.bytes_per_ns)

    def _measured_step(self) -> dict[str, Curve]:
        """What a step takes beyond its operators, over its tokens, for each kind of step that is measured."""
        data = self.device.tables.get("step")
        if data is None:
            return {}
        share = self.layers / data["layers"]
        if share != 1:
            self.unmeasured.append(f"a step beyond its operators: as with {data['layers']} layers, in proportion")
        kinds = {kind: part for kind, part in data.items() if kind != "layers"}
        return {kind: Curve(part["tokens"], [share * t for t in part["ns"]]) for kind, part in kinds.items()}

    def _note_formulas(self) -> None:
        if "decode_skew" not in self.device.tables:
            way = f"{self.device.decode_skew:g} of the way to the longest"
            self.unmeasured.append(f"decode rows of unequal context: {way}")
        if self.tp > 1:
            self.unmeasured.append("gathering logits: formula")
        if not self.is_last:
            self.unmeasured.append("activations to the next stage: formula")

    # ---- times -------------------------------------------------------------------------------------------------------

    def linear_ns(self, tokens: int, graph: bool) -> dict[str, float]:
        """What depends on the tokens of a step alone: every layer's products, small operators and all-reduces."""
        layers, device = self.layers, self.device
        out = {name: layers * curve.at(tokens) for name, curve in self._gemms.items()}
        per_ns = device.formula.memory_efficiency * device.bytes_per_ns
        measured = self._elementwise
        for name, (token_bytes, kernels) in self.small_operators().items():
            if not measured or name == "quantize":
                out[name] = layers * (tokens * token_bytes / per_ns + kernels * device.formula.kernel_ns)
        out |= {name: layers * curve.at(tokens) for name, curve in measured.items() if name != "embedding"}
        if self.tp > 1:
            out["all_reduce"] = layers * self.reduces * self._reduce[graph].at(tokens * self.model.hidden)
        out |= {name: layers * curve.at(tokens) for name, curve in self._exchange.items()}
        if self.is_first:
            formula = 2 * tokens * self.model.hidden * self.size / per_ns + device.formula.kernel_ns
            out["embedding"] = measured["embedding"].at(tokens) if measured else formula
        return out

    def step_ns(self, kind: str, tokens: int) -> float:
        """What a step of a ``kind`` (``graph`` or ``eager`` decode, ``prefill``) takes beyond its operators; 0 where
        that is not measured."""
        curve = self._step.get(kind)
        return curve.at(tokens) if curve else 0.0

    def head_ns(self, rows: int) -> dict[str, float]:
        """The last stage's work on the rows that sample: final norm (measured norms have it among them), output head,
        gathering of logits, sampling."""
        if not self.is_last or rows == 0:
            return {}
        device, model, formula = self.device, self.model, self.device.formula
        per_ns = formula.memory_efficiency * device.bytes_per_ns
        logits = 4.0 * rows * model.vocab
        out = {
            "lm_head": self._lm_head.at(rows),
            "sampling": self._sampling.at(rows) if self._sampling else 2 * logits / per_ns + formula.sampling_ns,
        }
        if not self._elementwise:
            out["final_norm"] = 4 * rows * model.hidden * self.size / per_ns + formula.kernel_ns
        if self.tp > 1:
            gathered = rows * model.vocab * self.size * (self.per_node - 1) / self.per_node
            far = rows * model.vocab * self.size * (self.nodes - 1) / self.nodes / self.per_node
            out["gather_logits"] = move_ns(device, gathered, far)
        return out

    def activation_ns(self, tokens: int) -> float:
        """From this stage to the next: the hidden state of ``tokens`` (the residual added), every device's copy to its
        counterpart over their own link; 0 behind the last stage."""
        if self.is_last:
            return 0.0
        moved = float(tokens * self.model.hidden * self.size)
        return move_ns(self.device, 0.0, moved) if self._next_is_far else move_ns(self.device, moved)

    def prefill_ns(self, new_tokens: Sequence[int], prefix_tokens: Sequence[int]) -> float:
        """Prefill attention of a batch in every layer."""
        scores = sum(n * p + n * (n + 1) // 2 for n, p in zip(new_tokens, prefix_tokens, strict=True))
        flops = 4.0 * self.heads * self.model.head_dim * scores
        kv_bytes = float(self.kv_token_bytes * sum(prefix_tokens))
        if self._prefill is None:
            return self.layers * self.device.formula_ns(flops, kv_bytes, self.dtype)
        least = self.device.roofline_ns(flops, kv_bytes, self.dtype)
        return self.layers * max(self._prefill.at(new_tokens, prefix_tokens), least)

    def decode_skew(self, rows: int, longest: int) -> float:
        """Where between mean and longest context lies the context at which equal rows take as long as unequal ones."""
        low, high, weight = between(self._skew_tokens, rows * longest)
        return self._skew_share[low] * (1 - weight) + self._skew_share[high] * weight

    @property
    def measures_mixed(self) -> bool:
        """Whether decode rows beside a prefill have a table of their own."""
        return self._mixed is not None

    def decode_curve(self, rows: int, beside_prefill: bool = False) -> Curve:
        """Decode attention of ``rows`` rows in every layer, over their mean context; the first knot is at 0.

        ``beside_prefill``: what they add to a batch that also prefills, where that is measured.
        """
        flops = 4.0 * rows * self.heads * self.model.head_dim
        kv_bytes = float(rows * self.kv_token_bytes)
        device, dtype = self.device, self.dtype
        table = self._mixed if beside_prefill and self._mixed else self._decode
        if table is None:
            knots = [1.0, 1024.0]
            curve = Curve(knots, [device.formula_ns(flops * c, kv_bytes * c, dtype) for c in knots])
        else:
            curve = table.curve(rows, lambda c: device.roofline_ns(flops * c, kv_bytes * c, dtype))
        ys = [self.layers * y for y in curve.ys]
        return Curve([0.0, *curve.xs], [ys[0], *ys])

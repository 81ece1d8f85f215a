"""A peer for the same problem: Humming's INT4 products, if its package and torch are installed.

Its time is that of a CUDA graph of the calls that `timing` puts into the body of a loop, replayed
as often as that loop goes round, between two events of the device: as there, no host is waited for.
Its result is checked, loosely: against its own weights before it quantized them, to a quarter of
the result's root mean square (rounding normal numbers to 4 bits takes about a ninth), which tells a
product that is driven wrongly from one that is not. Humming runs in this process: a fault in its
kernels ends the run, and its memory is what JAX leaves.
"""

import copy
import importlib
import importlib.metadata
import importlib.util
import itertools
import math
import statistics
import subprocess
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jax_marlin.bench.problems import Batch, Quantization
from jax_marlin.bench.shapes import Shape
from jax_marlin.bench.timing import rounds_for

# What a peer may raise without an end to the run: torch's errors are RuntimeErrors, a compiler that
# fails or is missing is the next two, the rest comes from arguments that another version refuses.
ERRORS = (
    RuntimeError, OSError, subprocess.SubprocessError,
    ImportError, ValueError, TypeError, LookupError, AttributeError, AssertionError,
)  # fmt: skip
_LOOSE, _CHECKED_ROWS = 0.25, 8
_WARM_UP = 3
_SHIFT = 61  # output features that the next expert's weights are rolled by
_GEMM_TYPES = {"dense": "dense", "indexed": "indexed", "grouped": "grouped_contiguous"}


def why_not(quantization: Quantization) -> str | None:
    """Why Humming cannot be timed here; None if it can."""
    for module, package in (("humming", "humming-kernels"), ("torch", "torch")):
        if importlib.util.find_spec(module) is None:
            return f"{package} is not installed"
    if jax.default_backend() != "gpu":
        return f"JAX runs on {jax.default_backend()}"
    if quantization.dtype.itemsize != 2:
        return f"no {quantization.dtype} activations"
    try:
        return None if _torch().cuda.is_available() else "torch finds no CUDA device"
    except ERRORS as error:
        return _text(error)


def version() -> str:
    """Of Humming and torch."""
    return ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("humming-kernels", "torch"))


def attempt(function: Callable[..., Any], *args: Any) -> tuple[Any, str | None]:
    """(what the function returned, None), or (None, what was wrong) where the peer failed."""
    try:
        return function(*args), None
    except ERRORS as error:
        return None, _text(error)


class Humming:
    """Humming's weights for a dense or moe shape, in as many copies as ours.

    One random expert is quantized; the others are the same one, rolled along its output features,
    so that a product with the wrong expert is far from the right one. Copies have equal values in
    memory of their own. All numbers of rows and all ways of calling share them.

    Left alone, Humming chooses kernels for all numbers of rows up to 65536 and compiles them, about
    fifty for a moe shape, before the first of them runs. It is given its own choices for `rows`
    alone: the same kernels run. A mode's first call compiles them, side by side.
    """

    def __init__(self, shape: Shape, quantization: Quantization, copies: int, rows: Sequence[int]):
        """`rows`: every number of tokens that `microseconds` gets."""
        layer_type = importlib.import_module("humming.layer").HummingLayer
        torch = _torch()
        self.shape, self.dtype = shape, getattr(torch, str(quantization.dtype))
        experts = None if shape.kind == "dense" else shape.experts
        group_size = max(quantization.group_size, 0)  # 0: one group
        self.weight = torch.randn(shape.n, shape.k, device="cuda", dtype=self.dtype)
        with torch.device("cuda"):  # gigabytes need not pass through the host
            layer = layer_type(
                shape_n=shape.n, shape_k=shape.k, num_experts=experts, torch_dtype=self.dtype,
                weight_config={"dtype": f"int{quantization.bits}", "group_size": group_size},
            )  # fmt: skip
        schema = layer.weight_schema
        for name, packed in schema.quant_tensor(self.weight, schema, self.dtype).items():
            own = getattr(layer, name).data
            for expert, part in enumerate(own if experts else [own]):
                part.copy_(packed.roll(_SHIFT * expert, 0))
        layer.transform()
        self.layers = [layer, *(copy.deepcopy(layer) for _ in range(copies - 1))]
        modes = ("dense",) if shape.kind == "dense" else ("indexed", "grouped")
        self.configs = {mode: self._configs(mode, rows) for mode in modes}

    def close(self) -> None:
        """Gives the memory back, which torch would keep from JAX."""
        self.layers.clear()
        _torch().cuda.empty_cache()

    def microseconds(self, batch: Batch, expected_us: float, runs: int) -> dict[str, float]:
        """The time of one call by each way of calling it ("dense"; "indexed", "grouped").

        Args:
            batch: our calls.
            expected_us: microseconds that one takes at least.
            runs: of which the median counts.

        Raises:
            ValueError: a result is far from the product with the unquantized weights.
        """
        shape, torch = self.shape, _torch()
        x = torch.randn(*batch.operands[0][0].shape, device="cuda", dtype=self.dtype)
        if shape.kind == "dense":
            modes = {"dense": [{"inputs": x} for _ in batch.topk_ids]}
        else:
            modes = {"indexed": self._indexed(x, batch), "grouped": self._grouped(x, batch)}
        times = {}
        for mode, calls in modes.items():

            def run(call: int, calls=calls, configs=self.configs[mode]):
                return self.layers[call % len(self.layers)](**calls[call], **configs)

            self._check(mode, run(0), x, batch.topk_ids[0])
            replays = rounds_for(len(calls), expected_us)
            times[mode] = _graph_microseconds(torch, run, len(calls), replays, runs)
        return times

    def _configs(self, mode: str, rows: Sequence[int]) -> dict[str, Any]:
        """What each call of this mode is told: its kind, and a kernel for each number of rows.

        A kernel is for more rows than the one before it has, up to its own number.
        """
        routed = sorted({count * self.shape.top_k for count in rows})
        kernels = [
            [low, high, self._tuned(mode, high)] for low, high in itertools.pairwise([0, *routed])
        ]
        return {"compute_config": {"gemm_type": _GEMM_TYPES[mode]}, "tuning_config": kernels}

    def _tuned(self, mode: str, rows: int) -> dict[str, Any]:
        """What Humming would choose for so many routed rows."""
        tune = importlib.import_module("humming.tune")
        return tune.get_heuristics_config(
            layer_config=self.layers[0].humming_config, shape_m=rows, gemm_type=_GEMM_TYPES[mode]
        )

    def _indexed(self, x, batch: Batch) -> list[dict[str, Any]]:
        """Rows are gathered and scattered by the kernel, as `moe_matmul` does."""
        rows, top_k = batch.topk_ids[0].size, self.shape.top_k
        block = self._tuned("indexed", rows)["block_shape"][0]
        calls = []
        for ids in batch.topk_ids:
            slots, experts = aligned(ids, block)
            calls.append({
                "inputs": x,
                "outputs": self._outputs(rows),
                "sorted_ids": _device(slots),
                "expert_ids": _device(experts),
                "num_tokens_padded": _device(np.array([slots.size], np.int32)),
                "top_k": 1 if self.shape.routed_input else top_k,
            })  # fmt: skip
        return calls

    def _grouped(self, x, batch: Batch) -> list[dict[str, Any]]:
        """Rows stand in the experts' order already: less work than `moe_matmul` has."""
        calls = []
        for ids in batch.topk_ids:
            counts = np.bincount(ids.ravel(), minlength=self.shape.experts)
            calls.append({
                "inputs": self._routed(x, ids, np.argsort(ids.ravel(), kind="stable")),
                "outputs": self._outputs(ids.size),
                "expert_layout": _device(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)),
            })  # fmt: skip
        return calls

    def _outputs(self, rows: int):
        return _torch().empty(rows, self.shape.n, device="cuda", dtype=self.dtype)

    def _routed(self, x, ids: np.ndarray, rows: np.ndarray):
        """x of these routed rows."""
        return x[_device(rows if x.shape[0] == ids.size else rows // self.shape.top_k)]

    def _check(self, mode: str, result, x, ids: np.ndarray) -> None:
        dense = mode == "dense"
        order = np.argsort(ids.ravel(), kind="stable")  # the experts' order
        routed = np.arange(x.shape[0] if dense else ids.size) if mode != "grouped" else order
        rows = np.unique(np.linspace(0, len(routed) - 1, _CHECKED_ROWS).astype(np.int64))
        sampled = routed[rows]
        experts = np.zeros(rows.size, int) if dense else ids.ravel()[sampled]
        inputs = x[_device(sampled)] if dense else self._routed(x, ids, sampled)
        product = (inputs.float() @ self.weight.float().T).cpu().numpy()
        expected = np.stack([
            np.roll(row, _SHIFT * int(expert))
            for row, expert in zip(product, experts, strict=True)
        ])  # fmt: skip
        got = result[_device(rows)].float().cpu().numpy()
        error = math.sqrt(np.mean((got - expected) ** 2) / np.mean(expected**2))
        if not error < _LOOSE:
            raise ValueError(f"{mode}: off by {error:.2g} of the result's root mean square")


def aligned(ids: np.ndarray, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Routed rows by expert, padded with their number to whole blocks; each block's expert."""
    flat = ids.ravel()
    slots, experts = [], []
    for expert in np.unique(flat):
        rows = np.flatnonzero(flat == expert)
        slots.append(np.pad(rows, (0, -rows.size % block), constant_values=flat.size))
        experts += [expert] * (slots[-1].size // block)
    return np.concatenate(slots).astype(np.int32), np.array(experts, np.int32)


def _graph_microseconds(
    torch, run: Callable[[int], Any], calls: int, replays: int, runs: int
) -> float:
    """The median over runs of one call's time, in replays of a CUDA graph of all calls."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles what a graph could not capture
        for call in range(calls):
            run(call)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in range(calls):
            run(call)
    samples = []
    for _ in range(_WARM_UP + runs):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        samples.append(start.elapsed_time(end) * 1e3 / (replays * calls))  # from milliseconds
    return statistics.median(samples[_WARM_UP:])


def _torch() -> Any:
    return importlib.import_module("torch")  # optional, and slow to import


def _device(array: np.ndarray):
    return _torch().from_numpy(array).cuda()


def _text(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".strip()[:300]

"""The named problems: what real models multiply, and a tiny set for machines without a GPU."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Shape:
    """One problem; its name is `set.part`.

    Attributes:
        name: e.g. "qwen3-30b.gate_up".
        kind: "dense" (matmul), "moe" (moe_matmul) or "layer" (moe_ffn).
        k: reduction size K; of a layer, the hidden size H.
        n: output features N; of a layer, the intermediate size I.
        experts: E.
        top_k: experts of a token.
        routed_input: x has one row for each (token, expert) pair, as a down projection's has.
    """

    name: str
    kind: str
    k: int
    n: int
    experts: int = 1
    top_k: int = 1
    routed_input: bool = False

    @property
    def linears(self) -> list[tuple[int, int]]:
        """(K, N) of one expert's weights."""
        return (
            [(self.k, 2 * self.n), (self.n, self.k)] if self.kind == "layer" else [(self.k, self.n)]
        )

    @property
    def expert_weights(self) -> int:
        """Weights of one expert."""
        return sum(k * n for k, n in self.linears)

    def flops(self, rows: int) -> int:
        """Multiplications and additions for `rows` tokens."""
        return 2 * rows * self.top_k * self.expert_weights

    def touched_experts(self, rows: int) -> int:
        """The most experts that `rows` tokens can reach."""
        return min(self.experts, rows * self.top_k)


def _experts(name: str, hidden: int, intermediate: int, experts: int, top_k: int) -> list[Shape]:
    """gate_up, down and the whole layer of one model."""
    return [
        Shape(f"{name}.gate_up", "moe", hidden, 2 * intermediate, experts, top_k),
        Shape(f"{name}.down", "moe", intermediate, hidden, experts, top_k, routed_input=True),
        Shape(f"{name}.layer", "layer", hidden, intermediate, experts, top_k),
    ]


_DENSE = [(4096, 4096), (4096, 12288), (8192, 8192), (8192, 28672)]

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in [
        Shape("tiny.dense", "dense", 256, 192),
        *_experts("tiny", hidden=192, intermediate=128, experts=6, top_k=2),
        *(Shape(f"dense.{k}x{n}", "dense", k, n) for k, n in _DENSE),
        *_experts("qwen3-30b", hidden=2048, intermediate=768, experts=128, top_k=8),
        *_experts("mixtral-8x7b", hidden=4096, intermediate=14336, experts=8, top_k=2),
        *_experts("deepseek-v3", hidden=7168, intermediate=2048, experts=256, top_k=8),
    ]
}


def select(names: Sequence[str]) -> list[Shape]:
    """The problems of these names, each once; a set's name means all its parts.

    Raises:
        ValueError: there is no such problem or set.
    """
    chosen: dict[str, Shape] = {}
    for name in names:
        found = {s.name: s for s in SHAPES.values() if name in (s.name, s.name.split(".")[0])}
        if not found:
            sets = dict.fromkeys(s.split(".")[0] for s in SHAPES)
            raise ValueError(
                f"bench: no problem is named {name!r}, expected a set ({', '.join(sets)}) or one "
                f"of {', '.join(SHAPES)}"
            )
        chosen |= found
    return list(chosen.values())

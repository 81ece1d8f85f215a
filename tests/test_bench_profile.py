"""The profile of a decode step: which scopes kernels come from, overlaps, and the whole command."""

import json
import os
import re

import jax
import jax.numpy as jnp
import pytest

from jax_marlin.bench import profile
from jax_marlin.bench.trace import Kernel, by_part, scopes, traced


def _in_scopes(x):
    with jax.named_scope("mlp"):
        y = jnp.tanh(x @ x)
    with jax.named_scope("norms"), jax.named_scope("lm_head"):
        return jax.lax.fori_loop(0, 3, lambda _, z: jnp.sin(z @ x), y)


def test_kernels_of_a_program_are_found_in_their_scopes():
    x = jnp.ones((64, 64))
    compiled = jax.jit(_in_scopes).lower(x).compile()
    found = scopes(compiled.as_text() or "")
    parts = by_part(traced(lambda: compiled(x)), found, profile.part_of)
    assert {"MLP besides experts", "lm_head"} <= set(parts)
    assert parts["lm_head"].launches >= 3 * parts["MLP besides experts"].launches > 0
    assert all(part.ns > 0 for part in parts.values())


def test_control_flow_is_no_kernel():
    text = jax.jit(_in_scopes).lower(jnp.ones((64, 64))).compile().as_text() or ""
    loops = re.findall(r"%(\S+) = .* while\(", text)
    assert loops and not set(loops) & set(scopes(text))


def test_overlap_counts_once():
    kernels = [
        Kernel("a", 0, 10), Kernel("b", 2, 16), Kernel("a", 3, 9), Kernel("loop", 0, 99),
        Kernel("a", 20, 21),
    ]  # fmt: skip
    parts = by_part(kernels, {"a": "jit(f)/mlp", "b": "jit(f)/router/dot"}, profile.part_of)
    assert (parts["MLP besides experts"].launches, parts["MLP besides experts"].ns) == (3, 11)
    assert (parts["router"].launches, parts["router"].ns) == (1, 6)


@pytest.mark.parametrize(
    ("scope", "part"),
    [
        ("jit(decode)/while/body/self_attn/qkv_proj/ffi_call", "q, k, v projection"),
        ("jit(decode)/while/body/self_attn/dot_general", "attention, rotation, cache"),
        ("jit(decode)/while/body/mlp/router/top_k", "router"),
        ("jit(decode)/while/body/mlp/shared/dot_general", "MLP besides experts"),
        ("jit(decode)/while/body/not_mlp/dot_general", "embedding and loop"),
        ("", "embedding and loop"),
    ],
)
def test_the_innermost_part_counts(scope, part):
    assert profile.part_of(scope) == part


def test_command_reports_every_part(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))  # undone afterwards
    file = tmp_path / "a.json"
    argv = ["--model", "tiny", "--batch", "1", "3", "--new-tokens", "2", "--json", str(file)]
    assert profile.main(argv) == 0
    records = json.loads(file.read_text())["records"]
    assert [r["batch"] for r in records] == sorted(r["batch"] for r in records)
    for batch in (1, 3):
        *parts, everything = [r for r in records if r["batch"] == batch]
        names = {r["part"] for r in parts}
        assert {"q, k, v projection", "output projection", "router", "experts"} <= names
        assert everything["part"] == "all" and everything["share"] == 1
        assert sum(r["us"] for r in parts) == pytest.approx(everything["us"])
        assert [r["us"] for r in parts] == sorted((r["us"] for r in parts), reverse=True)
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["3", "all"]
    assert os.environ["XLA_FLAGS"].endswith("--xla_gpu_enable_command_buffer=")

"""The benchmark of packing and loading: its checkpoints, its records, no time for what is wrong."""

import json
from typing import Any

import numpy as np
import oracle
import pytest
from awq_tensors import awq_weight

from jax_marlin import native_repack
from jax_marlin.bench import marked, packing, synthetic_experts
from jax_marlin.bench.check import WrongResultError
from jax_marlin.checkpoints import open_checkpoint

TINY = ["--sizes", "128x64", "64x192", "--experts", "3", "--group-size", "32", "--runs", "1"]


@pytest.mark.parametrize("form", synthetic_experts.FORMATS)
def test_checkpoints_hold_what_their_weights_say(form, tmp_path):
    names = synthetic_experts.write(tmp_path, form, 2, 96, 64, 32)
    checkpoint = open_checkpoint(tmp_path)
    stack: Any = checkpoint.load_expert_stack(names)
    assert len({stack.dequantize()[e].tobytes() for e in range(2)}) == 2
    for e, name in enumerate(names):
        parts = ("qweight", "scales", "qzeros", *(["g_idx"] if form != "awq" else []))
        tensors: dict[str, Any] = {part: checkpoint.tensor(f"{name}.{part}") for part in parts}
        if form == "awq":
            exact = awq_weight(tensors, 32)
        else:
            exact = oracle.gptq_weight(**tensors, bits=4, group_size=32)
        weights = [
            [synthetic_experts.weight_of(form, tensors, k, n) for n in range(64)] for k in range(96)
        ]
        np.testing.assert_array_equal(weights, exact)
        np.testing.assert_array_equal(stack[e].dequantize(np.float32), exact)
    assert len(set(tensors["scales"].ravel())) > 1
    assert form != "act-order" or (np.diff(tensors["g_idx"]) < 0).any()


def test_command_reports_packing_and_loading(tmp_path, capsys):
    file, page = tmp_path / "a.json", tmp_path / "a.md"
    assert packing.main([*TINY, "--json", str(file), "--markdown", str(page)]) == 0
    saved = json.loads(file.read_text())
    packers = ["numpy"] if native_repack.extension() is None else ["extension", "numpy"]
    assert [(r["k"], r["format"], r["packer"]) for r in saved["records"]] == [
        (k, form, packer)
        for k in (128, 64)
        for form in synthetic_experts.FORMATS
        for packer in packers
    ]
    assert all(r["packed_gb_per_s"] > 0 and r["loaded_gb_per_s"] > 0 for r in saved["records"])
    assert "threads of" in saved["conditions"]["device"] and saved["conditions"]["group_size"] == 32
    assert capsys.readouterr().out.splitlines()[-1].split()[:2] == ["awq", "64"]
    begin, text, *table, end = page.read_text().splitlines()
    assert (begin, end) == marked.markers("packing") and "group size 32" in text
    assert len(table) == 3 + 6 and table[-1].startswith("| 64 × 192, awq | ")


def test_wrong_weights_are_not_timed(monkeypatch):
    monkeypatch.setattr(synthetic_experts, "weight_of", lambda *_: 77.0)
    monkeypatch.setattr(packing, "_seconds", None)  # not to be called
    with pytest.raises(WrongResultError, match=r"gptq: weight \(.* of expert 0 is .*, expected 77"):
        next(packing.measure("gptq", 2, 64, 64, 32, runs=1))


def test_each_packer_is_checked(monkeypatch):
    monkeypatch.setattr(native_repack.repack_rows, "pack_awq_words", lambda words, out: out.fill(1))
    monkeypatch.setattr(packing, "_seconds", lambda work, runs: 1.0)
    with pytest.raises(WrongResultError, match=r"awq: weight \("):
        list(packing.measure("awq", 2, 64, 64, 32, runs=1))


def test_wrong_packing_is_not_timed(monkeypatch):
    monkeypatch.setattr(packing, "pack_canonical", lambda weights, spec, out: out.fill(1))
    monkeypatch.setattr(packing, "_seconds", None)
    with pytest.raises(WrongResultError, match="words packed in memory differ"):
        next(packing.measure("awq", 2, 64, 64, 32, runs=1))


def test_numpy_packs_where_it_is_asked_to():
    found = native_repack.extension
    with packing._packing_by("numpy"):
        assert native_repack.extension() is None
    assert native_repack.extension is found


@pytest.mark.parametrize("threads, experts", [(1, 4), (2, 4), (3, 6), (8, 8)])
def test_threads_have_experts_alike(threads, experts, monkeypatch):
    monkeypatch.setattr(packing, "thread_count", lambda: threads)
    assert packing._experts(4096, 14336) == experts


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--sizes", "128"], "argument --sizes: '' is no number from 1 on"),
        (["--sizes", "192x64"], "--sizes has 192x64, expected K a multiple of 8 and of --group-"),
        (["--sizes", "128x60"], "expected K a multiple of 8 and of --group-size 128, and N of 8"),
        (["--markdown", __file__], "expected one line <!-- packing:begin -->"),
    ],
)
def test_what_cannot_be_measured_or_written_is_refused(argv, message, capsys):
    with pytest.raises(SystemExit):
        packing.main(argv)
    assert message in capsys.readouterr().err

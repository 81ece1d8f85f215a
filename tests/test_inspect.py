"""`inspect`: the table it prints, and that it reads headers only."""

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from synthetic_checkpoints import gptq_tensors, quantization, write, write_json, write_raw

from jax_marlin.checkpoints import shards
from jax_marlin.inspect import describe, main

QWEN = "qwen3moe-gptq-sym-g128"


GOLDEN = Path(__file__).parent / "data" / "inspect"  # one file a checkpoint, all but the path


def rows(text):
    """The table's rows as lists of cells, which two spaces or more separate."""
    table = text.partition("\n\n")[2]
    return [re.split(r"\s{2,}", line) for line in table.splitlines()]


def test_real_checkpoint(find_checkpoint):
    text = describe(find_checkpoint(QWEN))
    assert "format      gptq, 4 bit, group size 128, symmetric" in text
    assert "model       qwen3_moe" in text
    assert "experts     8 in each of 2 layers" in text
    assert "shards      1\n" in text
    assert "bytes       1.53 MiB packed, 4.26 MiB dense (in bfloat16)" in text
    header, gptq, dense, total = rows(text)
    assert header == [
        "kind", "bits", "group size", "zero points", "modules", "in experts", "packed", "dense",
    ]  # fmt: skip
    assert gptq[:6] == ["gptq", "4", "128", "symmetric", "56", "48"]
    assert dense[:6] == ["dense", "-", "-", "-", "13", "0"]
    assert total[:3] == ["total", "69", "48"]


@pytest.mark.parametrize("name", sorted(path.stem for path in GOLDEN.glob("*.txt")))
def test_output_of_every_checkpoint(find_checkpoint, name):
    lines = describe(find_checkpoint(name)).splitlines()
    assert lines[0].startswith("checkpoint  ") and lines[0].endswith(name)
    assert lines[1:] == (GOLDEN / f"{name}.txt").read_text().splitlines()


def test_mixed_widths_have_a_row_each(tmp_path):
    modules = {
        "model.layers.0.mlp.experts.0.up_proj": gptq_tensors(1, 64, 96)[0],
        "model.layers.0.mlp.experts.1.up_proj": gptq_tensors(2, 64, 96)[0],
        "lm_head": gptq_tensors(3, 64, 128, bits=8, group_size=-1, symmetric=False)[0],
        "norm": {"weight": np.ones(64, np.float32)},
        "attention": {"sinks": np.ones(6, np.float16)},
    }
    overrides = {"bits": 8, "group_size": -1, "sym": False}
    config = quantization(dynamic={"lm_head": overrides})
    text = describe(write(tmp_path, modules, config, shards=3), modules=True)
    assert "shards      3\n" in text
    assert "experts     2 in 1 layer\n" in text
    assert ", 1 dynamic rule\n" in text
    summary = [row[:6] for row in rows(text) if row[0] in ("gptq", "dense", "other")]
    assert sorted(summary) == [
        ["dense", "-", "-", "-", "1", "0"],
        ["gptq", "4", "32", "symmetric", "2", "2"],
        ["gptq", "8", "K", "stored", "1", "0"],
        ["other", "-", "-", "-", "1", "0"],
    ]
    packed = 64 * 128 + 128 + 128 * 2 + 64 * 4  # codes, zero points, scales, g_idx
    assert f"lm_head gptq 8 K stored 64 x 128 {packed / 1024:.2f} KiB" in " ".join(text.split())


def test_only_headers_are_read(tmp_path, monkeypatch):
    """The data of this file is a hole of 64 GiB: reading any of it would fail or take minutes."""

    def refuse(*args, **kwargs):
        raise AssertionError("inspect opened a tensor")

    monkeypatch.setattr(shards.Shards, "read", refuse)
    k, n = 2**17, 2**18  # 16 GiB of codes, half a byte each, and 32 GiB of float16
    tensors = {
        "a.qweight": ("I32", [k // 8, n]),
        "a.scales": ("F16", [1, n]),
        "b.weight": ("F16", [n, 2**16]),
    }
    header, start = {}, 0
    for name, (dtype, shape) in tensors.items():
        stop = start + shape[0] * shape[1] * {"I32": 4, "F16": 2}[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}
        start = stop
    path = tmp_path / "model.safetensors"
    write_raw(path, json.dumps(header).encode())
    with path.open("ab") as file:
        try:
            file.truncate(path.stat().st_size + start)
        except OSError as error:
            pytest.skip(f"this file system has no sparse files of {start} bytes: {error}")
    write_json(tmp_path / "config.json", {"quantization_config": quantization(group_size=-1)})
    text = describe(tmp_path)
    assert "bytes       48.00 GiB packed, 96.00 GiB dense (in bfloat16)" in text


def test_other_formats_are_listed_by_dtype(tmp_path, capsys):
    parts = {"weight": np.zeros((3, 4), np.uint8), "absmax": np.ones(3, ml_dtypes.bfloat16)}
    write(tmp_path, {"a.proj": parts}, {"quant_method": "bitsandbytes"})
    assert main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"format +cannot be loaded: .*quant_method is 'bitsandbytes'", text)
    table = rows(text)
    assert table[0] == ["dtype", "tensors", "bytes"]
    assert "BF16" in [row[0] for row in table]
    assert int(table[-1][1]) == sum(int(row[1]) for row in table[1:-1])


def test_dense_checkpoint(tmp_path):
    write(tmp_path, {"proj": {"weight": np.ones((4, 3), np.float32)}})
    text = describe(tmp_path)
    assert "format      dense (nothing is quantized)" in text
    assert "experts     none" in text
    assert "bytes       48 B packed, 24 B dense (in bfloat16)" in text


def test_damaged_checkpoint_is_reported_and_fails(tmp_path, capsys):
    path = write(tmp_path, {"a": gptq_tensors(1, 64, 96)[0]}, quantization()) / "model.safetensors"
    assert main([str(tmp_path)]) == 0
    capsys.readouterr()
    path.write_bytes(path.read_bytes()[:-1])
    assert main([str(tmp_path)]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert "the file is truncated" in output.err


def test_modules_option_lists_every_module(find_checkpoint, capsys):
    assert main([str(find_checkpoint(QWEN)), "--modules"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "model.layers.1.mlp.experts.7.down_proj gptq 4 128 symmetric 128 x 256" in text
    assert "lm_head dense - - - 256 x 512 256.00 KiB" in text

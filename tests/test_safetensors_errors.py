"""Safetensors files and indexes that are damaged or lie: one clear error, never a crash."""

import json
import re

import numpy as np
import pytest
from synthetic_checkpoints import (
    MODULE,
    edit_header,
    linear,
    quantization,
    write,
    write_json,
    write_raw,
)

from jax_marlin.checkpoints import open_checkpoint

FIRST = f"{MODULE}.g_idx"  # by name, and here by offset, the first tensor of the file


@pytest.fixture
def whole(tmp_path):
    """A checkpoint without fault."""
    return write(tmp_path / "whole", {MODULE: linear()}, quantization())


def test_the_whole_one_opens(whole):
    assert open_checkpoint(whole).modules[MODULE].shape == (64, 96)


@pytest.mark.parametrize("length", [0, 7, 8, 40, -1])
def test_truncated_file(whole, length):
    path = whole / "model.safetensors"
    raw = path.read_bytes()
    path.write_bytes(raw[:length])
    with pytest.raises(ValueError, match=r"model\.safetensors.*(too few|truncated)") as caught:
        open_checkpoint(whole)
    if length == -1:
        assert re.search(rf"tensor {MODULE}\.\w+ ends at byte", str(caught.value))


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "header: not valid JSON"),
        (b"\xff\xfe{}", "header: not valid JSON"),
        (b"[" * 100_000, "header: not valid JSON"),
        (b"[1]", "header: got a JSON list, expected an object"),
        (b'{"a": 1, "a": 2}', r"header: duplicate keys \['a'\]"),
        (b'{"a": 1}', "tensor a: header entry is 1, expected dtype, shape and data_offsets"),
        (b"{}", "3 bytes of data belong to no tensor"),
    ],
)
def test_header_that_is_no_header(whole, header, message):
    write_raw(whole / "model.safetensors", header, b"xyz")
    with pytest.raises(ValueError, match=rf"model\.safetensors: .*{message}"):
        open_checkpoint(whole)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "I31"}, "dtype is 'I31', expected one of"),
        ({"dtype": "I64"}, r"hold 256 bytes, expected 512 for I64 of shape \(64,\)"),
        ({"shape": [65]}, r"hold 256 bytes, expected 260 for I32 of shape \(65,\)"),
        ({"shape": [-64]}, r"shape is \[-64\], expected a list of integers >= 0"),
        ({"shape": [True]}, r"shape is \[True\], expected a list"),
        ({"shape": 64}, "shape is 64, expected a list"),
        ({"data_offsets": [256, 0]}, r"data_offsets is \[256, 0\], expected \[start, stop\]"),
        ({"data_offsets": [0]}, r"data_offsets is \[0\], expected \[start, stop\]"),
        ({"data_offsets": [10**18, 10**18 + 256]}, "ends at byte 10+256 of the data.*truncated"),
        ({"shape": [0], "data_offsets": [4, 4]}, "starts at byte 4, expected .*; it"),
    ],
)
def test_header_that_lies_about_a_tensor(whole, changes, message):
    edit_header(whole / "model.safetensors", lambda header: header[FIRST].update(changes))
    with pytest.raises(ValueError, match=rf"model\.safetensors: tensor {FIRST}:? .*{message}"):
        open_checkpoint(whole)


@pytest.mark.parametrize(
    ("step", "message"), [(-4, "overlaps the tensor before it"), (8, "leaves a gap")]
)
def test_overlap_and_gap(whole, step, message):
    def shift(header):
        for name, entry in header.items():
            if name != FIRST:
                entry["data_offsets"] = [offset + step for offset in entry["data_offsets"]]

    edit_header(whole / "model.safetensors", shift)
    with (whole / "model.safetensors").open("ab") as file:
        file.write(b"\0" * 8)
    with pytest.raises(ValueError, match=rf"starts at byte \d+, expected \d+; it {message}"):
        open_checkpoint(whole)


def test_any_damaged_byte_is_an_error_of_ours_or_harmless(whole):
    path = whole / "model.safetensors"
    raw = path.read_bytes()
    header_end = 8 + int.from_bytes(raw[:8], "little")
    rng = np.random.default_rng(0)
    outcomes = {True: 0, False: 0}
    for _ in range(300):
        damaged = bytearray(raw)
        damaged[rng.integers(header_end)] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            with open_checkpoint(whole) as checkpoint:
                for name in checkpoint.names():
                    checkpoint.tensor(name)
            outcomes[True] += 1
        except (ValueError, NotImplementedError) as error:
            assert "open_checkpoint" in str(error)
            outcomes[False] += 1
    assert min(outcomes.values()) > 0, outcomes  # a renamed tensor is no lie


def test_file_that_changes_after_opening(whole):
    checkpoint = open_checkpoint(whole)
    (whole / "model.safetensors").write_bytes(b"gone")
    with pytest.raises(
        ValueError, match=rf"model\.safetensors: tensor {FIRST} \(I32\) has 0 bytes"
    ):
        checkpoint.tensor(FIRST)


def test_no_checkpoint_at_all(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is not a directory; pass the folder"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no \.safetensors file; convert \.bin"):
        open_checkpoint(tmp_path)


def edit_index(path, change):
    index = path / "model.safetensors.index.json"
    parsed = json.loads(index.read_text())
    change(parsed["weight_map"])
    write_json(index, parsed)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m.update(ghost="model-00001-of-00002.safetensors"),
            "tensor ghost is in no file",
        ),
        (
            lambda m: m.update(ghost="model-00003-of-00002.safetensors"),
            r"lacks the files \['model-00003",
        ),
        (lambda m: m.update(ghost="../secret.safetensors"), "expected a plain file name"),
        (lambda m: m.update(ghost=3), "file of tensor ghost is 3, expected a plain file name"),
        (lambda m: m.clear(), "weight_map is {}, expected tensor names to file names"),
        (
            lambda m: m.update({FIRST: next(v for v in m.values() if v != m[FIRST])}),
            rf"tensor {FIRST} is in model-\d+-of-00002.safetensors of .*, expected in model-",
        ),
    ],
)
def test_index_that_lies(tmp_path, change, message):
    write(tmp_path, {MODULE: linear()}, quantization(), shards=2)
    edit_index(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(tmp_path)


def test_missing_shard_duplicate_tensor_and_two_indexes(tmp_path):
    write(tmp_path, {MODULE: linear()}, quantization(), shards=2)
    index = tmp_path / "model.safetensors.index.json"
    second = tmp_path / "model-00002-of-00002.safetensors"
    raw = second.read_bytes()
    second.write_bytes((tmp_path / "model-00001-of-00002.safetensors").read_bytes())
    with pytest.raises(ValueError, match=r"tensor .* is in both model-00001.* and model-00002"):
        open_checkpoint(tmp_path)
    second.unlink()
    with pytest.raises(ValueError, match=r"lacks the files \['model-00002-of-00002"):
        open_checkpoint(tmp_path)
    (tmp_path / "other.safetensors.index.json").write_text(index.read_text())
    with pytest.raises(ValueError, match="has 2 index files, expected one"):
        open_checkpoint(tmp_path)
    for path in tmp_path.glob("*.index.json"):
        path.unlink()
    with pytest.raises(ValueError, match=r"lacks the files \['model-00002-of-00002"):
        open_checkpoint(tmp_path)
    (tmp_path / "extra.safetensors").write_bytes(raw)
    with pytest.raises(ValueError, match="and no index; which files belong together"):
        open_checkpoint(tmp_path)

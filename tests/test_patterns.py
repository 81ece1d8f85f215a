"""Rules of a quantization config: real ones pass, and those that match for ever are refused."""

import pytest
from synthetic_checkpoints import gptq_tensors, quantization, write

from jax_marlin.checkpoints import open_checkpoint
from jax_marlin.checkpoints.patterns import check_regex, matches

NAME = "model.layers.47.mlp.experts.127.gate_proj"
REAL = [
    r".*\.mlp\.gate$",
    r"model\.layers\.\d+\.mlp\.experts\.\d+\.(gate|up|down)_proj",
    r"(?:model\.)?layers\.(1[0-9]|[0-9])\..*(?<!router)\.gate.*",
    r"(?s:.*?)(?:.*shared_experts.*|.*lm_head)",
    r"^(?!.*lm_head).*layers\.[0-9]{1,2}\.(self_attn|mlp)\..+_proj$",
    r"lm_head",
    r"a\(b\)+[(+)*]+(?P<layer>\d+)\)*",
    r"[]+)]*(?:ab)+",
]
ENDLESS = [
    r"(a+)+$",
    r"(?:a*)*b",
    r"(a|aa)+$",
    r"(?P<x>.*)+y",
    r"((ab?)c)*d",
    r"(a?){40}a{40}",
    r"(\w+\.){2,}x",
    r"((a{1,9}){1,9}){1,9}b",
    r"([a-z]+)+?$",
    r"(x[)]+)*y",
    r"(?:(?=a+)a)*b",
]


@pytest.mark.parametrize("pattern", REAL)
def test_rules_of_real_checkpoints_pass(pattern):
    check_regex(pattern, "the rule")
    matches(pattern, NAME)


@pytest.mark.parametrize("pattern", ENDLESS)
def test_repeated_repetitions_are_refused(pattern):
    with pytest.raises(ValueError, match="the rule repeats a group that holds a repetition"):
        check_regex(pattern, "the rule")


@pytest.mark.parametrize("pattern", [".*.*.*.*.*.*x", "a?" * 100 + "a" * 100, "(a|a)" * 50 + "b"])
def test_a_match_of_too_many_steps_is_refused_before_it_begins(pattern):
    check_regex(pattern, "the rule")
    with pytest.raises(ValueError, match=r"may take .* steps on the module 'aaa.*fewer repet"):
        matches(pattern, "a" * 200)


@pytest.mark.parametrize("pattern", ["(?x)a # (", "(?#[)(a+)+]", "(?ix:a)"])
def test_comments_that_could_hide_a_group_are_refused(pattern):
    with pytest.raises(ValueError, match="the rule has comments or the flag x"):
        check_regex(pattern, "the rule")


def test_a_long_rule_is_refused():
    with pytest.raises(ValueError, match="has 1001 characters, expected at most 1000"):
        check_regex("a" * 1001, "the rule")


def test_a_checkpoint_with_an_endless_rule_is_refused(tmp_path):
    config = quantization(dynamic={r"+:(\w+\.?)+$": {"bits": 8}})
    path = write(tmp_path, {"a" * 60 + "!": gptq_tensors(0, 64, 64)[0]}, config)
    with pytest.raises(ValueError, match=r"open_checkpoint: .* dynamic rule .* repeats a group"):
        open_checkpoint(path)

"""Quantization configs: keys that change the result are refused, the others accepted."""

import pytest
from synthetic_checkpoints import MODULE, linear, quantization, write, write_json

from jax_marlin.checkpoints import QuantizeConfig, open_checkpoint


@pytest.fixture
def whole(tmp_path):
    """A checkpoint without fault."""
    return write(tmp_path / "whole", {MODULE: linear()}, quantization())


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"bits": 3}, NotImplementedError, "bits is 3, expected 4 or 8"),
        ({"bits": 2}, NotImplementedError, "bits is 2, expected 4 or 8"),
        ({"bits": "4"}, ValueError, "bits is '4', expected 4 or 8"),
        ({"bits": 16}, ValueError, "bits is 16, expected 4 or 8"),
        ({"bits": None}, ValueError, "bits is not given"),
        ({"group_size": None}, ValueError, "group_size is not given"),
        ({"group_size": 0}, ValueError, "group_size is 0, expected -1 or at least 1"),
        ({"sym": "yes"}, ValueError, "sym is 'yes', expected true or false"),
        ({"desc_act": 1}, ValueError, "desc_act is 1, expected true or false"),
        ({"pack_dtype": "int16"}, NotImplementedError, "pack_dtype is 'int16', expected None or"),
        ({"checkpoint_format": "marlin"}, NotImplementedError, "checkpoint_format is 'marlin'"),
        ({"is_marlin_format": True}, NotImplementedError, "is_marlin_format is True"),
        ({"format": "gptq_v2"}, ValueError, "checkpoint_format and format disagree"),
        ({"quant_method": "hqq"}, NotImplementedError, "quant_method is 'hqq'"),
        ({"method": "qqq"}, NotImplementedError, "method is 'qqq'"),
        ({"adapter": {"rank": 8}}, NotImplementedError, "adapter is {'rank': 8}"),
        ({"smoothing": 0.5}, ValueError, r"unknown key 'smoothing' \(value 0.5\).*remove it if"),
        ({"dynamic": []}, ValueError, None),
        ({"dynamic": ["x"]}, ValueError, r"dynamic is \['x'\], expected pattern -> overrides"),
        ({"dynamic": {"+:(": {}}}, ValueError, r"dynamic rule '\+:\(' is not a regular expression"),
        (
            {"dynamic": {"a": 8}},
            ValueError,
            "dynamic rule 'a': overrides are 8, expected an object",
        ),
        ({"dynamic": {"a": {"bits": 3}}}, NotImplementedError, "dynamic rule 'a': bits is 3"),
        ({"dynamic": {"a": {"zap": 1}}}, ValueError, "dynamic rule 'a': unknown key 'zap'"),
    ],
)
def test_config_that_changes_the_result(tmp_path, changes, error, message):
    if message is None:  # the positive twin of the row below it: nothing is nothing
        path = write(tmp_path, {MODULE: linear()}, quantization(**changes))
        assert open_checkpoint(path).has(MODULE)
        return
    with pytest.raises(error, match=rf"open_checkpoint: .*config\.json: {message}"):
        open_checkpoint(write(tmp_path, {MODULE: linear()}, quantization(**changes)))


def test_config_keys_that_change_nothing_are_accepted():
    harmless = {
        "format": "gptq", "method": "gptq", "damp_percent": 0.01, "true_sequential": True,
        "static_groups": False, "lm_head": False, "meta": {"quantizer": ["gptqmodel:7.7.0"]},
        "adapter": None, "is_marlin_format": False, "modules_in_block_to_quantize": [["q_proj"]],
        "provider": "auto-round", "iters": 200, "data_type": "int", "act_bits": 16,
        "use_exllama": True, "dataset": "c4", "dynamic": {"-:.*gate": {}, "x": {"mse": 2.4}},
    }  # fmt: skip
    config = QuantizeConfig.parse(quantization(**harmless), "test")
    assert (config.base.bits, config.base.group_size, config.checkpoint_format) == (4, 32, "gptq")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bits": 8}, "bits is 4 in config.json but 8 in quantize_config.json"),
        ({"group_size": 64}, "group_size is 32 in config.json but 64"),
        ({"sym": False}, "symmetric is True in config.json but False"),
        ({"desc_act": True}, "desc_act is False in config.json but True"),
        ({"checkpoint_format": "gptq_v2"}, "checkpoint_format is 'gptq' in config.json but"),
        ({"dynamic": {"a": {"bits": 8}}}, "dynamic is"),
    ],
)
def test_two_config_files_that_disagree(whole, changes, message):
    write_json(whole / "quantize_config.json", quantization(**changes))
    with pytest.raises(ValueError, match=rf"{message}.*remove the file that is wrong"):
        open_checkpoint(whole)


def test_another_method_is_refused_by_name(whole):
    write_json(whole / "config.json", {"quantization_config": {"quant_method": "bitsandbytes"}})
    with pytest.raises(
        NotImplementedError, match="quant_method is 'bitsandbytes', and jax_marlin loads only gptq"
    ):
        open_checkpoint(whole)


def test_config_json_that_is_damaged(whole):
    (whole / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config\.json: not valid JSON"):
        open_checkpoint(whole)
    write_json(whole / "config.json", {"quantization_config": "gptq"})
    with pytest.raises(ValueError, match="quantization_config is 'gptq', expected an object"):
        open_checkpoint(whole)

"""A Transformers that lacks something is met with the name of what it lacks."""

import json

import pytest
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer

from transformers_moe_offload import ConfigError, install, uninstall
from transformers_moe_offload.errors import UpstreamError
from transformers_moe_offload.hf import upstream
from transformers_moe_offload.hf.loading.quantizer import MoeOffloadQuantizer
from transformers_moe_offload.hf.other_quantizers.quantizer import DelegatingQuantizer


def test_check_hooks_finds_the_installed_version_complete():
    upstream.check_hooks()


@pytest.mark.parametrize(
    ("owner", "name"), [(HfQuantizer, "update_weight_conversions"), (PreTrainedModel, "save_pretrained")]
)
def test_a_missing_hook_is_named_with_the_versions_that_have_it(owner, name, monkeypatch):
    monkeypatch.delattr(owner, name)
    with pytest.raises(UpstreamError, match=rf"no {owner.__name__}\.{name}, which this package needs.* 5\.23 to 5\.24"):
        install()


def test_every_method_of_our_quantizers_that_transformers_calls_is_checked():
    ours = vars(MoeOffloadQuantizer) | vars(DelegatingQuantizer)
    overridden = {name for name in ours if name in vars(HfQuantizer) and not name.startswith("__")}
    assert overridden - {"_abc_impl"} == set(upstream.HOOKS[HfQuantizer])


@pytest.mark.parametrize("method", ["fp8", "mxfp8", "mxfp4"])
def test_a_quantization_method_that_is_dropped_is_missed_only_by_its_checkpoints(method, own_checkpoint, monkeypatch):
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, method)
    uninstall()
    install()
    assert AutoModelForCausalLM.from_pretrained(own_checkpoint, moe_offload=True).moe_offload.layers
    config = json.loads((own_checkpoint / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method}
    (own_checkpoint / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=rf"quantized with '{method}', which this version of Transformers does not"):
        AutoModelForCausalLM.from_pretrained(own_checkpoint, moe_offload=True)

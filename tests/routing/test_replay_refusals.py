"""What a replay refuses: texts that are not known, traces of other models, and options that mean nothing."""

import pytest
import torch

from recorded import read, recording
from transformers_moe_offload import ConfigError, UnsupportedModelError, routing
from transformers_moe_offload.hf.upstream import kv_cache_argument, kv_cache_parameter
from transformers_moe_offload.tracing import TraceError
from zoo.build import build, zoo_names


def test_what_is_not_known_of_a_text_is_an_error(plain, strange):
    text = strange.token_ids(2).tolist()
    begun = plain(torch.tensor([text[:4]]), use_cache=True)
    with routing.set_routing(plain, "replay", trace=strange), torch.no_grad():
        with pytest.raises(UnsupportedModelError, match="holds 4 tokens of each text that were read before"):
            plain(torch.tensor([text[4:6]]), **kv_cache_argument(plain, begun))
        with pytest.raises(UnsupportedModelError, match="pass input_ids"):
            plain(inputs_embeds=plain.get_input_embeddings()(torch.tensor([text])))
        with pytest.raises(UnsupportedModelError, match="several texts are packed in it"):
            plain(torch.tensor([[*text[:3], *text[:3]]]), position_ids=torch.tensor([[0, 1, 2, 0, 1, 2]]))
        cache = read(plain, [text[:2], text[:2]])
        cache.batch_select_indices(torch.tensor([0]))
        with pytest.raises((UnsupportedModelError, RuntimeError)):
            plain(torch.tensor([[text[2]]] * 2), **{kv_cache_parameter(type(plain).forward): cache})
        plain(torch.tensor([text]))


def test_a_model_with_an_encoder_is_refused():
    model = build("switch_transformers").eval()
    trace = recording(model, lambda: model(input_ids=torch.tensor([[1, 2, 3]]), decoder_input_ids=torch.tensor([[1]])))
    with (
        routing.set_routing(model, "replay", trace=trace),
        pytest.raises(UnsupportedModelError, match="depends on what its encoder has read"),
    ):
        model(input_ids=torch.tensor([[1, 2, 3]]), decoder_input_ids=torch.tensor([[1]]))


@pytest.mark.skipif("inkling2_loop" not in zoo_names(), reason="this version of Transformers has no model with loops")
def test_layers_that_run_several_times_are_refused():
    model = build("inkling2_loop").eval()
    trace = recording(model, lambda: model(torch.tensor([[1, 2, 3]])))
    with pytest.raises(TraceError, match="runs several times in a forward"):
        routing.set_routing(model, "replay", trace=trace)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 2}, r"the trace has router 3, but the model has routers 0 to 1"),
        ({"num_hidden_layers": 6}, r"the model has router 4, but the trace has routers 0, 1, 2, 3"),
        ({"num_local_experts": 16}, r"the trace has 8 experts of router 0, but the model has 16"),
        ({"num_experts_per_tok": 3}, r"a token takes 2 experts of router 0, but in the model 3"),
    ],
)
def test_a_trace_of_another_model_is_refused_with_both_numbers(plain, strange, changes, message):
    other = type(plain)(type(plain.config)(**{**plain.config.to_dict(), **changes}))
    with pytest.raises(ConfigError, match=message):
        routing.set_routing(other, "replay", trace=strange)


def test_options_of_a_replay_are_checked(plain, strange, tmp_path):
    with pytest.raises(ConfigError, match="needs trace"):
        routing.set_routing(plain, "replay")
    with pytest.raises(ConfigError, match="weights='recordd'"):
        routing.set_routing(plain, "replay", trace=strange, weights="recordd")
    with pytest.raises(ConfigError, match="missing='ignore'"):
        routing.set_routing(plain, "replay", trace=strange, missing="ignore")
    with pytest.raises(ConfigError, match="trace=3 is neither"):
        routing.set_routing(plain, "replay", trace=3)
    with pytest.raises(TraceError, match="cannot read"):
        routing.set_routing(plain, "replay", trace=tmp_path / "none")
    strange.save(tmp_path / "trace")
    with routing.set_routing(plain, "replay", trace=str(tmp_path / "trace")), torch.no_grad():
        plain(torch.tensor([strange.token_ids(0).tolist()]))

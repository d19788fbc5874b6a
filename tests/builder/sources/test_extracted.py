"""An adapter of low rank out of a fine-tune: the best there is, of linear layers, and of nothing else."""

import pytest
import torch

from builder.made import save_dense
from transformers_moe_offload.builder.recipe import Origin
from transformers_moe_offload.builder.sources import extracted, open_source
from transformers_moe_offload.errors import RecipeError

LINEAR = "model.layers.4.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return save_dense(folder / "base"), save_dense(folder / "tuned", seed=1)


def opened(models, rank):
    base, tuned = models
    dense = open_source(Origin(model=str(base)))
    return dense, open_source(Origin(model=str(tuned), extract_rank=rank), base=dense)


@pytest.mark.parametrize("projects", [False, True])
def test_what_is_lost_are_the_smallest_singular_values(models, monkeypatch, projects):
    if projects:
        monkeypatch.setattr(extracted, "_EXACT_UP_TO", 0)
    base, source = opened(models, 6)
    tuned = open_source(Origin(model=str(models[1])))
    difference = tuned.read(LINEAR) - base.read(LINEAR)
    lost = torch.linalg.svdvals(difference)[6:].norm()
    found = (tuned.read(LINEAR) - source.read(LINEAR)).norm()
    assert lost * 0.999 <= found <= lost * (1.02 if projects else 1.001)
    assert torch.linalg.matrix_rank(source.read(LINEAR) - base.read(LINEAR), rtol=1e-4) == 6
    assert torch.equal(source.read(LINEAR), source.read(LINEAR))


def test_full_rank_is_the_fine_tune_and_the_rest_is_the_base_models(models):
    base, source = opened(models, 32)
    tuned = open_source(Origin(model=str(models[1])))
    torch.testing.assert_close(source.read(LINEAR), tuned.read(LINEAR), atol=1e-5, rtol=0)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.4.input_layernorm.weight"):
        assert torch.equal(source.read(name), base.read(name))
        assert not torch.equal(source.read(name), tuned.read(name))


def test_models_that_are_not_of_one_size_have_no_difference(models, tmp_path):
    other = save_dense(tmp_path / "other", intermediate_size=64)
    with pytest.raises(RecipeError, match="differ in kind or size"):
        opened((models[0], other), 4)

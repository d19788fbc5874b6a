"""Dense checkpoints: whole, sharded, incomplete, or of a kind that is not read."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from builder.made import dense_model, save_dense
from transformers_moe_offload.builder.recipe import Origin
from transformers_moe_offload.builder.sources import open_source
from transformers_moe_offload.errors import CheckpointError, RecipeError

INDEX = "model.safetensors.index.json"


def opened(folder):
    return open_source(Origin(model=str(folder)))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sharded")
    dense_model("llama").save_pretrained(folder, max_shard_size="60KB")
    return folder


@pytest.fixture
def copied(sharded, tmp_path):
    for file in sharded.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def test_every_tensor_of_a_sharded_checkpoint_is_read_as_it_is_stored(sharded):
    source, state = opened(sharded), dense_model("llama").state_dict()
    assert len(list(sharded.glob("*.safetensors"))) > 2
    assert set(source.tensors) == set(state)
    for name, spec in source.tensors.items():
        assert spec.shape == tuple(state[name].shape)
        assert torch.equal(source.read(name), state[name])
        assert torch.equal(source.read_rows(name, 3, 7), state[name][3:7])


def test_a_missing_shard_is_named(copied):
    shard = sorted(copied.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"has no {shard.name}, which its index names"):
        opened(copied)


def test_an_index_that_points_out_of_its_folder_is_refused(copied):
    index = json.loads((copied / INDEX).read_text())
    name = next(iter(index["weight_map"]))
    index["weight_map"][name] = "../elsewhere.safetensors"
    (copied / INDEX).write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="refusing to read outside of"):
        opened(copied)


@pytest.mark.parametrize("content", ["[]", '{"weight_map": 3}', "{", '{"weight_map": {"a": 3}}'])
def test_an_index_that_is_none_is_refused(copied, content):
    (copied / INDEX).write_text(content)
    with pytest.raises(CheckpointError, match=r"is not a checkpoint index|refusing to read"):
        opened(copied)


def test_pickled_weights_are_refused(tmp_path):
    folder = save_dense(tmp_path / "dense")
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"has its weights in pytorch_model.bin, which can run code"):
        opened(folder)


def test_a_folder_without_weights_or_config_is_an_error(tmp_path):
    folder = save_dense(tmp_path / "dense")
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="cannot read the weights"):
        opened(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match="cannot read the config"):
        opened(folder)


def changed(folder, change):
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors")
    return folder


def test_weights_that_the_config_does_not_describe_are_an_error(tmp_path):
    name = "model.layers.2.mlp.up_proj.weight"
    cut = changed(save_dense(tmp_path / "cut"), lambda state: state.pop(name))
    with pytest.raises(CheckpointError, match=f"has no tensor {name}"):
        opened(cut)
    narrow = changed(save_dense(tmp_path / "narrow"), lambda state: state.update({name: state[name][:40].clone()}))
    with pytest.raises(CheckpointError, match=r"as \[40, 32\], but its config says \[48, 32\]"):
        opened(narrow)
    odd = changed(save_dense(tmp_path / "odd"), lambda state: state.update({"model.odd": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"has a tensor model.odd"):
        opened(odd)


def test_what_old_checkpoints_store_needlessly_is_left_out(tmp_path):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = changed(save_dense(tmp_path / "dense"), lambda state: state.update({name: torch.zeros(4)}))
    assert name not in opened(folder).tensors


def test_a_head_that_is_stored_beside_tied_embeddings_has_to_be_them(tmp_path):
    folder = save_dense(tmp_path / "dense", tie_word_embeddings=True)
    changed(folder, lambda state: state.update({"lm_head.weight": state["model.embed_tokens.weight"].clone()}))
    assert "lm_head.weight" not in opened(folder).tensors
    changed(folder, lambda state: state.update({"lm_head.weight": 2 * state["model.embed_tokens.weight"]}))
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        opened(folder)


def test_a_quantized_model_is_no_source(tmp_path):
    folder = save_dense(tmp_path / "dense")
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="is quantized"):
        opened(folder)

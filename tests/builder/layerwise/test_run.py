"""A dense model that is run layer by layer gives what the whole model gives."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from dense import FAMILIES, ModelSource, dense_model, ffn_paths
from transformers_moe_offload.builder.layerwise.run import ResidualStream, run
from transformers_moe_offload.errors import CheckpointError


@dataclass(frozen=True)
class Windows:
    tokens: Tensor
    attention_mask: Tensor | None = None


class Recorder:
    def __init__(self):
        self.inputs = {}
        self.order = []

    def seen(self, layer, path, batch, hidden):
        self.inputs[path, batch] = hidden.clone()
        self.order.append((layer, batch))

    def passed(self, layer):
        self.order.append((layer, "passed"))


def whole_model_inputs(model, paths, batches):
    """The first argument of each module, by running all of the model."""
    inputs = {}
    handles = []
    for path in paths:
        hook = lambda _, args, kwargs, path=path: inputs.__setitem__(path, args[0] if args else kwargs["hidden_states"])  # noqa: E731
        handles.append(model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True))
    found = {}
    for number, batch in enumerate(batches):
        with torch.no_grad():
            model(input_ids=batch.tokens, attention_mask=batch.attention_mask, use_cache=False)
        found |= {(path, number): hidden.clone() for path, hidden in inputs.items()}
    for handle in handles:
        handle.remove()
    return found


def batches():
    tokens = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(0))
    return [Windows(tokens[:2]), Windows(tokens[2:, :7])]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_sees_the_inputs_that_the_whole_model_sees(family):
    model = dense_model(family)
    ffn = ffn_paths(family)
    watched = {layer: [path, f"model.layers.{layer}"] for layer, path in ffn.items()}
    recorder = Recorder()

    run(ModelSource(model), batches(), watched, recorder, advance=lambda layers: None)

    expected = whole_model_inputs(model, [path for paths in watched.values() for path in paths], batches())
    assert recorder.inputs.keys() == expected.keys()
    for key, hidden in expected.items():
        torch.testing.assert_close(recorder.inputs[key], hidden, rtol=0, atol=0, msg=str(key))


def test_all_batches_pass_a_layer_before_the_next_one_is_read():
    model = dense_model()
    read = []

    class Reading(ModelSource):
        def read(self, name):
            read.append(name)
            return super().read(name)

    recorder = Recorder()
    watched = {1: ["model.layers.1.mlp"], 2: ["model.layers.2.mlp"]}
    run(Reading(model), batches(), watched, recorder, advance=lambda layers: None)

    assert recorder.order == [(1, 0), (1, 1), (1, "passed"), (2, 0), (2, 1), (2, "passed")]
    assert len(read) == len(set(read)), "a weight was read twice"
    assert not any(".layers.3." in name or "lm_head" in name for name in read), "more was read than is needed"


def test_one_layer_has_weights_at_a_time():
    from transformers_moe_offload.builder.layerwise.skeleton import Skeleton

    skeleton = Skeleton(ModelSource(dense_model()), ["model.layers.0.mlp"], torch.float32, "cpu")
    with skeleton.layer(2) as layer:
        assert all(not p.is_meta for p in layer.parameters())
        assert all(p.is_meta for n, p in skeleton.causal.named_parameters() if ".layers.2." not in n)
    assert all(p.is_meta for p in skeleton.causal.parameters())


def test_a_tensor_that_is_missing_or_of_another_shape_is_named():
    class Lacking(ModelSource):
        @property
        def tensors(self):
            return {name: spec for name, spec in super().tensors.items() if name != "model.layers.1.mlp.up_proj.weight"}

    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.1\.mlp\.up_proj\.weight"):
        run(Lacking(dense_model()), batches(), {1: ["model.layers.1.mlp"]}, Recorder(), advance=lambda layers: None)

    class Wider(ModelSource):
        def read(self, name):
            return torch.zeros(5, 32) if "q_proj" in name else super().read(name)

    with pytest.raises(CheckpointError, match=r"q_proj\.weight as \[5, 32\], but by its config it is \[32, 32\]"):
        run(Wider(dense_model()), batches(), {1: ["model.layers.1.mlp"]}, Recorder(), advance=lambda layers: None)


@pytest.mark.parametrize("ram_bytes", [0, 10**6], ids=["file", "ram"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_residual_stream_gives_back_what_was_put_in(ram_bytes, dtype):
    batches = [torch.randn(2, 3, 4, dtype=dtype), torch.randn(1, 5, 4, dtype=dtype)]
    with ResidualStream([tuple(batch.shape) for batch in batches], dtype, ram_bytes) as stream:
        for _ in range(2):
            for number in (1, 0):
                stream[number] = batches[number]
            assert all(torch.equal(stream[number], batch) for number, batch in enumerate(batches))
            batches = [batch * 2 for batch in batches]


def test_a_residual_stream_without_room_on_disk_says_how_much_it_takes(monkeypatch):
    import os

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with (
        pytest.raises(CheckpointError, match=r"take 96 bytes in .*set TMPDIR"),
        ResidualStream([(2, 3, 4)], torch.float32, 0),
    ):
        pass

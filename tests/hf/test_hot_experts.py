"""Experts of one layer in two formats: exact, wherever they are, saved and loaded, restored."""

import json
from copy import deepcopy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from transformers_moe_offload import CheckpointError, ConfigError, ExpertFormats, HqqFormat, OffloadConfig
from transformers_moe_offload.hf.prebuilt.names import INDEX_NAME
from transformers_moe_offload.system.host_memory import PAGE_BYTES
from transformers_moe_offload.tensor_files.checksum import METADATA_KEY
from transformers_moe_offload.tensor_files.index import read_index, read_metadata
from zoo.build import build, inputs, output_tensor, save

TWO, FOUR = HqqFormat(nbits=2, group_size=16), HqqFormat(nbits=4, group_size=32)
HOT = {"0": [1, 6], "1-2": [0]}
FORMATS = ExpertFormats(default=TWO, hot=FOUR, hot_experts=HOT)
KINDS = ["qwen3_moe", "mixtral", "gpt_oss", "aria", "nemotron_h", "llama4_text", "dbrx", "switch_transformers"]
"""Stacked, scattered, transposed with biases, transposed, gateless, dense over experts, flattened, modules."""
MIXES = {
    "fewer bits": FORMATS,
    "hot as stored": ExpertFormats(default=TWO, hot_experts=HOT),
    "only hot in low bits": ExpertFormats(hot=FOUR, hot_experts=HOT),
}


def load(folder, plain, formats=FORMATS, **options):
    config = OffloadConfig(experts=formats, **options)
    return type(plain).from_pretrained(folder, dtype=plain.dtype, moe_offload=config)


@torch.no_grad()
def logits(model, token_ids):
    return model(input_ids=token_ids).logits


def decoded(plain, quantized):
    twin = deepcopy(plain)
    twin.load_state_dict(quantized.moe_offload.restore().state_dict())
    return twin


def expert_errors(plain, model, layer):
    """How far each expert's weights are from the original."""
    old, new = (m.model.layers[layer].mlp.experts.down_proj.detach() for m in (plain, model.moe_offload.restore()))
    return (new - old).flatten(1).norm(dim=1) / old.flatten(1).norm(dim=1)


def test_hot_experts_are_nearer_to_the_original_and_others_are_as_they_would_be(checkpoint, plain):
    errors, two = (expert_errors(plain, load(checkpoint, plain, formats), 0) for formats in (FORMATS, TWO))
    hot = torch.zeros(8, dtype=torch.bool)
    hot[[1, 6]] = True
    assert errors[hot].max() < errors[~hot].min() / 2
    assert torch.equal(errors[~hot], two[~hot])


@pytest.mark.parametrize("name", KINDS)
def test_exact_arithmetic_equals_a_plain_model_that_holds_the_decoded_weights(name, tmp_path):
    plain = build(name, torch.bfloat16)
    save(plain, tmp_path, "fused")
    formats = ExpertFormats(default=TWO, hot=HqqFormat(nbits=8, group_size=16), hot_experts={"0": [0, 2]})
    options = {"formats": formats, "arithmetic": "exact"}
    with torch.no_grad():
        given = inputs(name, plain)
        expected = output_tensor(decoded(plain, load(tmp_path, plain, **options))(**given))
        for budget in ("30%", "100%"):
            assert torch.equal(output_tensor(load(tmp_path, plain, cache_budget=budget, **options)(**given)), expected)


@pytest.mark.parametrize("arithmetic", ["fast", "exact"])
@pytest.mark.parametrize("mix", MIXES)
def test_results_do_not_depend_on_where_experts_are(mix, arithmetic, checkpoint, plain, token_ids):
    seen = []
    mapped = {"mmap": True} if mix == "fewer bits" else {}  # this checkpoint's own experts cannot be mapped
    for placement in ({"mmap": False, "cache_budget": "20%"}, {"mmap": False, "cache_budget": "100%"}, mapped):
        model = load(checkpoint, plain, MIXES[mix], arithmetic=arithmetic, **placement)
        seen += [logits(model, token_ids), logits(model, token_ids[:, :1]), logits(model, token_ids)]
        assert model.moe_offload.plan.cache_bytes <= model.moe_offload.plan.budget_bytes
    for number, one in enumerate(seen):
        assert torch.equal(one, seen[number % 3])


def test_fast_arithmetic_agrees_with_the_decoded_weights(checkpoint, plain, token_ids):
    model = load(checkpoint, plain)
    got = [logits(model, token_ids), logits(model, token_ids[:1, :1])]
    twin = decoded(plain, model)
    for one, ids in zip(got, (token_ids, token_ids[:1, :1]), strict=True):
        torch.testing.assert_close(one, logits(twin, ids), atol=1e-4, rtol=1e-4)


def test_the_plan_counts_every_record_by_its_size(checkpoint, plain):
    plans = [load(checkpoint, plain, formats).moe_offload.plan for formats in (TWO, FOUR, FORMATS)]
    two, four, mixed = (plan.pools[0] for plan in plans)
    assert [len(plan.pools) for plan in plans] == [1, 1, 1]
    assert mixed.sizes == (two.need.slot_bytes, four.need.slot_bytes)
    assert plans[2].expert_bytes == 28 * two.need.slot_bytes + 4 * four.need.slot_bytes
    assert plans[2].smallest_budget == four.need.slot_bytes
    assert f"{two.need.slot_bytes / 1024:.1f} KiB to {four.need.slot_bytes / 1024:.1f} KiB" in str(plans[2])


@pytest.mark.parametrize("policy", ["lru", "lfu", "random"])
def test_whoever_is_resident_slots_take_no_more_than_was_planned(policy, checkpoint, plain):
    model = load(checkpoint, plain, mmap=False, cache_budget="30%", policy=policy)
    (cache,) = model.moe_offload._caches.all()
    plan = model.moe_offload.plan
    seen = set()
    for seed in range(25):
        logits(model, torch.randint(0, 100, (1, 2), generator=torch.Generator().manual_seed(seed)))
        seen.add(cache.slots.pool.nbytes)
        assert cache.slots.pool.nbytes <= plan.cache_bytes <= plan.budget_bytes
    assert len(seen) > 1, "no slot ever changed its size"
    model.moe_offload.resize("100%")
    logits(model, torch.arange(100).view(1, 100))
    assert cache.slots.pool.nbytes == model.moe_offload.plan.expert_bytes


def test_tokens_and_gradients_are_those_of_the_decoded_model(checkpoint, plain, token_ids):
    model = load(checkpoint, plain, arithmetic="exact", cache_budget="25%", mmap=False)
    twin = decoded(plain, load(checkpoint, plain))
    got = model.generate(input_ids=token_ids, max_new_tokens=6, num_beams=3)
    assert torch.equal(got, twin.generate(input_ids=token_ids, max_new_tokens=6, num_beams=3))
    for one in (model, twin):
        one(input_ids=token_ids, labels=token_ids).loss.backward()
    ours = dict(model.named_parameters())
    for path, parameter in twin.named_parameters():
        if "experts" not in path:
            assert torch.equal(ours[path].grad, parameter.grad), path


def test_a_cast_copy_decodes_the_same_codes(checkpoint, plain, token_ids):
    model = load(checkpoint, plain, MIXES["hot as stored"], arithmetic="exact")
    wide = decoded(deepcopy(plain).double(), deepcopy(model).to(torch.float64))
    assert torch.equal(logits(model.to(torch.float64), token_ids), logits(wide, token_ids))


@pytest.mark.parametrize("mix", MIXES)
def test_a_saved_model_loads_without_the_trace_and_saves_the_same_bytes(mix, checkpoint, plain, token_ids, tmp_path):
    first = load(checkpoint, plain, MIXES[mix])
    first.save_pretrained(tmp_path / "saved")
    for config in ({"cache_budget": "20%", "mmap": False}, {"mmap": True}):
        second = AutoModelForCausalLM.from_pretrained(tmp_path / "saved", moe_offload=config)
        assert torch.equal(logits(second, token_ids), logits(first, token_ids))
    second.save_pretrained(tmp_path / "again")
    saved, again = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("saved", "again")
    )
    assert saved == again


@pytest.fixture
def saved(checkpoint, plain, tmp_path):
    load(checkpoint, plain).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_every_expert_is_one_range_that_begins_at_a_page(saved):
    model = AutoModelForCausalLM.from_pretrained(saved)
    source = model.moe_offload.source(model.moe_offload.layers[0])
    sizes = {expert: source.experts[expert].row.nbytes for expert in range(8)}
    assert all(source.experts[expert].row.offset % PAGE_BYTES == 0 for expert in range(8))
    assert {expert for expert, nbytes in sizes.items() if nbytes == max(sizes.values())} == {1, 6}
    stacks = {name.rpartition(".")[2]: tensor for name, tensor in read_index([source.experts[0].row.file.path]).items()}
    assert (stacks["records"].shape[0], stacks["hot_records"].shape[0], stacks["checksums"].shape) == (6, 2, (8,))


def test_a_damaged_hot_expert_is_an_error_when_it_is_used(saved):
    model = AutoModelForCausalLM.from_pretrained(saved)
    row = model.moe_offload.source(model.moe_offload.layers[0]).experts[6].row
    content = bytearray(row.file.path.read_bytes())
    content[row.offset + 100] ^= 1
    row.file.path.write_bytes(content)
    model = AutoModelForCausalLM.from_pretrained(saved, moe_offload={"mmap": False})
    with pytest.raises(CheckpointError, match=r"is damaged: bytes .* have the checksum"):
        logits(model, torch.arange(100).view(4, 25))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            '"0": [\n          1,\n          6\n        ]',
            '"0": [\n          1\n        ]',
            r"of shape \[6, \d+\], but 7",
        ),
        ('"0": [\n          1,\n          6\n        ],', "", r"of shape \[6, \d+\], but 8"),
        ('"1-2": [', '"1-3": [', r"of shape \[8, \d+\], but 7"),
    ],
)
def test_files_that_do_not_belong_to_the_config_are_refused(saved, old, new, message):
    config = saved / "config.json"
    text = config.read_text()
    assert old in text
    config.write_text(text.replace(old, new))
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(saved)


def test_a_stack_of_hot_experts_that_is_missing_is_named(saved):
    shard = sorted(saved.glob("moe_offload-*.safetensors"))[0]
    metadata, tensors = read_metadata(shard), load_file(shard)
    del metadata[METADATA_KEY]  # which has one for every tensor
    name = next(name for name in tensors if name.endswith("hot_records"))
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, shard, metadata)
    index = saved / INDEX_NAME
    content = json.loads(index.read_text())
    del content["weight_map"][name]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=rf"has no {name}, the records of 2 experts; it is incomplete"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_other_hot_experts_than_those_of_the_checkpoint_are_refused(saved):
    other = ExpertFormats(default=TWO, hot=FOUR, hot_experts={"0": [1]})
    with pytest.raises(ConfigError, match=r"1 hot experts.* but the checkpoint was quantized with .*4 hot experts"):
        AutoModelForCausalLM.from_pretrained(saved, moe_offload=OffloadConfig(experts=other))


def test_an_expert_that_the_model_does_not_have_is_refused(checkpoint, plain):
    with pytest.raises(ConfigError, match=r"expert 8 of sparse layer 0, which has 8"):
        load(checkpoint, plain, ExpertFormats(default=TWO, hot=FOUR, hot_experts={"0": [8]}))

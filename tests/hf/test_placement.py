"""Where layers and their slots go."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from transformers_moe_offload import CapacityError, OffloadConfig
from transformers_moe_offload.expert import ExpertSpec, FieldSpec
from transformers_moe_offload.hf import plan as planning
from transformers_moe_offload.hf.plan import Placement, make_plan
from transformers_moe_offload.hf.quantizer import MoeOffloadQuantizer

EXACT = OffloadConfig(cache_budget="30%", arithmetic="exact")


@pytest.mark.parametrize("device_map", ["auto", "balanced", "sequential", "cpu", {"": "cpu"}], ids=str)
def test_device_maps_give_the_plain_models_logits(device_map, checkpoint, token_ids, expected):
    model = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=EXACT, device_map=device_map)
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, expected)


def test_dense_layers_that_accelerate_keeps_on_disk_work_with_offloaded_experts(
    checkpoint, token_ids, expected, tmp_path
):
    index = json.loads((checkpoint / "model.safetensors.index.json").read_text())
    layers = {".".join(name.split(".")[:3]) for name in index["weight_map"] if name.startswith("model.layers.")}
    device_map = {layer: "disk" if layer.endswith(("1", "2")) else "cpu" for layer in layers}
    device_map |= dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, moe_offload=EXACT, device_map=device_map, offload_folder=tmp_path
    )
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, expected)
    assert not [file for file in tmp_path.iterdir() if "experts" in file.name], "experts were written again"


def layer(index: int, nbytes: int = 64_000, num_experts: int = 8) -> ExpertSpec:
    return ExpertSpec(index, f"layers.{index}", num_experts, (FieldSpec("down_proj", (nbytes,), "uint8"),))


def on(device: str, *specs: ExpertSpec) -> list[Placement]:
    return [Placement(spec, torch.device(device)) for spec in specs]


class TestPlan:
    def test_every_gpu_has_a_pool_and_they_share_the_budget(self):
        placements = on("cuda:0", layer(0), layer(1)) + on("cuda:1", layer(2))
        plan = make_plan(placements, OffloadConfig(cache_budget="50%"))
        assert [(str(pool.device), pool.layers) for pool in plan.pools] == [("cuda:0", (0, 1)), ("cuda:1", (2,))]
        assert plan.cache_bytes <= plan.budget_bytes
        assert [pool.num_slots for pool in plan.pools] == [8, 4]

    def test_experts_of_another_size_have_a_pool_of_their_own(self):
        plan = make_plan(on("cpu", layer(0), layer(1, nbytes=6_400)), OffloadConfig(cache_budget="100%"))
        assert [pool.need.slot_bytes for pool in plan.pools] == [64_000, 6_400]
        assert plan.num_slots == plan.num_experts == 16

    def test_the_smallest_budget_is_a_slot_in_every_pool(self):
        placements = on("cpu", layer(0), layer(1, nbytes=6_400))
        with pytest.raises(CapacityError) as refused:
            make_plan(placements, OffloadConfig(cache_budget=70_399))
        assert refused.value.smallest_budget == 64_000 + 6_400
        plan = make_plan(placements, OffloadConfig(cache_budget=refused.value.smallest_budget))
        assert [pool.num_slots for pool in plan.pools] == [1, 1]

    def test_ram_holds_what_is_behind_accelerators_and_nothing_else(self):
        placements = on("cuda:0", layer(0)) + on("cpu", layer(1))
        plan = make_plan(placements, OffloadConfig(cache_budget="50%", host_budget="25%"))
        assert plan.host_bytes == 8 * 64_000 // 4
        assert "125.0 KiB of RAM hold experts, the others stay on disk" in str(plan)
        assert make_plan(placements, OffloadConfig(cache_budget="50%")).host_bytes == 8 * 64_000

    def test_a_host_budget_without_an_accelerator_is_told_to_have_no_effect(self, caplog):
        plan = make_plan(on("cpu", layer(0)), OffloadConfig(cache_budget="50%", host_budget="1GB"))
        assert plan.host_bytes == 0
        assert "host_budget='1GB' has no effect" in caplog.text
        assert "cache_budget='50%'" in caplog.text

    @pytest.mark.parametrize(
        ("has_room", "direct_io", "past_cache"),
        [(True, "auto", False), (False, "auto", True), (True, True, True), (False, False, False)],
    )
    def test_files_are_read_past_the_page_cache_where_it_cannot_hold_them(
        self, has_room, direct_io, past_cache, monkeypatch
    ):
        monkeypatch.setattr(planning, "page_cache_holds", lambda nbytes: has_room)
        plan = make_plan(on("cpu", layer(0)), OffloadConfig(cache_budget="50%", direct_io=direct_io))
        assert plan.reads_past_cache == past_cache
        assert ("past the page cache" in str(plan)) == past_cache

    def test_a_budget_beyond_all_experts_makes_no_idle_slots(self):
        plan = make_plan(on("cpu", layer(0)), OffloadConfig(cache_budget="1TB"))
        assert plan.num_slots == plan.num_experts


def test_automatic_device_maps_leave_room_for_the_cache_on_every_gpu():
    quantizer = MoeOffloadQuantizer(OffloadConfig(cache_budget=1_000))
    assert quantizer.adjust_max_memory({0: 10_000, 1: 400, "cpu": 7}) == {0: 9_500, 1: 0, "cpu": 7}


def test_an_automatic_budget_is_sized_after_the_dense_weights_and_reserves_nothing():
    quantizer = MoeOffloadQuantizer(OffloadConfig(cache_budget="auto"))
    assert quantizer.adjust_max_memory({0: 10_000, "cpu": 7}) == {0: 10_000, "cpu": 7}


def test_without_an_accelerator_there_is_nothing_for_the_host_to_take_over(checkpoint, token_ids, expected, caplog):
    config = OffloadConfig(cache_budget="30%", arithmetic="exact", misses="compute")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=config)
    assert "misses='compute' has no effect" in caplog.text
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, expected)
    assert model.moe_offload.stats().computed == 0

"""Where layers and their slots go."""

import json
from dataclasses import replace
from itertools import count

import pytest
import torch
from transformers import AutoModelForCausalLM

from slots.cuda_streams import Event, Machine
from stores import number, numbered_store
from transformers_moe_offload import CapacityError, OffloadConfig
from transformers_moe_offload.expert import ExpertId, ExpertSpec, FieldSpec
from transformers_moe_offload.hf.loading.quantizer import MoeOffloadQuantizer
from transformers_moe_offload.hf.model import planning
from transformers_moe_offload.hf.model.placements import Placement
from transformers_moe_offload.hf.model.planning import make_plan, without_arenas
from transformers_moe_offload.hf.model.pools import build_caches

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

    def test_experts_that_are_read_by_address_are_all_page_locked_and_what_is_left_holds_others(self):
        addressed = [replace(placement, is_addressed=True) for placement in on("cuda:0", layer(0))]
        placements = [*addressed, *on("cuda:1", layer(1))]
        plan = make_plan(placements, OffloadConfig(cache_budget="50%", host_budget=600_000))
        assert [pool.arena_bytes for pool in plan.pools] == [512_000, 0]
        assert plan.host_bytes == 88_000
        assert "page-locked" in str(plan).splitlines()[0]
        assert str(plan).splitlines()[1].endswith("500.0 KiB")

    def test_an_automatic_budget_leaves_out_what_torch_cannot_use_of_its_segments(self, monkeypatch):
        monkeypatch.setattr(planning, "available_bytes", lambda device, held_bytes=0: 100 << 20)
        plans = [make_plan(on(device, layer(0, 7 << 20, 16)), OffloadConfig()) for device in ("cuda:0", "cpu")]
        assert [plan.num_slots for plan in plans] == [10, 14]

    def test_where_not_all_fit_into_the_host_budget_nobody_is_page_locked(self):
        addressed = [replace(placement, is_addressed=True) for placement in on("cuda:0", layer(0), layer(1))]
        plan = make_plan(addressed, OffloadConfig(cache_budget="50%", host_budget=600_000))
        assert plan.arena_bytes == 0
        assert plan.host_bytes == 600_000
        assert "1,024,000 bytes" in plan.arena_refused
        assert "allows 600,000" in plan.arena_refused
        assert "page-locked" not in str(plan)

    def test_experts_that_are_in_ram_already_are_not_counted_against_what_is_free(self, monkeypatch):
        """Of 1,000,000 bytes 512,000 are taken by the experts that are to be locked: what is left need not hold them
        once more."""
        monkeypatch.setattr(planning, "available_bytes", lambda device: 244_000)
        addressed = [replace(placement, is_addressed=True) for placement in on("cuda:0", layer(0))]
        in_ram = [replace(placement, is_in_ram=True) for placement in addressed]
        config = OffloadConfig(cache_budget="50%")
        assert make_plan(addressed, config).arena_refused is not None
        plan = make_plan(in_ram, config)
        assert (plan.arena_refused, plan.arena_bytes, plan.host_bytes) == (None, 512_000, 0)
        beside = make_plan([*in_ram, *on("cuda:1", layer(1))], config)
        assert (beside.arena_bytes, beside.host_bytes) == (512_000, 244_000)

    def test_experts_that_are_in_ram_already_count_once_against_a_host_budget_in_bytes(self):
        in_ram = [replace(placement, is_in_ram=True, is_addressed=True) for placement in on("cuda:0", layer(0))]
        enough, too_little = (
            make_plan(in_ram, OffloadConfig(cache_budget="50%", host_budget=nbytes)) for nbytes in (512_000, 511_999)
        )
        assert enough.arena_bytes == 512_000
        assert "allows 511,999" in too_little.arena_refused

    def test_experts_that_are_in_ram_already_are_not_kept_there_once_more(self):
        """Where they turn out not to be page-locked, and beside others that come from files."""
        in_ram = [replace(placement, is_in_ram=True, is_addressed=True) for placement in on("cuda:0", layer(0))]
        config = OffloadConfig(cache_budget="50%", host_budget="100%")
        plan = make_plan(in_ram, config)
        assert without_arenas(plan, config, plan.pools).host_bytes == 0
        both = make_plan([*in_ram, *on("cuda:0", layer(1))], config)
        assert without_arenas(both, config, both.pools).host_bytes == 512_000

    def test_the_plan_says_where_experts_beyond_the_cache_are(self):
        config = OffloadConfig(cache_budget="25%", direct_io=False)
        in_ram = [replace(placement, is_in_ram=True) for placement in on("cpu", layer(0))]
        assert str(make_plan(in_ram, config)).endswith("experts beyond the cache are in RAM")
        both = make_plan([*in_ram, *on("cpu", layer(1))], config)
        assert str(both).endswith("beyond the cache 8 experts are in RAM, the others stay on disk")
        assert str(make_plan(on("cpu", layer(0)), config)).endswith("experts beyond the cache stay on disk")

    def test_a_cell_of_a_notebook_shows_a_line_or_a_table(self):
        plan = make_plan(on("cpu", layer(0), layer(1)), OffloadConfig(cache_budget="25%"))
        assert repr(plan) == "OffloadPlan(4 slots for the 16 experts of 2 sparse layers, 250.0 KiB of 1000.0 KiB)"
        table = plan._repr_html_()
        assert "<td>4 (25%)</td>" in table
        assert "smallest that works 62.5 KiB" in table

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

    @pytest.mark.parametrize(("direct_io", "num_slots"), [(True, 9), (False, 10)])
    def test_what_pages_have_beyond_an_expert_counts_where_they_are_read_into_slots(self, direct_io, num_slots):
        placements = [replace(one, spare_bytes=one.slot_bytes // 10) for one in on("cpu", layer(0, num_experts=16))]
        budget = 10 * placements[0].slot_bytes
        plan = make_plan(placements, OffloadConfig(cache_budget=budget, direct_io=direct_io, mmap=False))
        assert plan.num_slots == num_slots
        assert plan.cache_bytes <= budget
        half = make_plan(placements, OffloadConfig(cache_budget="50%", direct_io=direct_io, mmap=False))
        assert half.num_slots == 8, "half of the experts, however they are read"

    @pytest.mark.parametrize(("spares", "of_pool"), [((100, 300), 300), ((100, None), None)])
    def test_layers_share_a_pool_whatever_their_pages_have_to_spare(self, spares, of_pool):
        pairs = zip(on("cpu", layer(0), layer(1)), spares, strict=True)
        placements = [replace(one, spare_bytes=spare) for one, spare in pairs]
        (pool,) = make_plan(placements, OffloadConfig(cache_budget="50%", direct_io=True, mmap=False)).pools
        assert (pool.layers, pool.spare_bytes) == ((0, 1), of_pool)

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


class TestSeveralGpus:
    """Fake ones, whose memory is host memory (`tests/slots/cuda_streams.py`)."""

    @pytest.fixture
    def machines(self, monkeypatch):
        machines = {torch.device("cuda", index): Machine() for index in range(2)}
        empty = torch.empty

        def empty_there(*shape, device=None, pin_memory=False, **options):
            return machines[device].slot(*shape) if device in machines else empty(*shape, device=device, **options)

        def stream(given):
            (owner,) = [machine for machine in machines.values() if given in (*machine.made, machine.compute)]
            return owner.stream(given)

        Machine().install(monkeypatch)
        monkeypatch.setattr(Event, "machine", Both(machines.values()))
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: machines[device].new_stream())
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: machines[device].current_stream())
        monkeypatch.setattr(torch.cuda, "stream", stream)
        monkeypatch.setattr(torch, "empty", empty_there)
        return machines

    def test_each_has_a_pool_a_ring_and_a_stream_of_its_own(self, machines, tmp_path):
        store = numbered_store(tmp_path, 4, 8)
        sources = list(store.layers.values())
        first, second = machines
        placements = [Placement(source.spec, first if place < 2 else second) for place, source in enumerate(sources)]
        config = OffloadConfig(cache_budget="40%", host_budget="100%", direct_io=False)
        plan = make_plan(placements, config)
        caches = build_caches(plan, sources, config).of_layer
        assert caches[0] is caches[1] is not caches[2] is caches[3]
        for device, layers in ((first, (0, 1)), (second, (2, 3))):
            assert len(machines[device].made) == 1
            for layer in layers:
                cache = caches[layer]
                assert cache.slots.pool.device == device
                assert cache.slots.pool.nbytes <= plan.budget_bytes / 2
                for expert in range(8):
                    with cache.turn, cache.visit(layer, [expert]) as visit:
                        weights = visit.take(expert)
                        machines[device].run_all()  # and not the other one
                        found = {value for tensor in weights.values() for value in tensor.flatten().tolist()}
                        assert found == {number(ExpertId(layer, expert))}


class Both:
    """Some machines, run as one."""

    def __init__(self, machines):
        self.machines = machines
        self.tick = count().__next__

    def run_all(self):
        return any([machine.run_all() for machine in self.machines])

"""What is attached can be moved, copied, resized and detached, and nothing is left behind."""

import copy
import gc
import os
import pickle
import threading
import weakref

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

import transformers_moe_offload as tmo
from hurried import run_at_once
from transformers_moe_offload import CapacityError, ConfigError, MoeOffloadError, OffloadConfig
from transformers_moe_offload.slots import inline_reads
from transformers_moe_offload.system import free_memory
from zoo.build import build, save

from .conftest import TINY_MOE


@pytest.fixture
def model(checkpoint):
    return load(checkpoint)


def load(folder, budget="50%", **options):
    config = OffloadConfig(cache_budget=budget, arithmetic="exact")
    return AutoModelForCausalLM.from_pretrained(folder, moe_offload=config, **options)


@torch.no_grad()
def logits(model, token_ids):
    return model(input_ids=token_ids).logits


class TestRestore:
    def test_gives_the_plain_model_back(self, model, plain, token_ids, expected):
        logits(model, token_ids)
        restored = model.moe_offload.restore()
        assert restored is model
        assert not hasattr(model, "moe_offload")
        assert getattr(model, "hf_quantizer", None) is None
        assert [type(m) for m in model.modules()] == [type(m) for m in plain.modules()]
        assert list(model.state_dict()) == list(plain.state_dict())
        assert all(torch.equal(model.state_dict()[k], v) for k, v in plain.state_dict().items())
        assert not any("moe_offload" in name for m in model.modules() for name in vars(m))
        assert b"moe_offload" not in pickle.dumps(model), "nothing of ours is left in it"
        model.set_experts_implementation("eager")
        assert torch.equal(logits(model, token_ids), expected)

    def test_as_a_function_and_with_the_right_error_for_other_models(self, model, plain):
        assert tmo.restore(model) is model
        with pytest.raises(MoeOffloadError, match="Qwen3MoeForCausalLM is not offloaded"):
            tmo.restore(plain)

    def test_the_restored_parameters_train(self, model, token_ids):
        tmo.restore(model)(input_ids=token_ids, labels=token_ids).loss.backward()
        assert model.model.layers[0].mlp.experts.gate_up_proj.grad is not None


class TestUninstall:
    @pytest.fixture(autouse=True)
    def install_again(self):
        yield
        tmo.install()

    def test_leaves_transformers_as_it_was(self, checkpoint):
        patched = PreTrainedModel.__dict__["from_pretrained"]
        tmo.uninstall()
        assert PreTrainedModel.__dict__["from_pretrained"].__func__ is patched.__func__.__wrapped__
        assert "moe_offload" not in AUTO_QUANTIZER_MAPPING
        assert "moe_offload" not in AUTO_QUANTIZATION_CONFIG_MAPPING
        with pytest.raises(TypeError, match="moe_offload"):
            AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=True)

    def test_is_harmless_twice_and_so_is_install(self):
        original = PreTrainedModel.__dict__["from_pretrained"].__func__.__wrapped__
        tmo.uninstall()
        tmo.uninstall()
        tmo.install()
        tmo.install()
        assert PreTrainedModel.__dict__["from_pretrained"].__func__.__wrapped__ is original

    def test_keeps_loaded_models_working(self, model, token_ids, expected):
        tmo.uninstall()
        assert torch.equal(logits(model, token_ids), expected)


def test_two_models_do_not_disturb_each_other(checkpoint, token_ids, expected):
    one, other = load(checkpoint, "30%"), load(checkpoint, "100%")
    assert torch.equal(logits(one, token_ids), expected)
    assert other.moe_offload.stats().asked == 0
    assert torch.equal(logits(other, token_ids), expected)
    del one
    assert torch.equal(logits(other, token_ids), expected)


def test_threads_that_share_a_model_get_the_right_answers(checkpoint, token_ids, expected):
    model = load(checkpoint, "20%")
    right = []

    def run():
        right.extend(torch.equal(logits(model, token_ids), expected) for _ in range(5))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert right == [True] * 20


def test_threads_that_find_no_cache_build_one_together(checkpoint, token_ids):
    """Two would take twice the budget, and what one of them has counted would be lost."""
    model = load(checkpoint)
    logits(model, token_ids)
    asked = model.moe_offload.stats().asked
    for dtype in (torch.float64, torch.float32) * 3:
        model.to(dtype)
        model.moe_offload.reset_stats()
        together = threading.Barrier(4)
        run_at_once(lambda start: (start.wait(), logits(model, token_ids)), [(together,)] * 4)
        assert model.moe_offload.stats().asked == 4 * asked


def test_a_deleted_model_frees_its_slots_threads_and_files(checkpoint, token_ids, monkeypatch):
    monkeypatch.setattr(inline_reads, "SMALL_BYTES", 0)  # or no thread would read

    def open_files():
        names = [
            os.readlink(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
            if os.path.exists(f"/proc/self/fd/{fd}")
        ]
        return sum(str(checkpoint) in name for name in names)

    def readers():
        gc.collect()  # readers of other tests' models end once nothing refers to them
        for thread in (found := [t for t in threading.enumerate() if t.name.startswith("moe-offload-read")]):
            thread.join(timeout=0.2)
        return sum(thread.is_alive() for thread in found)

    threads, files = readers(), open_files()
    model = load(checkpoint)
    logits(model, token_ids)
    cache = model.moe_offload._caches.all()[0]
    slot = weakref.ref(cache.slots.pool.record(0))
    assert open_files() > files
    assert readers() > threads
    del model, cache
    assert readers() == threads
    assert slot() is None
    assert open_files() == files


def test_a_closed_model_says_so(model, token_ids):
    model.moe_offload.close()
    with pytest.raises(MoeOffloadError, match="was closed; load the model again"):
        logits(model, token_ids)


class TestCopies:
    @pytest.mark.parametrize("when", ["before the first forward", "after it"])
    def test_a_deep_copy_is_independent(self, when, model, token_ids, expected):
        if when == "after it":
            logits(model, token_ids)
        twin = copy.deepcopy(model)
        assert twin.moe_offload is not model.moe_offload
        assert torch.equal(logits(twin, token_ids), expected)
        twin.to(torch.bfloat16)
        logits(twin, token_ids)
        assert torch.equal(logits(model, token_ids), expected)
        del model
        gc.collect()
        assert tmo.restore(twin).dtype == torch.bfloat16


class TestMoving:
    @pytest.mark.parametrize("cast", ["to", "half", "bfloat16"])
    def test_casting_gives_what_casting_the_plain_model_gives(self, cast, checkpoint, plain, token_ids):
        def apply(model):
            return model.to(torch.bfloat16) if cast == "to" else getattr(model, cast)()

        ours, stock = apply(load(checkpoint)), apply(copy.deepcopy(plain))
        assert torch.equal(logits(ours, token_ids), logits(stock, token_ids))

    def test_casting_there_and_back_loses_what_it_loses_without_us(self, checkpoint, plain, token_ids):
        ours = load(checkpoint).to(torch.bfloat16).to(torch.float32)
        stock = copy.deepcopy(plain).to(torch.bfloat16).to(torch.float32)
        assert torch.equal(logits(ours, token_ids), logits(stock, token_ids))

    def test_experts_that_nobody_wants_are_cast_along(self, tmp_path):
        plain = build("jetmoe")  # its forward reaches for every expert, also for those without rows
        save(plain, tmp_path, "fused")
        config = OffloadConfig(cache_budget="50%", arithmetic="exact")
        ours = type(plain).from_pretrained(tmp_path, moe_offload=config).to(torch.bfloat16)
        one_token = torch.tensor([[3]])
        assert torch.equal(logits(ours, one_token), logits(plain.to(torch.bfloat16), one_token))

    def test_moving_to_where_it_is_keeps_the_cache(self, model, token_ids):
        logits(model, token_ids)
        model.to("cpu").float().eval()
        model.moe_offload.reset_stats()
        logits(model, token_ids[:, :1])
        assert model.moe_offload.stats().hits > 0


class TestResize:
    def test_results_stay_and_the_number_of_slots_follows(self, model, token_ids, expected):
        before = model.moe_offload.plan.num_slots
        for budget in ("100%", "20%"):
            model.moe_offload.resize(budget)
            assert torch.equal(logits(model, token_ids), expected)
        assert model.moe_offload.plan.num_slots < before
        assert model.moe_offload.plan.cache_bytes <= model.moe_offload.plan.budget_bytes

    @pytest.mark.parametrize("mmap", [True, False])
    def test_a_generation_that_is_running_meanwhile_gives_the_same_tokens(self, mmap, token_ids):
        config = OffloadConfig(cache_budget="40%", arithmetic="exact", mmap=mmap)
        model = AutoModelForCausalLM.from_pretrained(TINY_MOE, moe_offload=config)
        options = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
        expected, answers = model.generate(token_ids, **options), []
        threads = [
            threading.Thread(target=lambda: answers.append(model.generate(token_ids, **options))) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        sizes = []
        while any(thread.is_alive() for thread in threads):
            for budget in ("100%", "15%", "60%", "30%"):
                model.moe_offload.resize(budget)
                (cache,) = model.moe_offload._caches.all()
                sizes.append(cache.residency.num_slots)
                assert sizes[-1] == model.moe_offload.plan.num_slots
                assert mmap or len(cache.slots.pool) == sizes[-1]
        assert len(answers) == 2
        assert all(torch.equal(answer, expected) for answer in answers)
        assert len(sizes) > 4, "it grew and shrank while they ran"

    def test_statistics_survive(self, model, token_ids):
        logits(model, token_ids)
        before = model.moe_offload.stats()
        model.moe_offload.resize("80%")
        assert model.moe_offload.stats() == before

    def test_an_automatic_budget_takes_the_memory_that_the_cache_has_for_its_own(self, monkeypatch, token_ids):
        free = 2 * 3_000_000
        monkeypatch.setattr(free_memory, "free_ram", lambda: free)
        model = AutoModelForCausalLM.from_pretrained(TINY_MOE, moe_offload=OffloadConfig(mmap=False))
        before = model.moe_offload.plan
        assert 0 < before.num_slots < before.num_experts
        free -= before.cache_bytes
        model.moe_offload.resize("auto")
        assert model.moe_offload.plan.num_slots == before.num_slots

    @pytest.mark.parametrize(("budget", "error"), [(5, CapacityError), ("lots", ConfigError)])
    def test_a_budget_that_cannot_work_changes_nothing(self, budget, error, model, token_ids, expected):
        slots = model.moe_offload.plan.num_slots
        with pytest.raises(error):
            model.moe_offload.resize(budget)
        assert model.moe_offload.plan.num_slots == slots
        assert torch.equal(logits(model, token_ids), expected)


class TestTheHandle:
    def test_statistics_add_up_over_layers(self, model, token_ids):
        logits(model, token_ids)
        stats = tmo.cache_stats(model)
        assert stats.asked == sum(layer.asked for layer in stats.per_layer.values())
        assert set(stats.per_layer) == {f"model.layers.{i}.mlp.experts" for i in range(len(stats.per_layer))}
        assert all(type(getattr(stats, name)) is int for name in ("hits", "late_hits", "misses", "disk_bytes"))
        model.moe_offload.reset_stats()
        assert tmo.cache_stats(model).asked == 0

    def test_every_miss_reads_one_expert(self, model, token_ids):
        logits(model, token_ids)
        stats, plan = model.moe_offload.stats(), model.moe_offload.plan
        assert stats.disk_bytes == stats.misses * plan.pools[0].need.slot_bytes

    def test_the_plan_prints_as_a_table(self, model):
        text = str(model.moe_offload.plan)
        for word in ("tier", "sparse layers", "bytes per expert", "slots", "cpu", "smallest that works", "on disk"):
            assert word in text
        assert str(model.moe_offload.plan.smallest_budget) in text.replace(",", "")

    def test_an_interrupted_forward_leaves_the_cache_usable(self, model, token_ids, expected, monkeypatch):
        layer = model.model.layers[1].mlp.experts

        def interrupt(*_):
            raise KeyboardInterrupt

        hook = layer.act_fn.register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            logits(model, token_ids)
        hook.remove()
        assert torch.equal(logits(model, token_ids), expected)


@pytest.mark.parametrize("mmap", [False, "auto"])
def test_a_forward_inside_of_a_layer_that_computes_is_refused_and_the_next_forward_is_right(
    checkpoint, token_ids, mmap
):
    """It would replace experts that the layer is computing with."""
    config = OffloadConfig(cache_budget="25%", mmap=mmap, arithmetic="exact")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, moe_offload=config).eval()
    with torch.no_grad():
        expected = model(token_ids).logits
        hook = model.model.layers[1].mlp.experts.act_fn.register_forward_hook(lambda *_: model(token_ids) and None)
        with pytest.raises(MoeOffloadError, match=r"while a layer of this model computes .* copy\.deepcopy of it"):
            model(token_ids)
        hook.remove()
        assert torch.equal(model(token_ids).logits, expected)

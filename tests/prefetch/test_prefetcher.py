import torch

from copiers import FakeCopier
from stores import numbered_store
from transformers_moe_offload.cache.cache import ExpertCache
from transformers_moe_offload.expert import ExpertId
from transformers_moe_offload.policies import LRU
from transformers_moe_offload.prefetch.controller import Controller
from transformers_moe_offload.prefetch.predictors import Prediction
from transformers_moe_offload.prefetch.prefetcher import Prefetcher
from transformers_moe_offload.slots.buffers import CopiedSlots, SlotPool

NUM_LAYERS, NUM_EXPERTS = 4, 8
RECORD_BYTES = 128


class Oracle:
    """Predicts what it is told to, by layer, and remembers what it was asked."""

    def __init__(self, guesses):
        self.guesses, self.asked, self.observed = guesses, [], []

    def observe(self, layer, wanted):
        self.observed.append((layer, list(wanted)))

    def predict(self, layer, targets, hidden):
        self.asked.append((layer, list(targets)))
        return [
            Prediction(ExpertId(target, expert), confidence)
            for target in targets
            for expert, confidence in self.guesses.get(target, {}).items()
        ]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class SlowCopier(FakeCopier):
    """Loads that take a second each, on paper."""

    def start(self, expert, slot, alongside=0):
        transfer = super().start(expert, slot)
        transfer.seconds = 1.0
        return transfer


class Setting:
    """A model of four layers on one cache, whose loads take a second, and a prefetcher that watches it."""

    def __init__(self, folder, guesses, num_slots=16, **options):
        self.store = numbered_store(folder, NUM_LAYERS, NUM_EXPERTS)
        self.copier, self.clock, self.oracle = SlowCopier(), Clock(), Oracle(guesses)
        slots = CopiedSlots(self.store, SlotPool(self.store.layout(0, 0).nbytes, torch.device("cpu")), self.copier)
        self.cache = ExpertCache(slots, num_slots, dict.fromkeys(range(NUM_LAYERS), NUM_EXPERTS), LRU())
        self.prefetcher = Prefetcher(
            self.oracle,
            dict.fromkeys(range(NUM_LAYERS), self.cache),
            record_bytes=dict.fromkeys(range(NUM_LAYERS), RECORD_BYTES),
            clock=self.clock,
            **{"lookahead": 1, "min_confidence": 0.5} | options,
        )

    def visit(self, layer, wanted, num_tokens=1, seconds=100.0):
        """One layer's visit; returns what was loaded, in order. The next one begins so much later."""
        before = len(self.copier.started)
        started = lambda experts: self.prefetcher.visited(layer, experts, None, num_tokens)  # noqa: E731
        with self.cache.turn, self.cache.visit(layer, wanted, started) as visit:
            for _ in visit:
                pass
        self.clock.now += seconds
        return [tuple(expert) for expert in self.copier.started[before:]]

    def warm_up(self, seconds=100.0):
        """Until the time between layers and the time of a load are known."""
        for _ in range(100):
            for layer in range(NUM_LAYERS):
                self.visit(layer, [0], seconds=seconds)


def test_what_is_likely_is_on_its_way_before_its_layer_asks(tmp_path):
    setting = Setting(tmp_path, {1: {5: 0.9}})
    setting.warm_up()
    assert (1, 5) in [tuple(expert) for expert in setting.copier.started]
    assert setting.visit(0, [0]) == []
    assert setting.visit(1, [5]) == [], "it is there"
    assert setting.cache.stats[1].prefetch_used == 1


def test_a_layers_own_loads_start_before_those_for_the_next_one(tmp_path):
    setting = Setting(tmp_path, {})
    setting.warm_up()
    setting.oracle.guesses = {1: {5: 0.9}}
    assert setting.visit(0, [2, 3]) == [(0, 2), (0, 3), (1, 5)]


def test_guesses_that_are_not_sure_enough_are_not_acted_upon(tmp_path):
    setting = Setting(tmp_path, {1: {5: 0.49, 6: 0.51}})
    setting.warm_up()
    loaded = {tuple(expert) for expert in setting.copier.started}
    assert (1, 6) in loaded
    assert (1, 5) not in loaded


def test_nobody_who_was_guessed_leaves_for_a_surer_guess(tmp_path):
    """Demand will know all of a layer's experts, and keep them; a guess must not be worse."""
    setting = Setting(tmp_path, {}, num_slots=2 * NUM_LAYERS)  # two slots for each layer
    setting.warm_up()
    for layer in range(NUM_LAYERS):
        setting.visit(layer, [0, 3])
    setting.oracle.guesses = {1: {5: 0.9, 0: 0.2, 3: 0.1}}
    assert setting.visit(0, [0]) == [], "both that layer 1 has were guessed, too"
    setting.oracle.guesses = {1: {5: 0.9, 3: 0.1}}
    assert setting.visit(0, [0]) == [(1, 5)]
    assert setting.visit(1, [3, 5]) == []


def test_it_looks_as_far_ahead_as_it_is_told_and_on_to_the_next_token(tmp_path):
    setting = Setting(tmp_path, {}, lookahead=2)
    for layer in range(NUM_LAYERS):
        setting.visit(layer, [0])
    assert setting.oracle.asked == [(0, [1, 2]), (1, [2, 3]), (2, [3, 0]), (3, [0, 1])]


def test_it_never_looks_at_the_layer_that_asks_however_few_there_are(tmp_path):
    setting = Setting(tmp_path, {}, lookahead=4)
    setting.visit(2, [0])
    assert setting.oracle.asked == [(2, [3, 0, 1])]


def test_the_predictor_hears_of_every_visit_also_while_prefetching_is_off(tmp_path):
    class Off:
        is_on = False

        def took(self, seconds):
            pass

    setting = Setting(tmp_path, {1: {5: 0.9}}, controller=Off)
    setting.visit(0, [3, 1])
    assert setting.oracle.observed == [(0, [3, 1])]
    assert setting.oracle.asked == []


def test_each_number_of_tokens_has_a_controller_of_its_own(tmp_path):
    made = []

    class OnFromTwoSteps:
        """Off until it has been told of two steps."""

        is_on = False

        def __init__(self):
            self.steps = []
            made.append(self)

        def took(self, seconds):
            self.steps.append(seconds)
            self.is_on = len(self.steps) >= 2

    setting = Setting(tmp_path, {1: {5: 0.9}}, controller=OnFromTwoSteps)
    for num_tokens in (1, 3, 3, 3, 500, 1):
        for layer in range(NUM_LAYERS):
            setting.visit(layer, [0], num_tokens=num_tokens)
    assert [controller.steps for controller in made] == [[400.0], [400.0, 400.0]]
    assert (setting.prefetcher.is_on(1), setting.prefetcher.is_on(3)) == (False, True)
    assert not setting.prefetcher.is_on(500)


def test_prefetching_that_does_not_pay_ends_also_where_no_step_has_as_many_tokens_as_the_one_before(tmp_path):
    """As in assisted decoding, where the model is given as many guesses as seem worth it."""
    setting = Setting(tmp_path, {1: {5: 0.9}}, controller=Controller)
    was_on = []
    for step in range(600):
        num_tokens = 2 + step % 3
        was_on.append(setting.prefetcher.is_on(num_tokens))
        for layer in range(NUM_LAYERS):
            setting.visit(layer, [0], num_tokens=num_tokens, seconds=1.5 if was_on[-1] else 1.0)
    assert not any(was_on[-300:])


def test_prompts_are_not_guessed_for(tmp_path):
    setting = Setting(tmp_path, {1: {5: 0.9}})
    setting.visit(0, [0, 1], num_tokens=500)
    assert setting.oracle.asked == []


def test_a_link_that_demand_keeps_busy_carries_nothing_else(tmp_path):
    """Two loads of a second each are asked for every two seconds."""
    setting = Setting(tmp_path, {1: {7: 0.9}}, num_slots=4)
    for turn in range(100):
        for layer in range(NUM_LAYERS):
            setting.visit(layer, [turn % 3, 3 + turn % 3], seconds=2.0)
    before = len(setting.copier.started)
    for turn in range(10):
        for layer in range(NUM_LAYERS):
            setting.visit(layer, [turn % 3, 3 + turn % 3], seconds=2.0)
    loaded = [tuple(expert) for expert in setting.copier.started[before:]]
    assert (1, 7) not in loaded


def test_as_many_set_out_as_the_link_can_begin_with_before_their_layer_is_reached(tmp_path):
    """Two and a half seconds between layers that ask for nothing new: the third begins after two, a fourth too late."""
    setting = Setting(tmp_path, {}, num_slots=24)
    setting.warm_up(seconds=2.5)
    setting.oracle.guesses = {1: dict.fromkeys(range(2, 8), 0.99)}
    assert setting.visit(0, [0]) == [(1, 2), (1, 3), (1, 4)]


def test_the_idle_time_of_the_link_bounds_how_much_may_be_carried_in_vain(tmp_path):
    """Two loads of a second, one in two of them for nothing, fit into one and a quarter seconds; a third does not."""
    setting = Setting(tmp_path, {}, num_slots=24, lookahead=3)
    setting.warm_up(seconds=1.25)
    setting.oracle.guesses = {3: dict.fromkeys(range(2, 8), 0.5)}
    assert setting.visit(0, [0]) == [(3, 2), (3, 3)]


def test_the_byte_limit_bounds_how_many_set_out(tmp_path):
    setting = Setting(tmp_path, {}, num_slots=24, max_bytes=3 * RECORD_BYTES)
    setting.warm_up()
    setting.oracle.guesses = {1: dict.fromkeys(range(2, 8), 0.9)}
    assert setting.visit(0, [0]) == [(1, 2), (1, 3), (1, 4)]


def test_layers_that_are_wholly_resident_are_not_guessed_for(tmp_path):
    setting = Setting(tmp_path, {}, num_slots=NUM_LAYERS * NUM_EXPERTS)
    setting.visit(1, range(NUM_EXPERTS))
    setting.visit(0, [0])
    assert setting.oracle.asked == [(1, [2])]

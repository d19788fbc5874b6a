"""Find the fastest setting for a model in so much RAM: predict many, run the best three.

Settings that keep a model's results are compared first: each policy at each budget, then prefetching for the best of
them. What changes results is compared only where a text tells what it costs: formats of experts, and routers that
prefer residents, with the policy and the budget that were best. One model is loaded at a time.
"""

# S tokens of a text

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from transformers_moe_offload.config import CacheAwareConfig, HqqFormat, OffloadConfig, PrefetchConfig
from transformers_moe_offload.config.options import choose
from transformers_moe_offload.errors import MoeOffloadError
from transformers_moe_offload.hf.model.plan import OffloadPlan
from transformers_moe_offload.policies import make_policy, policy_names
from transformers_moe_offload.prefetch.predictors import predictor_names
from transformers_moe_offload.routing.meter.figures import figures_of
from transformers_moe_offload.routing.meter.windows import most_positions, windows_of
from transformers_moe_offload.routing.strategy import check_count, check_number
from transformers_moe_offload.tracing import Trace
from transformers_moe_offload.tuning.limits import Load, checked_ram, expect_same_layers, loaded_within, num_weights
from transformers_moe_offload.tuning.lookahead import inputs_of, prefetching, stand_ins
from transformers_moe_offload.tuning.other_programs import OtherPrograms
from transformers_moe_offload.tuning.prediction import Pool, Prediction, predict, single_steps
from transformers_moe_offload.tuning.reading import read, short_of_ram
from transformers_moe_offload.tuning.settings import Candidate, Measured, Setting, Tuned
from transformers_moe_offload.tuning.variants import studied

FORMATS = (HqqFormat(nbits=8, group_size=32), HqqFormat(nbits=4, group_size=32))
STRENGTHS = (0.1, 0.2)
SHARES = (1.0, 0.75, 0.5)
"""Of the RAM. The whole is fastest as a rule; what less of it would do is worth knowing."""
TOKENS, WINDOW = 512, 256
MAX_LOSS = 0.01
CHECKED = 3
"""Settings that are run."""
RUNS = 3
"""Of each: what holds up one step of one of them does not count."""

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def tune(
    load: Load,
    texts: Sequence[Sequence[int] | Tensor],
    *,
    ram: int | str,
    trace: Trace | None = None,
    policies: Sequence[str] | None = None,
    predictors: Sequence[str] | None = None,
    formats: Sequence[HqqFormat] = FORMATS,
    strengths: Sequence[float] = STRENGTHS,
    max_loss: float = MAX_LOSS,
    tokens: int = TOKENS,
    window: int = WINDOW,
    arithmetic: str = "fast",
    progress: Progress = lambda what, done, total: None,
) -> Tuned:
    """Predict how fast a model decodes with many settings that keep its experts within `ram`, run the best three, and
    recommend the fastest.

        tune(lambda config: AutoModelForCausalLM.from_pretrained(path, moe_offload=config), [ids], ram="8GiB")

    `load` loads the model with a config, on a CPU. `texts` are token ids, (S,) each, that the model was not trained on;
    `tokens` of them are read, token by token, in windows of at most `window`, each from an empty cache. `ram` is for
    experts: bytes or a size. With a `trace` settings are ranked by that, and texts are what the best are run on; then
    what would change results is left out, because a trace does not tell what that costs.

    `policies` and `predictors` default to all that are registered. `formats` and `strengths` change results: those by
    which the perplexity of the texts rises by more than `max_loss` (0.01 is 1 %) are not recommended.

    Raises `ConfigError` for options that cannot be, `CapacityError` if `ram` is too small for one expert in each pool
    of slots, `UnsupportedModelError` for a model on a GPU, and `TraceError` for a trace of another model or without a
    step of one token.
    """
    check_number("max_loss", max_loss, least=0)
    check_count("tokens", tokens)
    check_count("window", window, least=2)
    checked_ram(ram)
    aware = [CacheAwareConfig(strength=strength) for strength in strengths]
    if trace is not None:
        single_steps(trace)
    for name in policies or ():
        make_policy(name)
    for name in predictors or ():
        choose("predictor", name, tuple(predictor_names()))
    base = OffloadConfig(cache_budget=ram, mmap=False, arithmetic=arithmetic)  # type: ignore[arg-type]
    search = _Search(load, base, progress)
    search.study(texts, trace, tokens, window)
    search.compare_policies(policies or ["lru", *(name for name in policy_names() if name != "lru")])
    search.compare_predictors(predictor_names() if predictors is None else predictors)
    search.let_go()
    if trace is None:
        for format_ in formats:
            search.try_format(format_)
        for strength in aware:
            search.try_strength(strength)
    elif formats or any(strength.strength for strength in aware):
        search.notes.append(
            "formats of experts and strengths of cache-aware routing are left out: they change results, and a trace "
            "has neither text nor scores to tell by how much; name a text instead"
        )
    return search.run_best(max_loss)


class _Search:
    """Candidates, as they are found."""

    def __init__(self, load: Load, base: OffloadConfig, progress: Progress) -> None:
        self.notes: list[str] = []
        self._load = load
        self._progress = progress
        self._candidates: list[Candidate] = []
        progress("loading the model", 0, 1)
        self._model: Any
        self._model, self._base = loaded_within(load, base, self.notes)
        self._ram_bytes = checked_ram(base.cache_budget)
        self._num_weights = num_weights(self._model)

    def study(self, texts: Sequence[Sequence[int] | Tensor], trace: Trace | None, tokens: int, window: int) -> None:
        """Time the model's steps on the texts."""
        model = self._model
        if trace is not None:
            layers = [(layer.name, layer.num_experts) for layer in model.moe_offload.layers]
            expect_same_layers(trace, layers, type(model).__name__)
        self._texts = windows_of(texts, min(window, most_positions(model) or window), tokens)
        self._progress("timing its steps", 0, 1)
        others = OtherPrograms()
        self._own = studied(model, self._texts)
        self._other_cores = others.cores()
        self._trace = trace

    def compare_policies(self, policies: Sequence[str]) -> None:
        """Each policy with each share of the RAM that comes to another number of slots; with a slot for every expert
        nothing is evicted, and all policies are alike."""
        todo = []
        for config, plan in self._plans():
            differ = policies if plan.num_slots < plan.num_experts else policies[:1]
            todo += [(replace(config, policy=policy), plan) for policy in differ]
        for done, (config, plan) in enumerate(todo):
            self._progress("comparing policies", done, len(todo))
            self._add(config, plan)

    def compare_predictors(self, predictors: Sequence[str]) -> None:
        """Each predictor for the best policies and budgets."""
        if self._trace is not None and "next_router" in predictors:
            self.notes.append("next_router is left out: it reads hidden states, which a trace does not have")
            predictors = [name for name in predictors if name != "next_router"]
        most = self._model.moe_offload.plan.num_experts
        best = [one for one in self._fastest(0) if one.num_slots < most][:CHECKED]
        todo = [(one, name) for one in best for name in predictors]
        for done, (one, name) in enumerate(todo):
            self._progress("comparing predictors", done, len(todo))
            config = replace(one.setting.config, prefetch=PrefetchConfig(predictor=name))
            self._add(config, self._plan_of(config))

    def let_go(self) -> None:
        """Close the model: the next one needs the memory."""
        self._model.moe_offload.close()
        self._model = None
        self._own.recording.calls.clear()

    def try_format(self, format_: HqqFormat) -> None:
        """All experts in a format, in RAM."""
        name = f"{format_.nbits}x{format_.group_size}"
        if not self._has_room(name, int(self._num_weights * format_.bits_per_weight / 8)):
            return
        config = OffloadConfig(experts=format_, cache_budget="100%", arithmetic=self._base.arithmetic)
        self._try_lossy(config, name)

    def try_strength(self, strength: CacheAwareConfig) -> None:
        """Routers that prefer residents, with the best policy and budget."""
        best = next(one for one in self._fastest(0) if one.setting.config.prefetch is None)
        if strength.strength and best.ranked.misses:
            name = f"strength {strength.strength:g}"
            self._try_lossy(replace(best.setting.config, cache_aware=strength), name)

    def run_best(self, max_loss: float) -> Tuned:
        """Run the best ones, one that keeps the model's results among them."""
        ranked = self._fastest(max_loss)
        chosen = ranked[:CHECKED]
        if all(one.setting.loss is not None for one in chosen):
            chosen = [*chosen[: CHECKED - 1], self._fastest(0)[0]]
        speeds = {id(one): self._run(one, place * RUNS, len(chosen) * RUNS) for place, one in enumerate(chosen)}
        return Tuned(
            candidates=tuple(replace(one, measured=speeds.get(id(one))) for one in self._by_speed()),
            ram_bytes=self._ram_bytes,
            max_loss=max_loss,
            tokens=sum(len(text) - 1 for text in self._texts),
            notes=tuple(self.notes),
            other_cores=self._other_cores,
        )

    def _run(self, candidate: Candidate, done: int, total: int) -> Measured:
        """The speed of a setting, after a text that is not counted."""
        self._progress("running the best", done, total)
        model = self._load(candidate.setting.config)
        try:
            before = short_of_ram(model)
            read(model, self._texts[:1], before)
            runs, others = [], OtherPrograms()
            for number in range(RUNS):
                self._progress("running the best", done + number, total)
                runs.append([seconds for one in read(model, self._texts, before) for seconds in one.seconds.tolist()])
            return Measured.of(runs, others.cores())
        finally:
            model.moe_offload.close()

    def _fastest(self, max_loss: float) -> list[Candidate]:
        """Those within a loss, by predicted speed; those that keep the model's results if it is 0."""
        return [
            one
            for one in self._by_speed()
            if one.setting.loss is None or (max_loss > 0 and one.setting.loss.value <= max_loss)
        ]

    def _by_speed(self) -> list[Candidate]:
        return sorted(self._candidates, key=lambda one: (-one.ranked.tokens_per_s, one.num_slots))

    def _plans(self) -> list[tuple[OffloadConfig, OffloadPlan]]:
        """Configs for the shares of the RAM, one for each number of slots, with their plans."""
        found: dict[int, tuple[OffloadConfig, OffloadPlan]] = {}
        whole = self._model.moe_offload.plan
        for share in SHARES:
            nbytes = int(share * min(self._ram_bytes, whole.cache_bytes))
            if share == 1 or nbytes >= whole.smallest_budget:
                config = self._base if share == 1 else replace(self._base, cache_budget=nbytes)
                plan = self._plan_of(config)
                found.setdefault(plan.num_slots, (config, plan))
        return list(found.values())

    def _plan_of(self, config: OffloadConfig) -> OffloadPlan:
        runtime = self._model.moe_offload
        runtime.resize(config.cache_budget)
        plan: OffloadPlan = runtime.plan
        runtime.resize(self._base.cache_budget)
        return plan

    def _try_lossy(self, config: OffloadConfig, name: str) -> None:
        """A setting that changes results, with what it costs on the texts."""
        self._progress(f"timing steps with {name}", 0, 1)
        try:
            model = self._load(config)
        except MoeOffloadError as error:
            self.notes.append(f"{name} is left out: {error}")
            return
        try:
            plan = model.moe_offload.plan
            if config.experts is not None and not self._has_room(name, plan.expert_bytes):  # they are aligned, too
                return
            found = studied(model, self._texts)
        finally:
            model.moe_offload.close()
        loss = figures_of({0.0: self._own.recording.steps, 1.0: found.recording.steps})[1].loss
        predicted = predict(found.recording.traces, pools_of(plan), config.policy, found.costs)
        self._append(Setting(config=config, loss=loss), plan, predicted, predicted)

    def _has_room(self, name: str, nbytes: int) -> bool:
        """Whether experts of so many bytes fit; notes it if they do not."""
        if nbytes > self._ram_bytes:
            self.notes.append(f"{name} is left out: experts take {nbytes:,} bytes in it, more than {self._ram_bytes:,}")
        return nbytes <= self._ram_bytes

    def _add(self, config: OffloadConfig, plan: OffloadPlan) -> None:
        """A setting that keeps the model's results."""
        recording = self._own.recording
        predicted = self._predicted(config, plan, recording.traces, inputs_of(recording))
        if self._trace is None:
            ranked = predicted
        else:
            ranked = self._predicted(config, plan, [self._trace], stand_ins(self._model, self._trace))
        self._append(Setting(config=config), plan, ranked, predicted)

    def _append(self, setting: Setting, plan: OffloadPlan, ranked: Prediction, predicted: Prediction) -> None:
        self._candidates.append(
            Candidate(setting=setting, num_slots=plan.num_slots, ranked=ranked, predicted=predicted)
        )

    def _predicted(
        self, config: OffloadConfig, plan: OffloadPlan, traces: Sequence[Trace], inputs: Sequence[Sequence[Tensor]]
    ) -> Prediction:
        ahead = None if config.prefetch is None else prefetching(self._model, config.prefetch, inputs)
        return predict(traces, pools_of(plan), config.policy, self._own.costs, ahead)


def pools_of(plan: OffloadPlan) -> list[Pool]:
    """The pools of a plan, as a prediction needs them."""
    return [Pool(pool.layers, pool.num_slots) for pool in plan.pools]

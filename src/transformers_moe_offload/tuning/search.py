"""Find the fastest setting for a model in so much RAM: predict many, run the best three.

Settings that keep a model's results are compared first: each policy at each budget, then prefetching for the best of
them. What changes results is compared only where a text tells what it costs: formats of experts, and routers that
prefer residents, with the policy and the budget that were best.
"""

# S tokens of a text

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from transformers_moe_offload.config import CacheAwareConfig, HqqFormat, OffloadConfig, PrefetchConfig
from transformers_moe_offload.errors import MoeOffloadError
from transformers_moe_offload.hf.model.plan import OffloadPlan
from transformers_moe_offload.policies import policy_names
from transformers_moe_offload.prefetch.predictors import predictor_names
from transformers_moe_offload.routing.meter import Interval
from transformers_moe_offload.routing.meter.figures import figures_of
from transformers_moe_offload.routing.meter.windows import most_positions, windows_of
from transformers_moe_offload.routing.strategy import check_count, check_number
from transformers_moe_offload.tracing import Trace
from transformers_moe_offload.tuning.limits import (
    Load,
    bytes_in_format,
    checked_ram,
    expect_same_layers,
    loaded_within,
)
from transformers_moe_offload.tuning.lookahead import inputs_of, prefetching, stand_ins
from transformers_moe_offload.tuning.prediction import Pool, Prediction, predict, single_steps
from transformers_moe_offload.tuning.reading import read, short_of_ram
from transformers_moe_offload.tuning.settings import Candidate, Setting, Tuned
from transformers_moe_offload.tuning.variants import Variant, studied

FORMATS = (HqqFormat(nbits=8, group_size=64), HqqFormat(nbits=4, group_size=32))
STRENGTHS = (0.1, 0.2)
SHARES = (1.0, 0.75, 0.5)
"""Of the RAM. The largest is the fastest as a rule; but with few slots that do not divide evenly it need not be."""
TOKENS, WINDOW = 512, 128
MAX_LOSS = 0.01
CHECKED = 3
"""Settings that are run."""
RUNS = 2

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
    if trace is not None:
        single_steps(trace)
    base = OffloadConfig(cache_budget=ram, mmap=False, arithmetic=arithmetic)  # type: ignore[arg-type]
    aware = [CacheAwareConfig(strength=strength) for strength in strengths if strength != 0]
    for policy in policies or ():
        replace(base, policy=policy)
    search = _Search(load, base, texts, trace, max_loss, tokens, window, progress)
    search.compare_policies(policies or policy_names())
    search.compare_predictors(predictor_names() if predictors is None else predictors)
    if trace is None:
        for format_ in formats:
            search.try_format(format_)
        for strength in aware:
            search.try_strength(strength)
    elif formats or aware:
        search.notes.append(
            "formats of experts and strengths of cache-aware routing are left out: they change results, and a trace "
            "has neither text nor scores to tell by how much; name a text instead"
        )
    return search.result()


class _Search:
    """Candidates, as they are found."""

    def __init__(
        self,
        load: Load,
        base: OffloadConfig,
        texts: Sequence[Sequence[int] | Tensor],
        trace: Trace | None,
        max_loss: float,
        tokens: int,
        window: int,
        progress: Progress,
    ) -> None:
        self.notes: list[str] = []
        self._load = load
        self._max_loss = max_loss
        self._progress = progress
        self._candidates: list[Candidate] = []
        progress("loading the model", 0, 1)
        model, self._ram_bytes, self._base = loaded_within(load, base, self.notes)
        self._model: Any = model
        if trace is not None:
            expect_same_layers(
                trace, [(layer.name, layer.num_experts) for layer in model.moe_offload.layers], type(model).__name__
            )
        self._texts = windows_of(texts, min(window, most_positions(model) or window), tokens)
        self._own = self._studied(model, "timing its steps")
        self._ranked_by = self._own.recording.traces if trace is None else [trace]
        self._inputs = inputs_of(self._own.recording) if trace is None else stand_ins(model, trace)

    def compare_policies(self, policies: Sequence[str]) -> None:
        """Each policy with each share of the RAM that comes to another number of slots."""
        plans = self._plans()
        todo = [(config, plan, policy) for config, plan in plans for policy in policies]
        for done, (config, plan, policy) in enumerate(todo):
            self._progress("comparing policies", done, len(todo))
            self._add(Setting(config=replace(config, policy=policy)), plan, self._own)

    def compare_predictors(self, predictors: Sequence[str]) -> None:
        """Each predictor for the best policies and budgets."""
        best = self._fastest()[:CHECKED]
        if all(one.ranked.hit_rate == 1 for one in best) or self._model.moe_offload.plan.num_slots == 0:
            return
        if self._ranked_by is not self._own.recording.traces and "next_router" in predictors:
            self.notes.append("next_router is left out: it reads hidden states, which a trace does not have")
            predictors = [name for name in predictors if name != "next_router"]
        todo = [(one, name) for one in best for name in predictors]
        for done, (one, name) in enumerate(todo):
            self._progress("comparing predictors", done, len(todo))
            config = replace(one.setting.config, prefetch=PrefetchConfig(predictor=name))
            self._add(Setting(config=config), self._plan_of(config), self._own)

    def try_format(self, format_: HqqFormat) -> None:
        """All experts in a format, in RAM."""
        name = f"{format_.nbits}x{format_.group_size}"
        nbytes = bytes_in_format(self._model, format_)
        if nbytes > self._ram_bytes:
            self.notes.append(
                f"{name} is left out: experts take {nbytes:,} bytes in it, and {self._ram_bytes:,} are given"
            )
            return
        config = OffloadConfig(experts=format_, cache_budget="100%", arithmetic=self._base.arithmetic)
        self._progress(f"quantizing experts to {name}", 0, 1)
        try:
            model = self._load(config)
        except MoeOffloadError as error:
            self.notes.append(f"{name} is left out: {error}")
            return
        try:
            self._add_lossy(model, config, f"timing steps in {name}")
        finally:
            model.moe_offload.close()

    def try_strength(self, strength: CacheAwareConfig) -> None:
        """Routers that prefer residents, with the best policy and budget."""
        best = next((one for one in self._fastest() if one.setting.loss is None), None)
        if best is None or best.ranked.misses == 0:
            return
        config = replace(best.setting.config, prefetch=None, cache_aware=strength)
        model = self._load(config)
        try:
            self._add_lossy(model, config, f"timing steps at strength {strength.strength:g}")
        finally:
            model.moe_offload.close()

    def result(self) -> Tuned:
        """The best ones, run."""
        self._model.moe_offload.close()
        ranked = self._fastest()
        chosen = ranked[:CHECKED]
        if all(one.setting.loss is not None for one in chosen):
            chosen = [*chosen[:-1], next(one for one in ranked if one.setting.loss is None)]
        runs = {id(one): self._run(one, done) for done, one in enumerate(chosen)}
        found = tuple(replace(one, measured=runs.get(id(one), ())) for one in self._all_fastest())
        tokens = sum(len(text) - 1 for text in self._texts)
        return Tuned(
            candidates=found, ram_bytes=self._ram_bytes, max_loss=self._max_loss, tokens=tokens, notes=tuple(self.notes)
        )

    def _run(self, candidate: Candidate, done: int) -> tuple[float, ...]:
        """Tokens per second of each run of a setting, after a text that is not counted."""
        model = self._load(candidate.setting.config)
        try:
            before = short_of_ram(model)
            read(model, self._texts[:1], before)
            speeds = []
            for number in range(RUNS):
                self._progress("running the best", done * RUNS + number, CHECKED * RUNS)
                steps = [one for one, _ in read(model, self._texts, before)]
                speeds.append(sum(len(one.seconds) for one in steps) / sum(float(one.seconds.sum()) for one in steps))
        finally:
            model.moe_offload.close()
        return tuple(speeds)

    def _fastest(self) -> list[Candidate]:
        """Those within the loss, by predicted speed."""
        return [
            one for one in self._all_fastest() if one.setting.loss is None or one.setting.loss.value <= self._max_loss
        ]

    def _all_fastest(self) -> list[Candidate]:
        return sorted(self._candidates, key=lambda one: (-one.ranked.tokens_per_s, one.num_slots))

    def _plans(self) -> list[tuple[OffloadConfig, OffloadPlan]]:
        """Configs for the shares of the RAM, one for each number of slots, with their plans."""
        found: dict[int, tuple[OffloadConfig, OffloadPlan]] = {}
        whole = self._model.moe_offload.plan
        for share in SHARES:
            nbytes = int(share * min(self._ram_bytes, whole.cache_bytes))
            if nbytes < whole.smallest_budget:
                continue
            config = self._base if share == 1 else replace(self._base, cache_budget=nbytes)
            plan = self._plan_of(config)
            found.setdefault(plan.num_slots, (config, plan))
        return list(found.values())

    def _plan_of(self, config: OffloadConfig) -> OffloadPlan:
        runtime = self._model.moe_offload
        runtime.resize(config.cache_budget)
        try:
            plan: OffloadPlan = runtime.plan
        finally:
            runtime.resize(self._base.cache_budget)
        return plan

    def _studied(self, model: Any, what: str, references: Sequence[Tensor] | None = None) -> Variant:
        self._progress(what, 0, 1)
        return studied(model, self._texts, references)

    def _add_lossy(self, model: Any, config: OffloadConfig, what: str) -> None:
        """A candidate that changes results, with what it costs on the texts."""
        found = self._studied(model, what, self._own.predictions)
        loss: Interval = figures_of({0.0: self._own.steps, 1.0: found.steps})[1].loss
        plan = model.moe_offload.plan
        predicted = predict(found.recording.traces, pools_of(plan), config.policy, found.costs)
        self._candidates.append(
            Candidate(
                setting=Setting(config=config, loss=loss),
                num_slots=plan.num_slots,
                ranked=predicted,
                predicted=predicted,
            )
        )

    def _add(self, setting: Setting, plan: OffloadPlan, variant: Variant) -> None:
        """A candidate that keeps the model's results."""
        ranked = self._predicted(setting, plan, self._ranked_by, self._inputs)
        own = self._own.recording.traces
        same = self._ranked_by is own
        predicted = ranked if same else self._predicted(setting, plan, own, inputs_of(self._own.recording))
        self._candidates.append(
            Candidate(setting=setting, num_slots=plan.num_slots, ranked=ranked, predicted=predicted)
        )

    def _predicted(
        self, setting: Setting, plan: OffloadPlan, traces: Sequence[Trace], inputs: Sequence[Sequence[Tensor]]
    ) -> Prediction:
        config = setting.config
        ahead = None if config.prefetch is None else prefetching(self._model, config.prefetch, inputs)
        return predict(traces, pools_of(plan), config.policy, self._own.costs, ahead)


def pools_of(plan: OffloadPlan) -> list[Pool]:
    """The pools of a plan, as a prediction needs them."""
    return [Pool(pool.layers, pool.num_slots) for pool in plan.pools]

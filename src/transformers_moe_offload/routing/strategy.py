"""What a routing strategy is, the list of strategies by name, and checks that their options share."""

# T tokens, K experts per token, E experts

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from transformers_moe_offload.config.options import refuse_unknown
from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.registry import Registry
from transformers_moe_offload.routing.choice import Choice, RouterCall


class RoutingStrategy(ABC):
    """Chooses experts for tokens; the architecture computes their weights.

    One strategy serves all layers that it is set for, of any number of models. Options are the arguments of its
    constructor, and it does not change: what it has to remember of its calls is in `RouterCall.memory`.
    """

    knows_texts: bool = False
    """Whether it has to know which text every token is of: `RouterCall.texts`."""
    follows_cache: bool = False
    """Whether the choice depends on which experts are resident."""

    @property
    def is_neutral(self) -> bool:
        """Whether it lets every router choose as it would; then routers are not even watched."""
        return False

    @abstractmethod
    def choose(self, call: RouterCall) -> Choice | None:
        """The experts of the call's tokens, a function of the call and its memory alone.

        None lets the router choose as it would.
        """

    def memory(self) -> Any:
        """A new memory, made whenever the strategy is set and shared by the routers that it is set for then. A copy of
        a model copies it."""
        return None

    def check_model(self, num_routers: int) -> None:  # noqa: B027
        """Raise `ConfigError` if the options do not fit a model with so many routers; called before `check`."""

    def check(self, layer: int, num_experts: int, top_k: int | None) -> None:  # noqa: B027
        """Raise `ConfigError` if the options do not fit a router; called before anything is changed.

        `layer` is the number of the router, `top_k` its experts per token, None where the model does not say.
        """


_strategies: Registry[Callable[..., RoutingStrategy]] = Registry("strategy")

Strategy = TypeVar("Strategy", bound=Callable[..., RoutingStrategy])


def register_strategy(name: str, *, exist_ok: bool = False) -> Callable[[Strategy], Strategy]:
    """Decorator: make a `RoutingStrategy` available to `set_routing` by name."""
    return _strategies.register(name, exist_ok=exist_ok)  # type: ignore[return-value]


def strategy_names() -> list[str]:
    """Names of the registered strategies, in alphabetical order."""
    return _strategies.names()


def make_strategy(strategy: str | RoutingStrategy, options: Mapping[str, Any]) -> RoutingStrategy:
    """A strategy by its name and options; a `RoutingStrategy` is returned as it is."""
    if isinstance(strategy, RoutingStrategy):
        if options:
            raise ConfigError(f"{strategy} already has its options; leave out {', '.join(options)}")
        return strategy
    if not isinstance(strategy, str):
        raise ConfigError(f"strategy={strategy!r} is neither a name nor a RoutingStrategy")
    kind = _strategies[strategy]
    parameters = inspect.signature(kind).parameters
    named = {name: one for name, one in parameters.items() if one.kind is not one.VAR_KEYWORD}
    if named == parameters:  # it takes no others
        refuse_unknown(f"strategy {strategy!r}", options, list(named))
    missing = [name for name, one in named.items() if one.default is one.empty and name not in options]
    if missing:
        raise ConfigError(f"strategy {strategy!r} needs {' and '.join(missing)}; pass {missing[0]}=...")
    return kind(**options)


def check_number(option: str, value: object, *, above: float | None = None, least: float | None = None) -> None:
    """Raise `ConfigError` unless the value is a finite number, above `above` and at least `least` where given."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if not is_number or (above is not None and value <= above) or (least is not None and value < least):  # type: ignore[operator]
        bound = f" above {above:g}" if above is not None else f" of at least {least:g}" if least is not None else ""
        raise ConfigError(f"{option}={value!r} is not a number{bound}")


def check_count(option: str, value: object, *, least: int = 1) -> None:
    """Raise `ConfigError` unless the value is an integer of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{option}={value!r} is not an integer of at least {least}")


def check_seed(value: object) -> None:
    """Raise `ConfigError` unless the value is a seed: an integer of at least 0."""
    check_count("seed", value, least=0)

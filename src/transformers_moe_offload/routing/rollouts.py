"""Train a model with the experts that its rollouts had: rollout routing replay (R3, arXiv 2510.11370).

A rollout reads its text token by token, and training reads it at once. Rounding differs, so some tokens get other
experts, and the probabilities that reinforcement learning compares are of two different models. Here rollouts are
recorded, and the forwards that follow replay them; weights stay the router's, so that gradients reach it.
"""

from __future__ import annotations

from typing import Any, Self

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.routing.recorder import record_routing
from transformers_moe_offload.routing.sites import unwrapped
from transformers_moe_offload.routing.switching import Layers, RoutingChange, set_routing
from transformers_moe_offload.routing.trace import RoutingTrace


class RolloutReplay:
    """Records each `model.generate`, and lets all forwards until the next one replay it.

        with routing.RolloutReplay(model):
            trainer.train()

    For trainers that write rollouts with the model's own `generate` and train on what the latest call wrote, as TRL's
    GRPOTrainer does. A token that the latest rollouts have not read raises `TraceError`, but for the last one of a
    text, which was sampled and not read. Strategies that are set already hold for rollouts.

    Routes of rollouts by another engine are replayed with `RoutingTrace.from_routed_experts` and `set_routing`.
    """

    def __init__(self, model: Any, *, layers: Layers = None) -> None:
        """`layers` are numbers or module paths of routers; None means all."""
        self.trace: RoutingTrace | None = None
        """The latest rollouts; None before the first."""
        self._model = model
        self._base = unwrapped(model)
        self._layers = layers
        self._change: RoutingChange | None = None
        self._own: Any = None

    def start(self) -> None:
        """Begin with the next rollout."""
        if "generate" in vars(self._base):
            raise ConfigError(
                f"{type(self._base).__name__}.generate is replaced already, by another RolloutReplay or by other code; "
                f"undo that first"
            )
        self._own = self._base.generate
        # An attribute of the model: PEFT's wrappers and trainers call it, too.
        vars(self._base)["generate"] = self._generate

    def stop(self) -> None:
        """Undo `start`, and end the replay."""
        vars(self._base).pop("generate", None)
        self._end_replay()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _generate(self, *args: Any, **kwargs: Any) -> Any:
        self._end_replay()
        with record_routing(self._model, layers=self._layers, scores=None) as recorder:
            written = self._own(*args, **kwargs)
        self.trace = recorder.trace
        self._change = set_routing(self._model, "replay", self._layers, trace=self.trace, missing="last")
        return written

    def _end_replay(self) -> None:
        if self._change is not None:
            self._change.__exit__()
            self._change = None

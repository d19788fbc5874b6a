"""Add figures of the cache and the routers to Trainer's log, and refuse to resume from another model's checkpoint."""

from __future__ import annotations

import hashlib
import logging
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_utils import SaveStrategy

from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.hf.model.handle import OffloadRuntime, runtime_of
from transformers_moe_offload.hf.upstream import ExportableState
from transformers_moe_offload.system.host_memory import host_bytes
from transformers_moe_offload.training.routers import RouterWatch, entropy

logger = logging.getLogger(__name__)


class MoeOffloadCallback(TrainerCallback, ExportableState):
    """Adds `moe_hit_rate`, `moe_disk_mb_per_step`, `moe_stall_ms_per_step` and `router_entropy` to every log entry.

    Every checkpoint holds a key of the frozen experts' weights; resuming from one with another key raises
    `CheckpointError`. A warning before the first step says if Trainer cannot resume from the checkpoints it will write.
    """

    def __init__(self) -> None:
        self.content_key: str | None = None
        self._entropies: list[float] = []
        self._watch: RouterWatch | None = None
        self._steps = 0

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint keeps."""
        return {"args": {}, "attributes": {"content_key": self.content_key}}

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Compare the checkpoint's experts with the model's, and start to count."""
        runtime = runtime_of(model)
        self.content_key = content_key(runtime)
        kept = (state.stateful_callbacks or {}).get(type(self).__name__)
        trained_on = kept["attributes"].get("content_key") if isinstance(kept, dict) else None
        if trained_on not in (None, self.content_key):
            raise CheckpointError(
                f"the checkpoint was trained on experts with key {trained_on}, but this model's have "
                f"{self.content_key}; load the model that was trained, or start anew without resume_from_checkpoint"
            )
        if runtime.is_quantized and not hasattr(model, "peft_config") and args.save_strategy != SaveStrategy.NO:
            logger.warning(
                "Trainer will neither go on from checkpoints of this run nor find the best of them: it looks for "
                "model.safetensors, and models in low bits are saved under other names; train an adapter, such as "
                "training.lora_config(model, experts=False, routers=True), or set save_strategy='no'"
            )
        self._stop_watching()  # after an interrupted training, which had no on_train_end
        self._watch = RouterWatch(model, lambda logits: self._entropies.append(entropy(logits)))
        runtime.reset_stats()
        self._steps = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """One optimizer step is over."""
        self._steps += 1

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, model: Any = None, **kwargs: Any
    ) -> None:
        """Add the figures of the cache and the routers to the entry with the loss."""
        if logs is None or "loss" not in logs or self._watch is None:
            return
        runtime, steps = runtime_of(model), max(1, self._steps)
        stats = runtime.stats()
        figures = {
            "moe_hit_rate": round(stats.hit_rate, 4),
            "moe_disk_mb_per_step": round(stats.disk_bytes / steps / 1e6, 3),
            "moe_stall_ms_per_step": round(stats.stall_ms / steps, 3),
            "router_entropy": round(sum(self._entropies) / max(1, len(self._entropies)), 4),
        }
        logs.update(figures)
        state.log_history[-1].update(figures)
        runtime.reset_stats()
        self._entropies.clear()
        self._steps = 0

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop watching."""
        self._stop_watching()

    def _stop_watching(self) -> None:
        self._entropies.clear()
        if self._watch is not None:
            self._watch.remove()
            self._watch = None


def content_key(runtime: OffloadRuntime) -> str:
    """A key to compare the experts of two models by: a digest of the first one in three of the sparse layers."""
    layers = runtime.layers
    digest = hashlib.blake2b(digest_size=8)
    for place in sorted({0, len(layers) // 2, len(layers) - 1}):
        digest.update(host_bytes(runtime.source(layers[place]).read_record(0)))
    return digest.hexdigest()

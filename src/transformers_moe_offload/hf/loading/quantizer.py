"""What Transformers calls while it loads a model with an `OffloadConfig`.

Transformers knows one way to take part in loading: to be a quantizer. Ours changes no weight. It takes the experts
out before the weights are loaded, learns where they are in the files, and attaches the runtime afterwards.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from transformers_moe_offload.config import ExpertFormats, OffloadConfig
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.hf.arguments import refuse_kernels, refuse_splits
from transformers_moe_offload.hf.loading.attach import attach
from transformers_moe_offload.hf.loading.checkpoint import Checkpoint, expect_unused, locate
from transformers_moe_offload.hf.loading.discover import take_over
from transformers_moe_offload.hf.loading.quantize_on_load import codings_to_be, quantized
from transformers_moe_offload.hf.loading.records import locate_records, record_keys
from transformers_moe_offload.hf.model.caches import LayerCaches
from transformers_moe_offload.hf.model.dense import prepare_dense, quantize_dense, settle_dense
from transformers_moe_offload.hf.model.layer import SparseLayer
from transformers_moe_offload.hf.model.state_dicts import with_experts
from transformers_moe_offload.hf.prebuilt.layout import INDEX_NAME
from transformers_moe_offload.hf.prebuilt.loading import DenseCheck
from transformers_moe_offload.hf.upstream import (
    HfQuantizer,
    dtype_plan,
    end_of_load,
    experts_implementation,
    has_peft_adapter,
)
from transformers_moe_offload.policies import make_policy
from transformers_moe_offload.store.encoding import num_encoded

logger = logging.getLogger(__name__)

asked_for: ContextVar[OffloadConfig | None] = ContextVar("asked_for", default=None)
"""The config that a call of `from_pretrained` was given for a checkpoint that has a recipe of its own: Transformers
lets no other one through to us."""
to_save: ContextVar[Mapping[str, torch.Tensor] | None] = ContextVar("to_save", default=None)
"""The `state_dict` that a call of `save_pretrained` was given, which Transformers does not show a quantizer."""


class MoeOffloadQuantizer(HfQuantizer):
    """Loads a model without its routed experts, and attaches their offloading to it."""

    quantization_config: OffloadConfig

    def __init__(self, quantization_config: OffloadConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._is_prebuilt = bool(kwargs.get("pre_quantized"))
        """Whether the checkpoint's experts are in a format of ours."""
        if self._is_prebuilt:
            self.quantization_config = quantization_config.override(asked_for.get() or OffloadConfig())
        # Transformers quantizes nothing on the fly, so it may load with several threads.
        self.pre_quantized = True
        self._device: torch.device | None = None
        """Where all of the model is going to be; None where that is several devices, or not known."""
        self._layers: list[SparseLayer] = []
        self._sources: list[Any] = []
        self._checkpoint: Checkpoint | None = None
        self._dense_check: DenseCheck | None = None

    # In the order in which Transformers calls them.

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Find out about a misspelt policy before anything is downloaded."""
        make_policy(self.quantization_config.policy)

    def update_device_map(self, device_map: Any) -> Any:
        """Without a device map the dense weights go to the accelerator, as with any quantized model."""
        if device_map is None and torch.cuda.is_available():
            device_map = {"": torch.cuda.current_device()}
        self._device = _only_device(device_map)
        return device_map

    def update_attn_implementation(self, config: Any) -> Any:
        """The one hook that sees the config before the model is built: say if an option in it will have no effect."""
        refuse_splits(getattr(config, "distributed_config", None))
        implementation = experts_implementation(config)
        if implementation is not None:
            logger.warning(
                f"experts_implementation={implementation!r} has no effect on offloaded experts; "
                f"OffloadConfig.arithmetic chooses between 'fast' and 'exact'"
            )
        if self._is_prebuilt:
            config.transformers_weights = INDEX_NAME
        return config

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, dtype: Any = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise CheckpointError(
                "offloading needs a checkpoint on disk to read experts from; "
                "a model built from a config or a state_dict has none, so save it first"
            )
        self._checkpoint = Checkpoint.open(
            [Path(file) for file in checkpoint_files],
            folder=Path(model.config.name_or_path),
            parameters=dict(model.state_dict()),
            dtype_plan=dtype_plan(model, dtype),
        )
        if self._is_prebuilt:
            self._dense_check = DenseCheck(self._checkpoint.tensors)
        self._layers = take_over(model)
        if kwargs.get("use_kernels"):
            refuse_kernels(model)
        if self._is_prebuilt and self.quantization_config.dense is not None:
            prepare_dense(model, self._layers, self.quantization_config.dense)

    def adjust_max_memory(self, max_memory: dict[int | str, int]) -> dict[int | str, int]:
        """Leave room for the cache on every GPU, where its size is known before the dense weights are placed."""
        budget = self.quantization_config.budget
        gpus = [device for device in max_memory if isinstance(device, int)]
        if not gpus or (budget.nbytes is None and budget.share is None):
            return max_memory
        all_bytes = sum(layer.num_experts * layer.expert_bytes for layer in self._layers)
        share = budget.resolve(all_bytes, 0) // len(gpus)
        return {d: max(0, limit - share) if d in gpus else limit for d, limit in max_memory.items()}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """The final list of conversions is known: locate the experts. The list stays as it is."""
        assert self._checkpoint is not None
        if self._is_prebuilt:
            formats = self.quantization_config.formats or ExpertFormats()
            self._sources = locate_records(model, self._layers, self._checkpoint, formats)
            expect_unused(model, record_keys(self._checkpoint.tensors), weight_conversions)
        else:
            self._sources = locate(model, self._layers, self._checkpoint, weight_conversions)
        self._expect_enough(model)
        return weight_conversions

    def _expect_enough(self, model: Any) -> None:
        """Refuse a budget that cannot work before weights are loaded, where it is known on which device they go."""
        if self._device is None:
            return
        for layer in self._layers:
            layer.device = self._device
        config, coded = self.quantization_config, {}
        if config.formats is not None and not self._is_prebuilt:
            codings = codings_to_be(model, self._layers, self._sources, config.formats)
            pairs = zip(self._layers, codings, strict=True)
            coded = {layer.index: one for layer, one in pairs if num_encoded(one, layer.num_experts)}
        LayerCaches(self._layers).expect_enough({s.spec.layer: s for s in self._sources}, config, coded)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        if self._dense_check is not None:
            self._dense_check.expect_whole()
        if self._is_prebuilt:
            settle_dense(model)
        else:
            self._quantize(model)
        attach(model, self.quantization_config, self._layers, self._sources)
        end_of_load(model)
        self._layers, self._sources, self._checkpoint, self._dense_check = [], [], None, None

    def _quantize(self, model: Any) -> None:
        config = self.quantization_config
        if config.formats is not None:
            self._sources = quantized(model, self._layers, self._sources, config.formats)
        if config.dense is not None:
            quantize_dense(model, self._layers, config.dense)

    # What Transformers asks later.

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """For `save_pretrained`: the state dict of the plain model, experts included; an adapter needs none of them."""
        given = to_save.get()
        if has_peft_adapter(model):
            return None if given is None else dict(given), {}
        return with_experts(model, given), {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether `save_pretrained` works: it writes what the plain model would."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Whether adapters can be trained: gradients flow through frozen experts."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may ask for a compiled call.

        Elsewhere torch would capture graphs of its own, but which experts are needed is decided on the host. With
        `decode="graph"` what `generate` is given for it replays steps that were captured (`decode/step.py`).
        """
        return bool(self.quantization_config.decode == "graph")


def _only_device(device_map: Any) -> torch.device | None:
    """The device that a device map, or none, puts all of a model on."""
    if device_map is None:
        return torch.device("cpu")
    places = set(device_map.values()) if isinstance(device_map, dict) else set()
    return torch.device(places.pop()) if len(places) == 1 and "disk" not in places else None

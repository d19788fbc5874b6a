"""The quantizer that Transformers calls while it loads a model with an `OffloadConfig`.

In Transformers only a quantizer can take part in loading. Ours takes the experts out before the weights are loaded,
locates them in the files, and attaches the runtime afterwards; it quantizes weights only if the config asks for it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from transformers_moe_offload.config import ExpertFormats, HqqFormat, OffloadConfig
from transformers_moe_offload.errors import CheckpointError
from transformers_moe_offload.hf.arguments import asked_for, refuse_splits, to_save
from transformers_moe_offload.hf.loading.attach import attach
from transformers_moe_offload.hf.loading.checkpoint import Checkpoint, expect_unused, locate
from transformers_moe_offload.hf.loading.codecs import codecs_to_be, quantized
from transformers_moe_offload.hf.loading.discover import refuse_kernels, take_over
from transformers_moe_offload.hf.loading.records import locate_records, record_keys
from transformers_moe_offload.hf.model.dense import dense_formats, prepare_dense, quantize_dense, settle_dense
from transformers_moe_offload.hf.model.planning import expect_enough
from transformers_moe_offload.hf.model.sparse_layer import SparseLayer
from transformers_moe_offload.hf.model.state_dicts import with_experts
from transformers_moe_offload.hf.prebuilt.loading import DenseCheck
from transformers_moe_offload.hf.prebuilt.names import INDEX_NAME
from transformers_moe_offload.hf.upstream import (
    HfQuantizer,
    dtype_plan,
    end_of_load,
    experts_implementation,
    has_peft_adapter,
)
from transformers_moe_offload.policies import make_policy
from transformers_moe_offload.store.encoding import row_sizes

logger = logging.getLogger(__name__)


class MoeOffloadQuantizer(HfQuantizer):
    """Loads a model without its routed experts, and attaches the runtime that offloads them."""

    quantization_config: OffloadConfig

    def __init__(self, quantization_config: OffloadConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._is_prebuilt = bool(kwargs.get("pre_quantized"))
        """Whether the checkpoint stores experts in a format of ours."""
        if self._is_prebuilt:
            self.quantization_config = quantization_config.override(asked_for.get() or OffloadConfig())
        # Lets Transformers load with several threads: it quantizes nothing on the fly.
        self.pre_quantized = True
        self._device: torch.device | None = None
        """The device of the whole model; None if there are several, or it is not known."""
        self._layers: list[SparseLayer] = []
        self._sources: list[Any] = []
        self._checkpoint: Checkpoint | None = None
        self._dense_check: DenseCheck | None = None
        self._dense_formats: dict[str, HqqFormat] = {}
        """Of the dense layers to quantize once they are loaded, by path."""

    # In the order in which Transformers calls them.

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise for a misspelt policy before anything is downloaded."""
        make_policy(self.quantization_config.policy)

    def update_device_map(self, device_map: Any) -> Any:
        """Without a device map the dense weights go to the accelerator, as with any quantized model."""
        if device_map is None and torch.cuda.is_available():
            device_map = {"": torch.cuda.current_device()}
        self._device = _only_device(device_map)
        return device_map

    def update_attn_implementation(self, config: Any) -> Any:
        """The only hook that gets the config before the model is built: warn about options without effect."""
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
        if self._is_prebuilt:
            prepare_dense(model, self._layers, self.quantization_config)
        else:
            self._dense_formats = dense_formats(model, self._layers, self.quantization_config)

    def adjust_max_memory(self, max_memory: dict[int | str, int]) -> dict[int | str, int]:
        """Reserve memory for the cache on every GPU, if its size is known before the dense weights are placed."""
        budget = self.quantization_config.budget
        gpus = [device for device in max_memory if isinstance(device, int)]
        if not gpus or (budget.nbytes is None and budget.share is None):
            return max_memory
        all_bytes = sum(layer.num_experts * layer.expert_bytes for layer in self._layers)
        share = budget.resolve(all_bytes, 0) // len(gpus)
        return {d: max(0, limit - share) if d in gpus else limit for d, limit in max_memory.items()}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Locate the experts, now that the list of conversions is final; returns the list unchanged."""
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
        """Raise for a budget that is too small, before weights are loaded, if the device is known."""
        if self._device is None:
            return
        layers = [replace(layer, device=self._device) for layer in self._layers]
        config, coded = self.quantization_config, {}
        if config.formats is not None and not self._is_prebuilt:
            codecs = codecs_to_be(model, self._layers, self._sources, config.formats)
            pairs = zip(self._layers, codecs, strict=True)
            coded = {layer.index: one for layer, one in pairs if row_sizes(one, layer.num_experts)}
        expect_enough(layers, {s.spec.layer: s for s in self._sources}, config, coded)

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
        self._dense_formats = {}

    def _quantize(self, model: Any) -> None:
        config = self.quantization_config
        if config.formats is not None:
            self._sources = quantized(model, self._layers, self._sources, config.formats)
        quantize_dense(model, self._dense_formats)

    # Called after loading.

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor] | None, dict[str, str]]:
        """For `save_pretrained`: the state dict of the plain model with its experts, or without for an adapter."""
        given = to_save.get()
        if has_peft_adapter(model):
            return None if given is None else dict(given), {}
        return with_experts(model, given), {}

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """True: `save_pretrained` writes the same weights as for the plain model."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: adapters can be trained, because gradients flow through frozen experts."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether `generate` may ask for a compiled call.

        Only with `decode="graph"`, where the call replays captured steps (`cuda_graphs/step.py`). Otherwise torch would
        capture graphs of its own, which is not possible while the host decides which experts are needed.
        """
        return bool(self.quantization_config.decode == "graph")


def _only_device(device_map: Any) -> torch.device | None:
    """The single device of a device map, `cpu` without a map; None if there are several devices or it uses disk."""
    if device_map is None:
        return torch.device("cpu")
    places = set(device_map.values()) if isinstance(device_map, dict) else set()
    return torch.device(places.pop()) if len(places) == 1 and "disk" not in places else None

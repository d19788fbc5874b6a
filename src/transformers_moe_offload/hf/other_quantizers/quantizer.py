"""Load a checkpoint that another method has quantized.

The method's own quantizer runs unchanged on the model without its experts, so the dense part is exactly as in plain
Transformers. The experts stay in their stored form, in the files and in the cache.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

from transformers_moe_offload.config import OffloadConfig
from transformers_moe_offload.errors import UnsupportedModelError
from transformers_moe_offload.hf.loading.checkpoint import locate
from transformers_moe_offload.hf.loading.quantizer import MoeOffloadQuantizer
from transformers_moe_offload.hf.model.experts_module import OffloadedExperts
from transformers_moe_offload.hf.other_quantizers.keep_encoded import as_stored
from transformers_moe_offload.hf.upstream import HfQuantizer, WeightConverter, get_keys_to_not_convert

logger = logging.getLogger(__name__)


class DelegatingQuantizer(MoeOffloadQuantizer):
    """Offloads experts that another method has quantized, and leaves everything else to that method's quantizer."""

    def __init__(self, quantization_config: OffloadConfig, method: HfQuantizer) -> None:
        super().__init__(quantization_config, pre_quantized=False)
        self._method = method
        self._plain_conversions: list[Any] = []
        if method.quantization_config.quant_method == "mxfp4" or quantization_config.dense is not None:
            # MXFP4 quantizes experts only; dense weights have to be dequantized before they are quantized again.
            method.quantization_config.dequantize = True

    @property
    def _opens_dense(self) -> bool:
        """Whether the dense part is dequantized while it is loaded."""
        return bool(self._method.quantization_config.dequantize)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Check ours and the method's."""
        super().validate_environment(*args, **kwargs)
        self._method.validate_environment(*args, **kwargs)

    def update_dtype(self, dtype: Any) -> Any:
        """The method's."""
        return self._method.update_dtype(dtype)

    def update_device_map(self, device_map: Any) -> Any:
        """The method's map, or ours if it has none."""
        return super().update_device_map(self._method.update_device_map(device_map))

    def update_attn_implementation(self, config: Any) -> Any:
        """Ours and the method's."""
        return super().update_attn_implementation(self._method.update_attn_implementation(config))

    def param_element_size(self, model: Any, param_name: str, param: Any) -> float:
        """The method's."""
        return self._method.param_element_size(model, param_name, param)

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """The method's."""
        return self._method.get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, dtype: Any = None, **kwargs: Any
    ) -> None:
        config = self._method.quantization_config
        skipped = config.modules_to_not_convert
        if skipped is None:
            skipped = get_keys_to_not_convert(model)
        super()._process_model_before_weight_loading(model, checkpoint_files, dtype, **kwargs)
        config.modules_to_not_convert = [*skipped, *(layer.name for layer in self._layers)]
        self._method._process_model_before_weight_loading(model, checkpoint_files=checkpoint_files, **kwargs)
        for layer in self._layers:
            if not isinstance(model.get_submodule(layer.name), OffloadedExperts):
                raise UnsupportedModelError(
                    f"{type(self._method).__name__} has put experts of its own in place of {layer.name}; "
                    f"load the model without offloading"
                )

    def adjust_max_memory(self, max_memory: dict[int | str, int]) -> dict[int | str, int]:
        """Ours and the method's."""
        return super().adjust_max_memory(self._method.adjust_max_memory(max_memory))

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        """Locate the experts with the method's conversions, which then decode one expert whenever it is used."""
        assert self._checkpoint is not None
        # Copies, because the method's conversions (5.23) share lists of patterns with these, and change them.
        self._plain_conversions = [deepcopy(c) if isinstance(c, WeightConverter) else c for c in weight_conversions]
        conversions: list[Any] = self._method.update_weight_conversions(weight_conversions, model)
        self._sources = [as_stored(source) for source in locate(model, self._layers, self._checkpoint, conversions)]
        self._expect_enough(model)
        return conversions

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        self._method._process_model_after_weight_loading(model, **kwargs)
        # Saving reverts conversions, and the method's would quantize again what is saved unquantized.
        used = {id(conversion) for conversion in model._weight_conversions}
        model._weight_conversions = [
            c for c in self._plain_conversions if isinstance(c, WeightConverter) or id(c) in used
        ]
        self._plain_conversions = []
        super()._process_model_after_weight_loading(model, **kwargs)

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether `save_pretrained` works: only if the dense part is dequantized, which gives a plain model to save."""
        if not self._opens_dense:
            logger.warning(
                "the dense part of this model is quantized, and its experts would be saved as they are opened; "
                "load it with `dequantize` in the checkpoint's quantization_config to save a plain model"
            )
        return self._opens_dense

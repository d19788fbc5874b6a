"""A model that runs with one decoder layer's weights in memory, and with a part of its vocabulary.

The class's own forward does the work. Feed-forward blocks and experts are computed by functions that the caller passes
in, so that their tensors, too, can be read piece by piece.
"""

# B texts, T tokens in each, V entries of the vocabulary that are used

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from transformers_moe_offload.builder.sources.model_class import fill_buffers, put
from transformers_moe_offload.hf.upstream import tied_weights
from transformers_moe_offload.system.free_memory import trim

Forward = Callable[..., Tensor]


class StreamedModel:
    """A causal language model in float32; `logits` runs it."""

    def __init__(
        self,
        config: PreTrainedConfig,
        vocabulary_size: int,
        read: Callable[[str], Tensor],
        replaced: Mapping[str, Callable[[nn.Module], Forward]],
    ) -> None:
        """`read` gives a tensor by its name in memory, embeddings with `vocabulary_size` rows.

        `replaced` has, by path of a module, a function that makes the module's new forward from the module; the tensors
        of such modules are not read.
        """
        self._read = read
        self._replaced = tuple(f"{path}." for path in replaced)
        self._model = _without_weights(config, vocabulary_size)
        self._fill("", self._model, lambda name: not name.startswith("model.layers."))
        for index, layer in enumerate(self._model.model.layers):
            layer.forward = self._filled_while(layer, f"model.layers.{index}.", layer.forward)
        for path, forward in replaced.items():
            module = self._model.get_submodule(path)
            module.forward = forward(module)

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T) int64 below V -> (B, T, V) float32."""
        logits: Tensor = self._model(input_ids=tokens, use_cache=False).logits
        return logits

    def _filled_while(self, layer: nn.Module, prefix: str, own: Forward) -> Forward:
        """A layer's forward that reads the layer's weights first and drops them afterwards."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            filled = self._fill(prefix, layer)
            answer = own(*args, **kwargs)
            for name in filled:
                put(layer, name, layer.state_dict()[name].to("meta"))
            trim()
            return answer

        return forward

    def _fill(self, prefix: str, module: nn.Module, wanted: Callable[[str], bool] = lambda _: True) -> list[str]:
        """Read the tensors that have no values yet; returns their names."""
        tied = tied_weights(self._model)
        filled = []
        for name, tensor in [*module.named_parameters(remove_duplicate=False), *module.named_buffers()]:
            full = prefix + name
            if tensor.device.type == "meta" and wanted(full) and not full.startswith(self._replaced):
                put(module, name, self._read(tied.get(full, full)).float())
                filled.append(name)
        return filled


def _without_weights(config: PreTrainedConfig, vocabulary_size: int) -> Any:
    """The model on the meta device, except for buffers that no checkpoint has (rotary frequencies)."""
    config = deepcopy(config)
    config.vocab_size = vocabulary_size
    config.pad_token_id = config.bos_token_id = config.eos_token_id = None
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation="eager")
    fill_buffers(model, stored=model.state_dict().keys())
    return model.eval()

"""Write a made model as GGUF, for llama.cpp: the same bfloat16 weights, bytes unchanged, experts stacked.

Needs `gguf` from PyPI. It stands alone, without torch and this package, so that it can run in llama.cpp's environment.
Names and metadata as in llama.cpp's `conversion/qwen.py` for Qwen3MoE.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np


def write_gguf(folder: str, path: str) -> dict[str, int]:
    """Write the file if it is not there; returns its size."""
    target = Path(path)
    if not target.exists():
        unfinished = target.with_suffix(".unfinished")
        _write(Path(folder), unfinished)
        unfinished.rename(target)
    return {"nbytes": target.stat().st_size}


def _write(folder: Path, path: Path) -> None:
    import gguf  # not among what the rest of the benchmarks needs

    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, "qwen3moe", use_temp_file=False)
    _add_metadata(writer, config, gguf)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, config["num_hidden_layers"])
    tensors = _tensors(folder)
    layers = range(config["num_hidden_layers"])
    for name in sorted(tensors):
        if ".experts." not in name:
            tensor = tensors[name]
            # What is not a matrix, and the router, llama.cpp wants in float32.
            is_float32 = tensor.ndim < 2 or name.endswith("mlp.gate.weight")
            _add(writer, gguf, names.get_name(name, try_suffixes=(".weight",)), tensor, is_float32=is_float32)
    for layer in layers:
        for part in ("gate_proj", "up_proj", "down_proj"):
            prefix = f"model.layers.{layer}.mlp.experts"
            count = config.get("num_experts") or config["num_local_experts"]
            stack = np.stack([tensors[f"{prefix}.{expert}.{part}.weight"] for expert in range(count)])
            _add(writer, gguf, f"{names.get_name(f'{prefix}.{part}')}.weight", stack)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_metadata(writer: Any, config: dict[str, Any], gguf: Any) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")
    writer.add_vocab_size(config["vocab_size"])


def _tensors(folder: Path) -> dict[str, np.ndarray]:
    """Every tensor as its bfloat16 bits, (...) uint16, in the mapped files."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        raw = np.memmap(file, dtype=np.uint8, mode="r")
        start = 8 + int.from_bytes(raw[:8].tobytes(), "little")
        for name, entry in json.loads(raw[8:start].tobytes()).items():
            if name != "__metadata__":
                assert entry["dtype"] == "BF16", f"{name} is {entry['dtype']}; made models are BF16"
                begin, end = entry["data_offsets"]
                found[name] = raw[start + begin : start + end].view(np.uint16).reshape(entry["shape"])
    return found


def _add(writer: Any, gguf: Any, name: str, tensor: np.ndarray, *, is_float32: bool = False) -> None:
    if is_float32:
        writer.add_tensor(name, (tensor.astype(np.uint32) << 16).view(np.float32))
    else:
        raw = tensor.view(np.uint8)
        writer.add_tensor(name, raw, raw_shape=raw.shape, raw_dtype=gguf.GGMLQuantizationType.BF16)

"""Write a Mixtral in the layout of mixtral-offloading, and read what is written, each on its own.

A writer and a reader that share nothing but the description of the layout: file and key names as its `build_model.py`
looks them up, arithmetic and order of codes as hqq's with axis 0.
"""

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

MODULE = "model.layers.{}.block_sparse_moe.experts.{}"
IN_A_WORD = {4: 2, 3: 10, 2: 4}


def write(
    model, folder: Path, experts=(2, 16), attention=(4, 16), coded_meta: bool = False, is_interleaved: bool = False
) -> None:
    """Write the model with experts and attention in (bits, group size).

    `coded_meta` puts scales and zeros in 8 bits. `is_interleaved` orders codes as the running model has them.
    """
    weight_map, trunk = {}, {}

    def quantized(name, weight, nbits, group_size):
        return {f"{name}.{key}": t for key, t in matrix(weight, nbits, group_size, coded_meta, is_interleaved).items()}

    for name, tensor in model.state_dict().items():
        layer, stored = name.split(".")[2:3], name.replace(".mlp.", ".block_sparse_moe.")
        if name.endswith("gate_up_proj"):
            down = model.get_parameter(name.replace("gate_up", "down"))
            for expert, (gate_up, down_proj) in enumerate(zip(tensor, down, strict=True)):
                w1, w3 = gate_up.chunk(2)
                tensors = {}
                for key, weight in (("w1", w1), ("w2", down_proj), ("w3", w3)):
                    tensors |= quantized(key, weight.detach(), *experts)
                file = f"expert_{layer[0]}_{expert}.safetensors"
                save_file(tensors, folder / file)
                weight_map |= {f"{MODULE.format(layer[0], expert)}.{key}": file for key in tensors}
        elif "self_attn" in name and name.endswith(".weight"):
            trunk |= quantized(stored.removesuffix(".weight"), tensor, *attention)
        elif not name.endswith("down_proj"):
            trunk[stored] = tensor.half()
    save_file(trunk, folder / "trunk.safetensors")
    weight_map |= dict.fromkeys(trunk, "trunk.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    model.config.save_pretrained(folder)


def matrix(weight: torch.Tensor, nbits: int, group_size: int, coded_meta: bool, is_interleaved: bool) -> dict:
    """The arrays of one matrix (N, K)."""
    groups = weight.float().reshape(group_size, -1)
    low, high = groups.amin(0, keepdim=True), groups.amax(0, keepdim=True)
    scale = (high - low) / (2**nbits - 1)
    zero = -low / scale
    codes = (groups / scale + zero).round().clamp(0, 2**nbits - 1).int()
    if is_interleaved:
        codes = codes.reshape(weight.shape)
    arrays = {"W_q": _in_words(codes, nbits, is_interleaved)}
    if not coded_meta:
        return arrays | {"meta.scale": scale.half(), "meta.zero": zero.half()}
    for name, values in (("scale", scale.reshape(16, -1)), ("zero", zero.reshape(1, -1))):
        low = values.amin(0, keepdim=True) if name == "scale" else values.min()
        high = values.amax(0, keepdim=True) if name == "scale" else values.max()
        step = (high - low).clamp(min=1e-6) / 255
        arrays[f"meta.{name}_q"] = ((values - low) / step).round().clamp(0, 255).to(torch.uint8)
        arrays[f"meta.meta_{name}.scale"], arrays[f"meta.meta_{name}.zero"] = step, -low / step
    return arrays


def _in_words(codes: torch.Tensor, nbits: int, is_interleaved: bool) -> torch.Tensor:
    in_a_word = IN_A_WORD[nbits]
    missing = -len(codes) % in_a_word
    codes = torch.cat([codes, codes.new_zeros(missing, codes.shape[1])])
    fields = codes.unflatten(0, (-1, in_a_word)).unbind(1) if is_interleaved else codes.chunk(in_a_word)
    words = sum(field << nbits * (in_a_word - 1 - place) for place, field in enumerate(fields))
    return words.int() if nbits == 3 else words.to(torch.uint8)


def read(file: Path, name: str, shape: tuple[int, int], nbits: int, group_size: int, rounds_meta: bool) -> torch.Tensor:
    """A matrix of the layout, float16: weight by weight, from the place where its code must be.

    `rounds_meta` rounds scales and zeros to float16 before they are used.
    """
    arrays = {key: value.numpy() for key, value in load_file(file).items() if key.startswith(f"{name}.")}
    words, in_a_word = arrays[f"{name}.W_q"], IN_A_WORD[nbits]
    place = np.arange(shape[0] * shape[1])
    width = words.shape[1]
    row, col = place // width, place % width
    if width == shape[1]:
        word, field = row // in_a_word, row % in_a_word
    else:
        word, field = row % len(words), row // len(words)
    code = words[word, col] >> (nbits * (in_a_word - 1 - field)) & (2**nbits - 1)
    group = place % (len(place) // group_size)
    scale, zero = (_meta(arrays, name, kind)[group] for kind in ("scale", "zero"))
    if rounds_meta:
        scale, zero = (values.astype(np.float16).astype(np.float32) for values in (scale, zero))
    return torch.from_numpy(((code.astype(np.float32) - zero) * scale).astype(np.float16).reshape(shape))


def _meta(arrays, name: str, kind: str) -> np.ndarray:
    """Scales or zeros, float32."""
    if f"{name}.meta.{kind}" in arrays:
        return arrays[f"{name}.meta.{kind}"].reshape(-1).astype(np.float32)
    zero, scale = (arrays[f"{name}.meta.meta_{kind}.{part}"] for part in ("zero", "scale"))
    return ((arrays[f"{name}.meta.{kind}_q"].astype(np.float32) - zero) * scale).reshape(-1)

"""Make checkpoints as other quantization methods store them, with arithmetic of our own."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import FineGrainedFP8Config, Mxfp4Config

BLOCK = 16
FP4_VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
_NOT_QUANTIZED = ("embed", "head", "gate.weight", "norm", "router")


def as_fp8(folder: Path, scales: str = "float32", block: tuple[int, int] = (BLOCK, BLOCK), **config) -> None:
    """Quantize the matrices of a checkpoint to FP8, in blocks that share a scale, but embeddings, head and routers.

    `scales` are "float32", "uint8" (exponents) or "float8_e8m0fnu".
    """

    def stored(name, tensor):
        rows, cols = tensor.shape[-2:] if tensor.dim() > 1 else (1, 1)
        is_kept = any(part in name for part in _NOT_QUANTIZED) or not name.endswith(".weight")
        if tensor.dim() != 2 or is_kept or rows % block[0] or cols % block[1]:
            return {name: tensor}
        codes, scale = fp8(tensor, block, is_power_of_two=scales != "float32")
        if scales == "uint8":
            scale = (scale.log2() + 127).to(torch.uint8)
        return {name: codes, f"{name}_scale_inv": scale.to(getattr(torch, scales))}

    quant = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": list(block)}
    _rewrite(folder, stored, quant | config)


def as_fp4_experts(folder: Path) -> None:
    """Quantize the matrices of experts to FP4, two in a byte, with exponents as scales, as DeepSeek-V4 has them."""

    def stored(name, tensor):
        if ".experts." not in name or tensor.dim() != 2:
            return {name: tensor}
        blocks, scale = mxfp4(tensor)
        return {name: blocks.flatten(-2).view(torch.int8), f"{name}_scale_inv": scale}

    _rewrite(folder, stored, {"quant_method": "fp8", "weight_block_size": [1, 32], "expert_dtype": "fp4"})


def as_mxfp4(folder: Path) -> None:
    """Quantize the experts of a GPT-OSS checkpoint to MXFP4."""

    def stored(name, tensor):
        if not name.endswith(("gate_up_proj", "down_proj")):
            return {name: tensor}
        blocks, scale = mxfp4(tensor.transpose(1, 2))
        return {f"{name}_blocks": blocks, f"{name}_scales": scale}

    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    _rewrite(folder, stored, {"quant_method": "mxfp4", "modules_to_not_convert": skipped})


def fp8(weight: torch.Tensor, block: tuple[int, int], is_power_of_two: bool = False):
    """weight (N, K) -> FP8 of the same shape, scales (N / block, K / block) float32."""
    tiles = weight.float().unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0]))
    scale = tiles.abs().amax((1, 3)) / 448
    if is_power_of_two:
        scale = scale.log2().ceil().exp2()
    codes = (tiles / scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)
    return codes.to(torch.float8_e4m3fn), scale


def opened_fp8(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """What FP8 codes (N, K) and their scales stand for, float64, worked out weight by weight."""
    rows, cols = (size // blocks for size, blocks in zip(codes.shape, scale.shape, strict=True))
    return codes.double() * scale.double().repeat_interleave(rows, 0).repeat_interleave(cols, 1)


def mxfp4(weight: torch.Tensor):
    """weight (..., K) -> blocks (..., K / 32, 16) uint8, lower half first, exponents (..., K / 32) uint8."""
    groups = weight.float().unflatten(-1, (-1, 32))
    exponent = (groups.abs().amax(-1) / 6).log2().ceil()
    scaled = groups / exponent.exp2().unsqueeze(-1)
    codes = (scaled.abs().unsqueeze(-1) - FP4_VALUES).abs().argmin(-1) + 8 * (scaled < 0)
    return (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8), (exponent + 127).to(torch.uint8)


def opened_mxfp4(blocks: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """What MXFP4 blocks (..., G, 16) stand for: (..., 32 * G) float64."""
    codes = torch.stack([blocks & 15, blocks >> 4], -1).flatten(-2).long()
    values = torch.cat([FP4_VALUES, -FP4_VALUES]).double()[codes]
    return (values * (exponents.double() - 127).exp2().unsqueeze(-1)).flatten(-2)


def _rewrite(folder: Path, stored, quantization_config) -> None:
    for file in folder.glob("*.safetensors"):
        tensors = {}
        for name, tensor in load_file(file).items():
            tensors |= {key: value.contiguous() for key, value in stored(name, tensor).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization_config}))


FP8, MXFP4 = FineGrainedFP8Config(dequantize=True), Mxfp4Config(dequantize=True)
KINDS = {
    "qwen3_moe": (as_fp8, FP8),
    "deepseek_v3": (as_fp8, FP8),
    "mixtral": (as_fp8, FP8),
    "deepseek_v4": (as_fp4_experts, FP8),
    "gpt_oss": (as_mxfp4, MXFP4),
}
"""How an architecture's checkpoints are made, and what has Transformers open them."""

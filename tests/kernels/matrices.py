"""Packed matrices to test with."""

# N rows, K columns, g group size, G = K / g groups in a row

import torch

from transformers_moe_offload.kernels.packed import META_BLOCK, PackedMatrix, Packing, pack

NBITS = (8, 4, 3, 2, 1)
GROUP_SIZES = (16, 32, 64, 128)
META_NBITS = (16, 8)


def random_codes(packing, seed=0):
    codes = torch.randint(0, 2**packing.nbits, (packing.rows, packing.cols), generator=_generator(seed))
    return codes.to(torch.uint8)


def random_matrix(rows, cols, nbits=4, group_size=64, meta_nbits=16, seed=0):
    """Codes that fill their bits, scales around 0.01, zeros among the codes."""
    packing, generator = Packing(rows, cols, nbits, group_size, meta_nbits), _generator(seed)
    shape = (rows, packing.groups)
    parts = pack(random_codes(packing, seed), packing)
    if meta_nbits == 16:
        parts["scale"] = (torch.rand(shape, generator=generator) * 0.02 + 0.001).half()
        parts["zero"] = (torch.rand(shape, generator=generator) * (2**nbits - 1)).half()
    else:
        blocks = (-(-rows * packing.groups // META_BLOCK), 2)
        for name, largest in (("scale", 1e-4), ("zero", 2**nbits / 256)):
            parts[name] = torch.randint(0, 256, shape, generator=generator).to(torch.uint8)
            parts[f"{name}_range"] = (torch.rand(blocks, generator=generator) * largest).half()
    return PackedMatrix(packing, parts)


def with_meta(matrix, scale, zero):
    """The same codes with other scales and zeros (N, G), in float16."""
    return PackedMatrix(matrix.packing, dict(matrix.parts) | {"scale": scale.half(), "zero": zero.half()})


def random_rows(count, cols, dtype=torch.float32, seed=1):
    return torch.randn((count, cols), generator=_generator(seed)).to(dtype)


def weights(matrix):
    """The weights by the definition in packed.py, (N, K) float64, code by code."""
    packing = matrix.packing
    groups = torch.arange(packing.cols) // packing.group_size
    return (_codes(matrix) - _meta(matrix, "zero")[:, groups]) * _meta(matrix, "scale")[:, groups]


def _codes(matrix):
    packing, parts = matrix.packing, matrix.parts
    if packing.nbits == 3:
        return _plane(parts["codes"], 2, packing.rows) + 4 * _plane(parts["high"], 1, packing.rows)
    return _plane(parts["codes"], packing.nbits, packing.rows)


def _plane(plane, nbits, rows):
    found = [plane[n % len(plane)].int() >> (8 - nbits * (n // len(plane) + 1)) for n in range(rows)]
    return (torch.stack(found) & (2**nbits - 1)).double()


def _meta(matrix, name):
    stored = matrix.parts[name].double()
    if matrix.packing.meta_nbits == 16:
        return stored
    block = torch.arange(stored.numel()).view(stored.shape) // META_BLOCK
    minimum, step = matrix.parts[f"{name}_range"].double().unbind(1)
    return minimum[block] + step[block] * stored


def _generator(seed):
    return torch.Generator().manual_seed(seed)

"""Products on GPUs, in Triton: with one packed matrix, and with the matrices of all experts that a layer routes to.

Checked in Triton's interpreter, and compiled for compute capability 8.0 and 9.0; not yet run on a GPU.
"""

from transformers_moe_offload.kernels.triton import grouped
from transformers_moe_offload.kernels.triton.grouped import linear

__all__ = ["grouped", "linear"]

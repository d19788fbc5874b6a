"""Products with packed matrices on GPUs, in Triton: of one matrix, and of all the experts that a layer routes to.

Checked in Triton's interpreter, and compiled for compute capability 8.0 and 9.0; not yet run on a GPU.
"""

from transformers_moe_offload.kernels.triton.launch import grouped_linear, linear

__all__ = ["grouped_linear", "linear"]

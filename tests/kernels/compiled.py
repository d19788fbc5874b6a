"""Compile Triton kernels for a GPU that need not be there."""

import re

TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
ADDRESSES = {"offsets": "*i32", "addresses": "*i64"}
ANY_NUMBER = ("num_experts", "end")


def assembly(kernel, packing, sizes, dtype, capability):
    """The kernel's instructions, and the bytes of shared memory it takes, for arguments as torch aligns them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from transformers_moe_offload.kernels.triton.launch import PARTS

    options = {"num_warps": sizes.get("num_warps", 4)}
    constants = {name: size for name, size in sizes.items() if name not in options}
    rows = "*" + TYPES[dtype]
    meta = "*fp16" if packing.meta_nbits == 16 else "*u8"
    if "addresses" in kernel.arg_names:
        parts = dict.fromkeys(PARTS, "i64")
    else:
        parts = dict(zip(PARTS, ("*u8", "*u8", meta, meta, "*fp16", "*fp16"), strict=True))
    types = {"rows": rows, "out": rows} | ADDRESSES | parts | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        kernel,
        {name: types.get(name, "i32") for name in kernel.arg_names},
        constexprs=constants,
        attrs={
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(kernel.arg_names)
            if name not in constants and name not in ANY_NUMBER
        },
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return compiled.asm["ptx"], compiled.metadata.shared


def bytes_loaded_at_once(ptx):
    """The most that a thread loads with one instruction."""
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)
    return max(int(count or 1) * int(bits) // 8 for count, bits in loads)

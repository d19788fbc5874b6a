"""Compile Triton kernels for a GPU that need not be there."""

import re

TYPES = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}
POINTERS = {
    "chosen": "*i64",
    "order": "*i32",
    "offsets": "*i32",
    "addresses": "*i64",
    "codes": "*u8",
    "high": "*u8",
    "scale_range": "*fp16",
    "zero_range": "*fp16",
}
PLACES = ("weight", "high", "scale", "zero", "scale_range", "zero_range", "bias")
ANY_NUMBER = ("num_experts", "end", "choices", "num_pairs")


def assembly(kernel, dtype, capability, constants, odd=()):
    """The kernel's instructions, and the bytes of shared memory it takes, for arguments as torch aligns them.

    Numbers are multiples of 16 but for those that are `odd`.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    options = {"num_warps": constants.get("num_warps", 4)}
    constants = {name: value for name, value in constants.items() if name not in options}
    types = dict.fromkeys(kernel.arg_names, "i32") | POINTERS
    types |= dict.fromkeys(("rows", "out", "weights"), "*" + TYPES[dtype])
    types |= dict.fromkeys(("scale", "zero"), "*fp16" if constants.get("meta_nbits") == 16 else "*u8")
    if "addresses" in kernel.arg_names:
        types |= dict.fromkeys(PLACES, "i64")
    types |= dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        kernel,
        {name: types[name] for name in kernel.arg_names},
        constexprs=constants,
        attrs={
            (place,): [["tt.divisibility", 16]]
            for place, name in enumerate(kernel.arg_names)
            if name not in constants and name not in (*ANY_NUMBER, *odd)
        },
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    return compiled.asm["ptx"], compiled.metadata.shared


def bytes_loaded_at_once(ptx):
    """The most that a thread loads with one instruction."""
    loads = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", ptx)
    return max(int(count or 1) * int(bits) // 8 for count, bits in loads)

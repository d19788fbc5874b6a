"""The compiled kernels, which the package can do without. Everything else about it is in pyproject.toml."""

import os
from pathlib import Path

from setuptools import Extension, setup

SOURCES = Path("src/transformers_moe_offload/kernels/csrc")

# A library that knows nothing of Python, so one build serves every version. -ffp-contract: sums must be what they say;
# -g0: Python's own flags ask for debug information, eight times the size of the code.
kernels = Extension(
    "transformers_moe_offload.kernels._cpu",
    sources=sorted(map(str, SOURCES.glob("*.c"))),
    depends=sorted(map(str, SOURCES.glob("*.h"))),
    extra_compile_args=["-std=c11", "-O3", "-g0", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden"],
    libraries=[] if os.name == "nt" else ["m"],
    py_limited_api=True,
    optional=True,
)

setup(ext_modules=[kernels], options={"bdist_wheel": {"py_limited_api": "cp311"}})

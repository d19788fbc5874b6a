"""Triton's interpreter, mended."""

import numpy as np


def mend():
    """What Triton 3.7 to 3.9 need. Before a kernel runs; once in a process."""
    _let_it_multiply_bfloat16()
    _let_it_replace_the_language_once()


def _let_it_multiply_bfloat16():
    """It keeps bfloat16 in 16-bit integers, and `tl.dot` multiplies those."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def widened(operand):
        if operand.dtype.scalar != tl.bfloat16:
            return operand
        return TensorHandle((operand.data.view(np.uint16).astype(np.uint32) << 16).view(np.float32), tl.float32)

    def mended(self, a, b, *others):
        return dot(self, widened(a), widened(b), *others)

    InterpreterBuilder.create_dot = mended


def _let_it_replace_the_language_once():
    """At every call of a function of a kernel it looks through all of `triton.language` for what it replaces by its
    own, which takes half of its time; and when a kernel ends in one thread, it puts back what another one still needs.

    What it has replaced for a module's functions stays: nothing is compiled in this process.
    """
    from triton.runtime import interpreter

    replace, modules = interpreter._patch_lang, set()

    def mended(fn):
        if fn.__module__ not in modules:
            replace(fn)
            modules.add(fn.__module__)
        return interpreter._LangPatchScope()  # has nothing to put back

    interpreter._patch_lang = mended

"""A kernel that reads experts by address."""

import torch
import triton
import triton.language as tl


@triton.jit
def copy_records(addresses, out, num_words, block: tl.constexpr):
    """Grid (E,). addresses (E,) int64, out (E, words) int32."""
    expert = tl.program_id(0)
    record = tl.load(addresses + expert).to(tl.pointer_type(tl.int32))
    for first in range(0, num_words, block):
        word = first + tl.arange(0, block)
        is_word = word < num_words
        tl.store(out + expert * num_words + word, tl.load(record + word, mask=is_word, other=0), mask=is_word)


def read(addresses, num_words):
    """The records of all experts of a layer: addresses (E,) -> (E, words) int32."""
    out = torch.empty((len(addresses), num_words), dtype=torch.int32, device=addresses.device)
    copy_records[(len(addresses),)](addresses, out, num_words, block=1024)
    return out

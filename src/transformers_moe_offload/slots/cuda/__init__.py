"""How experts get to a GPU: by copies, or by zero-copy reads of page-locked host memory."""

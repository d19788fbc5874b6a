"""Load a model with offloaded experts: the hooks that `from_pretrained` calls, and where experts are in the files."""

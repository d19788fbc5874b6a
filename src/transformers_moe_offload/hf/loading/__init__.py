"""From `from_pretrained` to a model whose experts are offloaded: what Transformers calls, and what the files hold."""

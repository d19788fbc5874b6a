"""Make mixture-of-experts checkpoints from dense ones. Knows nothing of caches."""

"""Read checkpoints in the layouts of other projects, to write prebuilt checkpoints from them."""

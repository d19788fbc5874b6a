"""Load checkpoints that another method has quantized; experts stay in its encoding."""

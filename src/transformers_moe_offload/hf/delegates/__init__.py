"""Checkpoints that another method has quantized, loaded together with that method's own quantizer."""

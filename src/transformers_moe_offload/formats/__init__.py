"""The arrays that store one expert, dense or quantized."""

"""What one expert is made of when it is stored: dense, or quantized."""

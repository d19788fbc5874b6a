"""Text for calibration, and the tokenizer that reads it."""

"""The host computes some of the experts that an accelerator lacks, while others are fetched."""

"""Download checkpoints from the Hub and upload them to it."""

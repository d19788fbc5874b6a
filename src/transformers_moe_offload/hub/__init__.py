"""Checkpoints on the Hub: from there to here, and from here to there."""

"""Measure a model on this machine, and hold its speed against the limit that the machine sets."""

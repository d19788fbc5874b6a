"""Decoding on the device: which forwards are, and whole steps that are captured and replayed."""

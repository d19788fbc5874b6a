"""Decoding on the device: which layers and forwards can, and the engines that they use."""

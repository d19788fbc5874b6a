"""Decoding on the device: a table of addresses that kernels read experts through, and the cache that follows behind.

The host learns what was routed where when it is over, and moves experts between two forwards. What kernels read is the
same bytes, wherever they are.
"""

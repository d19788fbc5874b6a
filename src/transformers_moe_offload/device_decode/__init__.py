"""Decoding on a device: kernels read experts by address, in slots or in page-locked RAM, and the cache follows behind.

The host learns what was routed where when it is over, and moves experts between two forwards. What kernels read is the
same bytes, wherever they are.
"""

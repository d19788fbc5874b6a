"""Decoding on a device: kernels read experts by address, in slots or in page-locked RAM, and the cache follows behind.

The host learns the routing of a forward when it is over, and moves experts between two forwards. Kernels read the same
bytes in both places.
"""

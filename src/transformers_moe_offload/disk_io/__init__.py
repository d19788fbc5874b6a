"""Bytes from disk to memory: open files, the page cache, reads past it, and the threads that wait for them."""

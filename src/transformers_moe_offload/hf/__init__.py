"""Integration with Transformers; no layer below imports it at run time."""

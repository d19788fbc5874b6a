"""The only code that knows Transformers at run time."""

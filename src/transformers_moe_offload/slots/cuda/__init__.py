"""The way of experts to a GPU."""

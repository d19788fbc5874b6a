"""One sparse layer's arithmetic."""

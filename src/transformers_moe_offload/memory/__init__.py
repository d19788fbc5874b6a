"""Where bytes are, and how they move."""

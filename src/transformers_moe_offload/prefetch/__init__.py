"""Which experts come next, and loading them before they are asked for."""

"""The routers of a model: where they are, what they compute, and how many experts a token takes."""

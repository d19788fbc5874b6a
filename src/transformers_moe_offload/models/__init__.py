"""Model types of our own: they need Transformers and nothing else of this package."""

"""Model types of our own; they import Transformers and nothing else of this package."""

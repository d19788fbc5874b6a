"""Measurements of the package, in folders by what is measured; README.md has the commands.

A package, so that `python -m benchmarks.decode.overhead` finds what the folders share, in this process and in those
that it starts.
"""

from pathlib import Path

CHECKOUT = Path(__file__).parents[1]

MADE = CHECKOUT / "benchmarks" / "made"
"""Where made models are kept; not in git."""

RESULTS = CHECKOUT / "benchmarks" / "results"

TINY_MOE = CHECKOUT / "examples" / "models" / "tiny-moe"
"""The small trained model."""

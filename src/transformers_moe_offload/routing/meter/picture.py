"""Draw speed against loss, a point for each strength. Needs matplotlib (extras `plots` and `research`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers_moe_offload.errors import ConfigError
from transformers_moe_offload.routing.meter.figures import Interval
from transformers_moe_offload.routing.meter.measurement import Tradeoff
from transformers_moe_offload.tracing.report import finish, make_figure

KINDS = (".svg", ".png")


def expect_picture(path: Path) -> None:
    """Raise, before anything is measured, if there is no matplotlib, or if the name has none of the `KINDS`."""
    if path.suffix.lower() not in KINDS:
        raise ConfigError(f"picture={str(path)!r} is neither .svg nor .png; name it so")
    make_figure()


def draw(tradeoff: Tradeoff) -> Any:
    """A figure: tokens per second on the left and misses on the right, over the change in perplexity."""
    figure = make_figure()
    left, right = figure.subplots(1, 2)
    for axes, name, scale in ((left, "tokens_per_s", 1.0), (right, "misses", 100.0)):
        across = [_scaled(one.loss, 100) for one in tradeoff.figures]
        up = [_scaled(getattr(one, name), scale) for one in tradeoff.figures]
        axes.errorbar(
            [one.value for one in across],
            [one.value for one in up],
            xerr=_around(across),
            yerr=_around(up),
            fmt="o-",
            ms=4,
            lw=1.2,
            elinewidth=0.8,
        )
        for one, x, y in zip(tradeoff.figures, across, up, strict=True):
            is_best = one.strength == tradeoff.recommended.strength
            style = {"fontweight": "bold" if is_best else "normal", "fontsize": 9}
            axes.annotate(f"{one.strength:g}", (x.value, y.value), (5, 5), textcoords="offset points", **style)
        axes.axvline(100 * tradeoff.max_loss, color="0.6", ls="--", lw=1)
        axes.set_xlabel("perplexity, % above strength 0")
        axes.set_ylim(0, None)
    left.set(title="Speed", ylabel="tokens/s")
    right.set(title="Experts that have to be loaded", ylabel="% of those at strength 0")
    finish(left, right)
    return figure


def save(figure: Any, path: Path) -> None:
    """Write a figure in the format that the file's name says."""
    figure.savefig(path, dpi=120, format=path.suffix.lower().removeprefix("."))


def _scaled(found: Interval, factor: float) -> Interval:
    return Interval(*(factor * one for one in found))


def _around(found: list[Interval]) -> list[list[float]]:
    """Distances to the ends of intervals, as matplotlib takes them."""
    below = [max(0.0, one.value - one.low) for one in found]
    return [below, [max(0.0, one.high - one.value) for one in found]]

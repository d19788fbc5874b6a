"""Draw the pictures of `docs/architecture.md`: `python docs/pictures/draw.py` writes them beside this file.

The layers are those of the contract in `pyproject.toml`, in the words of the tree in `docs/architecture.md`. The decode
step is `decode-step.txt`: a line for each module, indented under the module that calls it. Each picture brings its own
background and colours for light and dark pages, and uses the fonts of the system.
"""

import re
import textwrap
import tomllib
from pathlib import Path
from typing import NamedTuple
from xml.sax.saxutils import escape

HERE = Path(__file__).parent
ROOT = HERE.parents[1]

WIDTH, MARGIN, GAP, PAD = 840, 24, 8, 14  # all lengths in px
LINE = 18
"""From one line of a phrase to the next."""
LETTER = 7.5
"""The width of a letter of a phrase, on average in DejaVu Sans, a wide font: what is wrapped by it fits in any."""
INDENT, STEP = 30, 48
"""Of a decode step's modules: from a caller to what it calls, and from one module to the next."""
PHRASE_AT = 396
GUTTER = 38
"""Left of the layers, for the arrow."""

STYLE = """
  text { font: 13px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", Arial, sans-serif; fill: #4d596b }
  .name { font: 600 14px ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; fill: #182030 }
  .page { fill: #ffffff; stroke: #d8dfe9 }
  .box { fill: #f4f6f9; stroke: #d8dfe9 }
  .knows { fill: #e9edfb; stroke: #b9c4ee }
  .line { fill: none; stroke: #9aa6b8; stroke-width: 1.5 }
  .tip { fill: #9aa6b8 }
  .dot { fill: #e07a12 }
  @media (prefers-color-scheme: dark) {
    text { fill: #b3bdcc }
    .name { fill: #eef2f8 }
    .page { fill: #1a1f29; stroke: #394253 }
    .box { fill: #252c38; stroke: #3b4556 }
    .knows { fill: #2b3561; stroke: #4c5aa0 }
    .line { stroke: #6d7a8f }
    .tip { fill: #6d7a8f }
    .dot { fill: #ffa94d }
  }
"""


class Step(NamedTuple):
    """A module that a decode step enters."""

    module: str
    phrase: str
    caller: str | None


def steps() -> list[Step]:
    """The decode step of `decode-step.txt`."""
    found: list[Step] = []
    open_calls: list[str] = []
    for line in (HERE / "decode-step.txt").read_text("utf-8").splitlines():
        module, _, phrase = line.strip().partition(": ")
        del open_calls[(len(line) - len(line.lstrip())) // 2 :]
        found.append(Step(module, phrase, open_calls[-1] if open_calls else None))
        open_calls.append(module)
    return found


def contracts() -> list[dict]:
    """The contracts of import-linter; the first one is the layers."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]


def layers() -> list[list[str]]:
    """The layers from the top, each the names of its folders and files."""
    return [layer.replace("transformers_moe_offload.", "").split(" | ") for layer in contracts()[0]["layers"]]


def that_know_transformers() -> set[str]:
    """Folders that may import Transformers: the contract about it names them."""
    named = next(match for one in contracts() if (match := re.fullmatch("Only (.+) know Transformers", one["name"])))
    return set(re.split(", | and ", named[1]))


def phrases() -> dict[str, str]:
    """What the tree in `docs/architecture.md` says of each folder and file of the package."""
    tree = (ROOT / "docs/architecture.md").read_text("utf-8").partition("## The tree")[2].partition("\n```\n")[0]
    return {name: phrase.partition(";")[0] for name, phrase in re.findall(r"^[├└]── (\w+)(?:/|\.py) +(.+)", tree, re.M)}


def text(x: float, y: float, words: str, style: str = "") -> str:
    """One line of text; y is its baseline."""
    return f'<text x="{x:g}" y="{y:g}"{style and f" {style}"}>{escape(words)}</text>'


def wrapped(words: str, width: float) -> list[str]:
    """Words in as few lines as a width needs, of about the same length."""
    letters = int(width / LETTER)
    fewest = len(textwrap.wrap(words, letters))
    return next(lines for size in range(1, letters + 1) if len(lines := textwrap.wrap(words, size)) == fewest)


def box(x: float, y: float, width: float, height: float, style: str) -> str:
    """A rectangle with round corners."""
    return f'<rect class="{style}" x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6"/>'


def picture(title: str, height: float, shapes: list[str]) -> str:
    """An SVG of these shapes on a page of its own."""
    page = f'<rect class="page" x="0.5" y="0.5" width="{WIDTH - 1}" height="{height - 1:g}" rx="10"/>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:g}" width="{WIDTH}" role="img">'
    return "\n".join([head, f"<title>{title}</title>", f"<style>{STYLE}</style>", page, *shapes, "</svg>", ""])


def draw_layers() -> str:
    """Each layer in a row of its own, above those it may import."""
    knows, said, in_step = that_know_transformers(), phrases(), {step.module.partition("/")[0] for step in steps()}
    left, y, shapes = MARGIN + GUTTER, MARGIN, []
    for layer in layers():
        width = (WIDTH - left - MARGIN - GAP * (len(layer) - 1)) / len(layer)
        is_alone = len(layer) == 1
        lines = {name: wrapped(said[name], width - 2 * PAD - (146 if is_alone else 0)) for name in layer}
        height = 36 if is_alone else 38 + LINE * max(map(len, lines.values()))
        for place, name in enumerate(layer):
            x = left + place * (width + GAP)
            shapes.append(box(x, y, width, height, "knows" if name in knows else "box"))
            shapes.append(text(x + PAD, y + 23, name, 'class="name"'))
            at = (x + PAD + 146, y + 23) if is_alone else (x + PAD, y + 45)
            shapes += [text(at[0], at[1] + LINE * number, line) for number, line in enumerate(lines[name])]
            if name in in_step:
                shapes.append(f'<circle class="dot" cx="{x + width - PAD - 4:g}" cy="{y + 18:g}" r="5"/>')
        y += height + GAP
    x, end = MARGIN + 8, y - GAP
    shapes.append(f'<path class="line" d="M{x + 14} {MARGIN}V{end - 8:g}"/>')
    shapes.append(f'<path class="tip" d="M{x + 9} {end - 9:g}h10l-5 9z"/>')
    shapes.append(text(0, 0, "imports", f'transform="translate({x + 4} {(MARGIN + end) / 2:g}) rotate(-90)"'))
    shapes += [box(left, y + 11, 16, 16, "knows"), text(left + 26, y + 24, "knows Transformers")]
    shapes.append(f'<circle class="dot" cx="{left + 198}" cy="{y + 19:g}" r="5"/>')
    shapes.append(text(left + 212, y + 24, "a decode step on a CPU passes through it"))
    return picture("The layers of the package", y + 38 + MARGIN / 2, shapes)


def draw_decode_step() -> str:
    """A tree of calls, and beside it what each module does."""
    knows, depth, row, trunk, shapes = that_know_transformers(), {None: -1}, {}, {}, []
    for number, (module, phrase, caller) in enumerate(steps()):
        depth[module], row[module] = depth[caller] + 1, MARGIN + STEP * number
        trunk[module] = row[module] + 34
        x, y = MARGIN + INDENT * depth[module], row[module]
        folder = module.partition("/")[0]
        shapes.append(box(x, y, 2 * PAD + 8.45 * len(module), 34, "knows" if folder in knows else "box"))
        shapes.append(text(x + PAD, y + 22, module, 'class="name"'))
        lines = wrapped(phrase, WIDTH - MARGIN - PHRASE_AT)
        top = y + 22 - LINE / 2 * (len(lines) - 1)
        shapes += [text(PHRASE_AT, top + LINE * place, line) for place, line in enumerate(lines)]
        if caller is not None:
            shapes.append(f'<path class="line" d="M{x - INDENT + 14} {trunk[caller]}V{y + 17}H{x - 7}"/>')
            trunk[caller] = y + 17
            shapes.append(f'<path class="tip" d="M{x - 8} {y + 12}l8 5l-8 5z"/>')
    return picture("A decode step", 2 * MARGIN + STEP * len(row) - (STEP - 34), shapes)


PICTURES = {"layers.svg": draw_layers, "decode-step.svg": draw_decode_step}

if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (HERE / name).write_text(draw(), encoding="utf-8")

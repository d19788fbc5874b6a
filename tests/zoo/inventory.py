"""Find every model directory of the installed Transformers that contains experts.

Reads the sources and imports none of them, so an architecture that upstream adds tomorrow shows up here before it is
has written a line about it. How a directory is built is `catalogue.py`'s business; this file only says that it exists
and why we believe so.

A directory may have no modeling file and be no more than a config, for which `AutoModel` takes classes of another
directory. It counts where those classes have experts: its checkpoints have a layout of their own.

A composite that reaches a Mixture-of-Experts text model through `AutoModel` defines no experts of its own and is not
listed: the plugin sees the same experts classes in it, under a longer module path.
"""

import ast
import functools
import importlib.util
import re
from dataclasses import dataclass, replace
from pathlib import Path

DECORATOR = "use_experts_implementation"
"""Marks a class whose eager forward `transformers.integrations.moe` may replace; the strongest evidence there is."""

EXPERTS_ENDING = "Experts"
BLOCK_ENDINGS = ("MoE", "Moe", "MoA")
"""How upstream ends the names of classes that hold experts, and of the blocks around them."""

MAY_HAVE_EXPERTS = re.compile(rf"expert|^class \w+(?:{'|'.join(BLOCK_ENDINGS)})\b", re.IGNORECASE | re.MULTILINE)
"""What the source of a class has to say for `_is_decorated` or `_looks_like_experts` to be true of it."""

CONTAINERS = {"ModuleList", "ModuleDict"}
WEIGHTS = {"Parameter", "Linear", "Embedding"}

NOT_TOKEN_ROUTED = {
    "doge": "product-key retrieval: rows of two nn.Embedding tables are gathered per token, no expert is ever run",
    "vitpose_backbone": "the expert is chosen by the caller's dataset_index for a whole image, not by a router",
}
"""Directories with experts that no router sends tokens to; out of scope for offloading by token."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Why a directory is in the inventory."""

    decorated: tuple[str, ...] = ()
    """Classes under `@use_experts_implementation`."""
    undecorated: tuple[str, ...] = ()
    """Classes which look like experts but lack the decorator."""
    defined_in: str | None = None
    """The directory with those classes, where this one has none of its own."""
    model_classes: tuple[str, ...] = ()
    """Of that directory, the model classes that this one's config is for."""


@functools.cache
def moe_model_dirs() -> dict[str, Evidence]:
    """Every directory below `transformers/models` with experts, in a modeling file or by way of its config, by name."""
    models = Path(importlib.util.find_spec("transformers").origin).parent / "models"
    found: dict[str, Evidence] = {}
    for directory in sorted(path for path in models.iterdir() if path.is_dir()):
        classes = [one for file in sorted(directory.glob("modeling_*.py")) for one in _classes(file)]
        decorated = tuple(one.name for one in classes if _is_decorated(one))
        undecorated = tuple(one.name for one in classes if not _is_decorated(one) and _looks_like_experts(one))
        if decorated or undecorated:
            found[directory.name] = Evidence(decorated=decorated, undecorated=undecorated)
    return dict(sorted({**found, **_configs_alone(models, found)}.items()))


def _configs_alone(models: Path, found: dict[str, Evidence]) -> dict[str, Evidence]:
    """Directories without a modeling file, whose config `AutoModel` gives to classes of a directory in `found`."""
    owners = {
        name: directory
        for directory in found
        for file in sorted((models / directory).glob("modeling_*.py"))
        for name in re.findall(r"^class (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
    }
    classes: dict[str, list[str]] = {}
    for node in ast.walk(ast.parse((models / "auto" / "modeling_auto.py").read_text(encoding="utf-8"))):
        match node:
            case ast.Tuple(elts=[ast.Constant(value=str(model_type)), ast.Constant(value=str(model_class))]):
                is_alone = (models / model_type).is_dir() and not any((models / model_type).glob("modeling_*.py"))
                if is_alone and model_class in owners:
                    classes.setdefault(model_type, []).append(model_class)
    return {
        model_type: replace(found[owner], defined_in=owner, model_classes=tuple(sorted(set(names))))
        for model_type, names in classes.items()
        for owner in [owners[names[0]]]
    }


def _classes(file: Path) -> list[ast.ClassDef]:
    """The top-level classes of a file that may be more than a model around experts, by what their sources say.

    Only those are parsed, since parsing all of every file takes seconds: a formatted file has two blank lines before
    each of them. A docstring may have some as well; then the file is parsed as a whole.
    """
    source = file.read_text(encoding="utf-8")
    if "expert" not in source.lower():
        return []
    try:
        parts = [ast.parse(part) for part in re.split(r"\n\n\n(?=\S)", source) if MAY_HAVE_EXPERTS.search(part)]
    except SyntaxError:
        parts = [ast.parse(source)]
    return [node for part in parts for node in part.body if isinstance(node, ast.ClassDef)]


def _is_decorated(one: ast.ClassDef) -> bool:
    return any(DECORATOR in ast.unparse(decorator) for decorator in one.decorator_list)


def _looks_like_experts(one: ast.ClassDef) -> bool:
    """A module named for its experts, a block that keeps their weights itself, or a holder of a list of them."""
    bases = {_last_name(base) for base in one.bases}
    if not bases & {"Module", *CONTAINERS}:
        return False
    calls = {_last_name(node.func) for node in ast.walk(one) if isinstance(node, ast.Call)}
    is_block_with_weights = one.name.endswith(BLOCK_ENDINGS) and (bases & CONTAINERS or calls & WEIGHTS)
    return one.name.endswith(EXPERTS_ENDING) or bool(is_block_with_weights) or _builds_a_container_of_experts(one)


def _builds_a_container_of_experts(one: ast.ClassDef) -> bool:
    """Whether some `self.<…expert…> = nn.ModuleList(…)` or `nn.ModuleDict(…)` stands in the class body."""
    return any(
        isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Call)
        and _last_name(node.value.func) in CONTAINERS
        and any("expert" in ast.unparse(target).lower() for target in node.targets)
        for node in ast.walk(one)
    )


def _last_name(expression: ast.expr) -> str:
    return ast.unparse(expression).rsplit(".", 1)[-1]

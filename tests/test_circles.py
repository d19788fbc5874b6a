"""No two files of the package need each other, whether for types, inside functions, or through others."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import transformers_moe_offload

SOURCES = Path(transformers_moe_offload.__file__).parent
FILES = {
    ".".join(path.relative_to(SOURCES.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in SOURCES.rglob("*.py")
}


def imported_by(path: Path) -> set[str]:
    """The modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            of_names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= of_names & FILES.keys() or {node.module}
    return found & FILES.keys()


def test_no_files_import_each_other():
    graph = {name: imported_by(path) - {name} for name, path in FILES.items()}
    assert sum(map(len, graph.values())) > 1000, "imports are not read as they are written"
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        raise AssertionError(" -> ".join(circle.args[1])) from None

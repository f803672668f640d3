"""A hash of what code of this package does, without comments, docstrings and layout."""

import ast
import functools
import hashlib
import json
from pathlib import Path
from typing import Any


@functools.cache  # a process keeps the code that it started with
def program(*files: str) -> str:
    """sha256 of these files of pipeline/ and of all files of pipeline/ that they import.

    Comments, docstrings and layout do not count, so a better comment does not change the hash.
    """
    meant = {path: _meaning(tree) for path, tree in sorted(sources(*files).items())}
    return hashlib.sha256(json.dumps(meant).encode()).hexdigest()


def sources(*files: str) -> dict[str, ast.Module]:
    """These files of pipeline/ and all of pipeline/ that they import, inside their functions too, parsed."""
    package, trees, ahead = Path(__file__).parents[1], dict[str, ast.Module](), {"__init__.py", *files}
    while ahead:
        path = ahead.pop()
        trees[path] = ast.parse((package / path).read_bytes())
        for node in ast.walk(trees[path]):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == package.name:
                module = "/".join(node.module.split(".")[1:])
                named = {f"{module}.py", *(f"{module}/{name.name}.py".lstrip("/") for name in node.names)}
                ahead |= {name for name in named if (package / name).is_file()} - trees.keys()
    return trees


def _meaning(node: Any) -> Any:
    """A syntax tree as JSON, without docstrings and empty fields, which differ between versions of Python."""
    if isinstance(node, list):
        return [_meaning(item) for item in node]
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if (
        isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and ast.get_docstring(node, clean=False) is not None
    ):
        fields["body"] = node.body[1:]
    return [type(node).__name__, {name: _meaning(value) for name, value in fields.items() if value not in (None, [])}]

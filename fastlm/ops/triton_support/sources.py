"""A digest of a kernel's code: what was recorded of a compiled kernel counts only for the code that it was made of.

Comments, docstrings and the layout of lines are not in it.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
from pathlib import Path


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@functools.cache
def of_module(name: str) -> str:
    """Of a module of kernels and of all modules of fastlm that it takes kernels from."""
    pending, texts = [name], {}
    while pending:
        module = pending.pop()
        tree = _tree(module)
        texts[module] = ast.unparse(tree)
        pending += [
            node.module
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            and node.module is not None
            and node.module.startswith("fastlm.")
            and node.module not in texts
        ]
    return digest("\n".join(texts[module] for module in sorted(texts)))


def _tree(module: str) -> ast.Module:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    tree = ast.parse(Path(spec.origin).read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return tree

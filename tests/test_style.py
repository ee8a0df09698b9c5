"""What the source holds to: files of a readable length, and documented arguments."""

import ast
import re
from pathlib import Path

import pytest

import expunge

ROOT = Path(expunge.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LONGEST = 400
"""Lines of a file."""
DOCUMENTED = 0.95
"""The share of public functions with three or more arguments whose docstring explains each of them."""


def arguments(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The names of a function's arguments, but for the object that it is a method of."""
    given = function.args
    several = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    return [one.arg for one in several if one and one.arg not in ("self", "cls")]


def functions(tree: ast.AST, class_doc: str = "", inherits: bool = False):
    """Public functions with the docstring that explains them: a constructor's may be its class's.

    What a class with a base leaves unexplained, its base explains.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            yield from functions(node, ast.get_docstring(node) or "", bool(node.bases))
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            doc = ast.get_docstring(node) or ""
            if node.name == "__init__" and "Args:" in class_doc:
                doc = doc or class_doc
            public = node.name == "__init__" or not node.name.startswith("_")
            if public and (doc or not inherits):
                yield node, doc


def undocumented(tree: ast.AST) -> tuple[list[str], int]:
    """Functions of three or more arguments that leave one unexplained; and how many there are in all."""
    missing, n = [], 0
    for node, doc in functions(tree):
        names = arguments(node)
        if len(names) > 2:
            n += 1
            explained = doc.partition("Args:\n")[2]
            if not all(re.search(rf"\b{name}\b.*:", explained) for name in names):
                missing.append(f"{node.name} (line {node.lineno})")
    return missing, n


def test_arguments_are_documented():
    missing, n = [], 0
    for path in FILES:
        here, count = undocumented(ast.parse(path.read_text(encoding="utf-8")))
        missing += [f"{path.relative_to(ROOT)}: {one}" for one in here]
        n += count
    assert n > 200
    assert len(missing) <= (1 - DOCUMENTED) * n, missing


@pytest.mark.parametrize(
    ("doc", "found"),
    [
        ("Add.\n\n    Args:\n        a, b: numbers.\n        c: more.\n    ", 0),
        ("Add.\n\n    Args:\n        a: a number.\n        b: another.\n    ", 1),
        ("Add a, b: and c: together.", 1),
    ],
)
def test_an_argument_left_out_is_found(doc, found):
    tree = ast.parse(f'def add(a, b, c):\n    """{doc}"""')
    assert len(undocumented(tree)[0]) == found


def test_no_file_is_longer_than_a_reader_takes():
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES
    }
    assert lengths
    assert not {name: n for name, n in lengths.items() if n > LONGEST}

"""Shared by all tests: the small profile, and the notebook's own definitions."""
import ast
import os
import sys
import types
from pathlib import Path

import nbformat
import pytest

os.environ.setdefault("DIFFUSION_PROFILE", "smoke")  # the notebooks run small under nbval
ROOT = Path(__file__).resolve().parent.parent
DEFINES = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)


def is_definition(source: str) -> bool:
    """True if a cell holds only imports, functions and classes."""
    body = ast.parse(source).body
    return bool(body) and all(isinstance(node, DEFINES) for node in body)


def load_definitions(name: str) -> types.ModuleType:
    """A module made of a notebook's definition cells; name without .ipynb."""
    notebook = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
    module = types.ModuleType(name)
    sys.modules[name] = module
    for cell in notebook.cells:
        if cell.cell_type == "code" and is_definition(cell.source):
            exec(compile(cell.source, f"{name}:{cell.id}", "exec"), module.__dict__)
    return module


@pytest.fixture(scope="session")
def nb() -> types.ModuleType:
    """The definitions of the pixel notebook."""
    return load_definitions("diffusion_tutorial")


@pytest.fixture
def tiny(nb, tmp_path, monkeypatch):
    """A Config that trains in a second, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return nb.replace(nb.make_config("smoke", "FashionMNIST"), steps=10, save_every=4)

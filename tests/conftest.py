"""Shared by all tests: the small profile, and the notebooks' own definitions."""
import ast
import os
import shutil
import sys
import types
from pathlib import Path

import nbformat
import pytest
import torch

os.environ.setdefault("DIFFUSION_PROFILE", "smoke")  # the notebooks run small under nbval
ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, (
    "chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run "
         "--disable-background-networking --disable-component-update --disable-sync").split()
DEFINES = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)


def parse(source: str) -> ast.Module:
    """The syntax tree of a cell; its magics become `pass`, so line numbers stay."""
    return ast.parse("\n".join("pass" if line.lstrip()[:1] in ("%", "!") else line
                               for line in source.split("\n")))


def code_cells(name: str) -> list[nbformat.NotebookNode]:
    """The code cells of a notebook; name without .ipynb."""
    book = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
    return [cell for cell in book.cells if cell.cell_type == "code"]


def is_definition(source: str) -> bool:
    """True if a cell holds only imports, functions and classes."""
    body = parse(source).body
    return bool(body) and all(isinstance(node, DEFINES) for node in body)


def keeps(node: ast.stmt) -> bool:
    """True for imports, functions, classes, and assignments to a Capitalised name."""
    return isinstance(node, DEFINES) or (
        isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id[0].isupper())


def load_definitions(name: str) -> types.ModuleType:
    """A module made of a notebook's definitions, on the CPU; name without .ipynb.

    Of the latent notebook (first edition) those of cells that hold nothing else.
    """
    module = types.ModuleType(name)
    sys.modules[name] = module
    module.device = torch.device("cpu")
    module.images = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)  # for sizes and channels
    whole = name == "diffusion_tutorial"
    for cell in code_cells(name):
        tree = parse(cell.source)
        if whole:
            tree.body = [node for node in tree.body if keeps(node)]
        elif not is_definition(cell.source):
            continue
        exec(compile(tree, f"{name}:{cell.id}", "exec"), module.__dict__)
    return module


@pytest.fixture(scope="session")
def nb() -> types.ModuleType:
    """The definitions of the pixel notebook."""
    return load_definitions("diffusion_tutorial")


@pytest.fixture
def tiny(nb):
    """Settings that train in a second."""
    return nb.Config(widths=(8, 16), blocks=1, heads=4, batch=16, steps=10, warmup=2, T=50)


@pytest.fixture(scope="session")
def garments(nb):
    """Fashion-MNIST's test pictures as bytes, and their labels."""
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        return nb.load_data("FashionMNIST", train=False)[:2]
    finally:
        os.chdir(before)


def awake(net: torch.nn.Module, deviation: float = 0.1) -> torch.nn.Module:
    """The network with weights that make every part count."""
    torch.manual_seed(0)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=deviation)
    return net.eval()

"""For tests and tools: a notebook's definitions, and how a result is kept."""
import ast
import json
import os
import platform
import re
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import torch

ROOT = Path(__file__).resolve().parents[2]
DEFINES = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)


def parse(source: str) -> ast.Module:
    """The syntax tree of a cell; its magics become `pass`, so line numbers stay."""
    return ast.parse("\n".join("pass" if line.lstrip()[:1] in ("%", "!") else line
                               for line in source.split("\n")))


def code_cells(name: str) -> list[nbformat.NotebookNode]:
    """The code cells of a notebook; name without .ipynb."""
    book = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
    return [cell for cell in book.cells if cell.cell_type == "code"]


def keeps(node: ast.stmt) -> bool:
    """True for imports, functions, classes, and assignments to a Capitalised name."""
    return isinstance(node, DEFINES) or (
        isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
        and node.targets[0].id[0].isupper())


def load_definitions(name: str) -> types.ModuleType:
    """A module made of a notebook's definitions; name without .ipynb."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    module.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module.images = torch.zeros(1, 1, 28, 28, dtype=torch.uint8)  # for sizes and channels
    for cell in code_cells(name):
        tree = parse(cell.source)
        tree.body = [node for node in tree.body if keeps(node)]
        exec(compile(tree, f"{name}:{cell.id}", "exec"), module.__dict__)
    return module


def prepare(book: str, name: str) -> types.ModuleType:
    """A notebook's definitions on one thread, with the data set that its functions read."""
    os.environ.setdefault("DIFFUSION_PROFILE", "cpu")
    os.chdir(ROOT)
    torch.set_num_threads(1)
    nb = load_definitions(book)
    everything, labels, _ = nb.load_data(name)
    nb.images, nb.labels = everything[:-5000], labels[:-5000]
    nb.test_images, nb.test_labels, _ = nb.load_data(name, train=False)
    nb.x_test, nb.yardstick = nb.scale(nb.test_images), nb.load_classifier(name)
    nb.real_test = nb.features_of(nb.yardstick, nb.test_images)
    nb.held_out = nb.features_of(nb.yardstick, everything[-10_000:])
    return nb


def where() -> dict:
    """Device, version and commit of a measurement."""
    threads, cpu = torch.get_num_threads(), Path("/proc/cpuinfo")
    names = re.findall("model name.*: (.+)", cpu.read_text()) if cpu.exists() else []
    commit, changed = (subprocess.run(["git", *words], text=True, capture_output=True,
                                      cwd=ROOT).stdout.strip() for words in (
        ("rev-parse", "--short", "HEAD"),
        ("status", "--porcelain", "-uno", "--", "assets/tools", "*.ipynb")))
    commit += "+" * bool(changed)  # made by a program that is in no commit
    many = "one thread" if threads == 1 else f"{threads} threads"
    device = f"{many} of {[*names, platform.machine()][0]}"
    if torch.cuda.is_available():
        device = f"one {torch.cuda.get_device_name()}"
    return {"device": device, "torch": torch.__version__, "commit": commit}


def keep(name: str, rows: list[dict], facts: dict | None = None) -> None:
    """Write rows, where they were made, and other facts to assets/results."""
    (ROOT / f"assets/results/{name}.json").write_text(
        json.dumps(where() | (facts or {}) | {"rows": rows}, indent=1))

"""The committed notebooks as files."""
import ast
import base64
import io
import re
import urllib.parse

import nbformat
import pytest
from conftest import DEFINES, ROOT, parse
from PIL import Image

PIXELS, LATENTS = NOTEBOOKS = ("diffusion_tutorial.ipynb", "latent_diffusion_cab.ipynb")
# Budgets: cells, and code lines (no blanks, comments, docstrings): all, before a cell.
BUDGETS = {PIXELS: (107, 1860, {"choose": 76, "garments": 320}),
           LATENTS: (92, 1500, {"choose": 46})}
MACHINERY = 260  # code lines of workshop and exercise cells
KEPT = {"net", "net_cfg", "schedule", "denoise", "cfg", "run", "folder", "images", "labels",
        "everything", "val_images", "T", "shape", "all_images", "coder", "code_shape",
        "code_scale", "z_train", "live", "latent", "yardstick"}  # bound in one cell only


@pytest.fixture(params=NOTEBOOKS)
def book(request):
    """Each notebook of the repository, as it is committed."""
    return nbformat.read(ROOT / request.param, as_version=4)


def code_of(book):
    """The code cells of a notebook."""
    return [cell for cell in book.cells if cell.cell_type == "code"]


def tagged(cell, *names):
    """True if a cell has one of the tags."""
    return bool(set(cell.metadata.get("tags", [])) & set(names))


def code_lines(source):
    """Lines that are neither blank, nor comment alone, nor docstring."""
    skip = set()
    for node in ast.walk(parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and (
                ast.get_docstring(node) is not None):
            skip |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return sum(bool(line.strip()) and not line.strip().startswith("#") and number not in skip
               for number, line in enumerate(source.split("\n"), 1))


def test_is_valid_and_was_run_once_from_top_to_bottom(book):
    nbformat.validate(book)
    cells = code_of(book)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert len({cell.id for cell in book.cells}) == len(book.cells)


def test_outputs_are_clean_and_pictures_have_captions(book):
    for cell, below in zip(book.cells, book.cells[1:]):
        for out in cell.get("outputs", ()):
            assert out.output_type != "error" and out.get("name") != "stderr", cell.id
            assert "\r" not in out.get("text", ""), cell.id
            if "image/png" in out.get("data", {}):
                assert below.cell_type == "markdown" and "*Figure" in below.source, cell.id
                image = Image.open(io.BytesIO(base64.b64decode(out.data["image/png"])))
                assert len(set(image.convert("L").tobytes())) > 8, f"{cell.id} is blank"
    assert all("state" in state for state in book.metadata.get("widgets", {}).values())


def test_pictures_in_prose_have_alt_text_and_are_inside(book):
    for cell in book.cells:
        if cell.cell_type == "markdown":
            for alt, target in re.findall(r"!\[(.*?)\]\((.*?)\)", cell.source):
                assert len(alt) > 20
                assert target.removeprefix("attachment:") in cell.get("attachments", {})


def test_links_and_figures_resolve_and_nothing_is_left_to_write(book):
    text = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    for target in re.findall(r"\]\(#(.*?)\)", text):
        assert f'<a id="{target}"></a>' in text
    for target in re.findall(r"\]\((?!https?:|#)(.*?)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / urllib.parse.unquote(target)).exists(), target
    assert not re.findall(r"TODO|PLACEHOLDER|@@|Figure @|@[A-Z]+@|\bTIMES\b|ANSWERS\d", text)
    assert not re.findall(r"/(?:root|home|tmp|Users|work)/\w+", nbformat.writes(book))
    numbers = [int(n) for n in re.findall(r"\*Figure (\d+)\.", text)]
    assert numbers == list(range(1, len(numbers) + 1))


def test_sizes():
    assert all((ROOT / name).stat().st_size <= 2.5e6 for name in NOTEBOOKS)
    tracked = sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file()
                  and not any(part in ("runs", "venv", "__pycache__") or part[0] == "."
                              for part in path.relative_to(ROOT).parts)
                  and not path.name.endswith("-ubyte") and "cifar-10" not in str(path))
    assert tracked <= 58 * 2 ** 20
    assert sum(path.stat().st_size for path in ROOT.glob("assets/weights/*.pt")) <= 13e6


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_budgets(name):
    cells = code_of(nbformat.read(ROOT / name, as_version=4))
    most_cells, most_lines, most_before = BUDGETS[name]
    lines = {cell.id: code_lines(cell.source) for cell in cells}
    assert all(len(line) <= 88 for cell in cells for line in cell.source.split("\n"))
    assert sum(lines.values()) <= most_lines and len(cells) <= most_cells
    for id, most in most_before.items():
        assert sum([*lines.values()][:[*lines].index(id)]) <= most, id
    assert sum(lines[cell.id] for cell in cells if tagged(
        cell, "workshop", "exercise")) <= MACHINERY
    workshop = [lines[cell.id] for cell in cells if tagged(cell, "workshop")]
    assert len(workshop) <= 6 and max(workshop) <= 30
    long = [len(cell.source.split("\n")) for cell in cells if not tagged(cell, "recap")]
    assert max(long) <= 40 and sum(n > 30 for n in long) <= 18


def test_machinery_is_folded(book):
    for cell in code_of(book):
        folded = tagged(cell, "workshop", "exercise", "recap")
        assert cell.metadata.get("jupyter", {}).get("source_hidden", False) == folded, cell.id
        assert cell.metadata.get("cellView") == ("form" if folded else None), cell.id
        assert cell.source.startswith("#@title ") == folded, cell.id


def test_every_code_cell_stands_under_prose_and_every_function_says_what_it_is(book):
    for above, cell in zip(book.cells, book.cells[1:]):
        if cell.cell_type != "code" or tagged(cell, "workshop"):
            continue
        assert above.cell_type == "markdown" or tagged(above, "workshop"), cell.id
    for cell in code_of(book):
        for node in ast.walk(parse(cell.source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 30 and ast.get_docstring(node), node.name
                hinted = [a.annotation for a in node.args.args + node.args.kwonlyargs
                          if a.arg not in ("self", "cls")]
                assert all(hinted) and node.returns, f"{node.name}: hints"


def bound(tree):
    """Names that a cell's top level defines, and names that it assigns."""
    defined, assigned, todo = set(), set(), list(tree.body)
    while todo:
        node = todo.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            defined |= {(a.asname or a.name).split(".")[0] for a in node.names}
        elif isinstance(node, DEFINES):
            defined.add(node.name)
        elif isinstance(node, (ast.Lambda, ast.ListComp, ast.SetComp, ast.DictComp,
                               ast.GeneratorExp)):
            continue
        else:
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                assigned.add(node.id)
            todo += ast.iter_child_nodes(node)
    return defined, assigned


def test_no_name_has_two_meanings(book):
    """No function is also a variable, none is defined twice, and the main names stay."""
    names = {cell.id: bound(parse(cell.source)) for cell in code_of(book)}
    defined = set().union(*(first for first, _ in names.values()))
    assigned = set().union(*(second for _, second in names.values()))
    assert not defined & assigned
    for name in KEPT:
        cells = [id for id, (_, second) in names.items() if name in second]
        assert len(cells) <= 1 + (name == "schedule"), (name, cells)
    functions = [node.name for cell in code_of(book) for node in parse(cell.source).body
                 if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert len(set(functions)) == len(functions)

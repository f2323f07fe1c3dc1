"""The committed notebooks as files, and run in the ways in which people run them."""
import ast
import base64
import io
import os
import re
import shutil
import urllib.parse

import nbformat
import pytest
from conftest import DEFINES, ROOT, parse
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

PIXELS, LATENTS = NOTEBOOKS = ("diffusion_tutorial.ipynb", "latent_diffusion_cab.ipynb")
# Budgets: cells, and code lines (no blanks, comments, docstrings): all, before a cell.
BUDGETS = {PIXELS: (95, 1630, {"choose": 76, "garments": 320}),
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


def prose_of(book):
    """All markdown of a notebook."""
    return "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")


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


def pictures(cell):
    """The output data of a cell that hold a picture."""
    return [out.data for out in cell.outputs if any(
        kind.startswith("image/") for kind in out.get("data", {}))]


# ----------------------------------------------------------------------- as files

def test_is_valid_and_was_run_once_from_top_to_bottom(book):
    nbformat.validate(book)
    cells = code_of(book)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert len({cell.id for cell in book.cells}) == len(book.cells)


def test_outputs_are_clean_and_pictures_have_captions(book):
    for cell, below in zip(book.cells, book.cells[1:]):
        if cell.cell_type != "code":
            continue
        for out in cell.outputs:
            assert out.output_type != "error" and out.get("name") != "stderr", cell.id
            assert "\r" not in out.get("text", ""), cell.id
        if pictures(cell):
            assert below.cell_type == "markdown" and "*Figure" in below.source, cell.id
        for data in pictures(cell):
            if "image/png" in data:
                image = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
                assert len(set(image.convert("L").tobytes())) > 8, f"{cell.id} is blank"
    assert all("state" in state for state in book.metadata.get("widgets", {}).values())


def test_pictures_in_prose_have_alt_text_and_are_inside(book):
    for cell in book.cells:
        if cell.cell_type == "markdown":
            for alt, target in re.findall(r"!\[(.*?)\]\((.*?)\)", cell.source):
                assert len(alt) > 20
                assert target.removeprefix("attachment:") in cell.get("attachments", {})


def test_links_and_figures_resolve_and_nothing_is_left_to_write(book):
    text = prose_of(book)
    for target in re.findall(r"\]\(#(.*?)\)", text):
        assert f'<a id="{target}"></a>' in text
    for target in re.findall(r"\]\((?!https?:|#)(.*?)\)", (ROOT / "README.md").read_text()):
        assert (ROOT / urllib.parse.unquote(target)).exists(), target
    assert not re.findall(r"TODO|PLACEHOLDER|@@|Figure @|@[A-Z]+@|\bTIMES\b|ANSWERS\d", text)
    assert not re.findall(r"/(?:root|home|tmp|Users|work)/\w+", nbformat.writes(book))
    numbers = [int(n) for n in re.findall(r"\*Figure (\d+)\.", text)]
    assert numbers == list(range(1, len(numbers) + 1))


def test_sizes(book):
    assert all((ROOT / name).stat().st_size <= 2.5e6 for name in NOTEBOOKS)
    tracked = sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file()
                  and not {".git", "runs", ".venv", "venv"} & set(path.relative_to(ROOT).parts)
                  and not path.name.endswith("-ubyte") and "cifar-10" not in str(path))
    assert tracked <= 56 * 2 ** 20
    assert sum(path.stat().st_size for path in ROOT.glob("assets/weights/*.pt")) <= 11e6


def test_lines_fit_a_projector(book):
    for cell in code_of(book):
        assert max(map(len, cell.source.splitlines())) <= 88, cell.id


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_budgets(name):
    cells = code_of(nbformat.read(ROOT / name, as_version=4))
    most_cells, most_lines, most_before = BUDGETS[name]
    lines = {cell.id: code_lines(cell.source) for cell in cells}
    assert sum(lines.values()) <= most_lines and len(cells) <= most_cells
    for id, most in most_before.items():
        assert sum([*lines.values()][:[*lines].index(id)]) <= most, id
    assert sum(lines[cell.id] for cell in cells if tagged(
        cell, "workshop", "exercise")) <= MACHINERY


def test_cells_are_short(book):
    """Folded copies from the other notebook are not counted."""
    long = {cell.id: len(cell.source.split("\n")) for cell in code_of(book)
            if not tagged(cell, "recap")}
    assert not [id for id, n in long.items() if n > 40]
    assert sum(n > 30 for n in long.values()) <= 18, [id for id, n in long.items() if n > 30]


def test_machinery_is_folded_and_small(book):
    workshop = [cell for cell in code_of(book) if tagged(cell, "workshop")]
    assert len(workshop) <= 6, [cell.id for cell in workshop]
    for cell in code_of(book):
        folded = tagged(cell, "workshop", "exercise", "recap")
        assert cell.metadata.get("jupyter", {}).get("source_hidden", False) == folded, cell.id
        assert cell.metadata.get("cellView") == ("form" if folded else None), cell.id
        assert cell.source.startswith("#@title ") == folded, cell.id
        if tagged(cell, "workshop"):
            assert code_lines(cell.source) <= 30, cell.id


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


def test_no_function_reads_a_global_network_or_schedule(book):
    """The panel's callbacks may: they are not for use elsewhere."""
    for cell in code_of(book):
        for node in parse(cell.source).body:
            if isinstance(node, DEFINES[2:]) and "ipywidgets" not in cell.source:
                local = {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
                local |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name)
                          and isinstance(n.ctx, ast.Store)}
                local |= {n.name for n in ast.walk(node) if isinstance(n, ast.FunctionDef)}
                used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
                assert not (used - local) & {"net", "schedule", "denoise", "run", "cfg",
                                             "net_cfg"}, (cell.id, node.name)


def test_symbols_of_the_notation_table_occur_in_code(book):
    table = next(cell.source for cell in book.cells if cell.id == "notation")
    used = set()
    for cell in code_of(book):
        for node in ast.walk(parse(cell.source)):
            used |= {getattr(node, key, None) for key in ("id", "arg", "attr")}
    rows = [row.split("|") for row in table.split("\n") if row.startswith("| $")]
    assert len(rows) >= 6
    for row in rows:
        for name in re.findall(r"`(.+?)`", row[2]):
            assert set(re.findall(r"[a-zA-Z_]\w*", name)) <= used, row


# ---------------------------------------------------------------------------- run

def execute(source, folder, words={}, times=1):
    """Run a notebook under smoke in a folder without network; returns it with its outputs.

    words: replacements in its code; times: how often each cell is run.
    """
    book = nbformat.read(source, as_version=4)
    book.cells = [nbformat.v4.new_code_cell(cell.source, id=f"{cell.id}-{again}"[-60:])
                  for cell in code_of(book) for again in range(times)]
    for cell in book.cells:
        for old, new in words.items():
            cell.source = cell.source.replace(old, new)
    offline = {f"{name}_proxy": "http://127.0.0.1:9" for name in ("http", "https")}
    env = {**os.environ, "DIFFUSION_PROFILE": "smoke", **offline}
    NotebookClient(book, timeout=900, resources={"metadata": {"path": str(folder)}}
                   ).execute(env=env)
    for cell in book.cells:
        assert not [out for out in cell.outputs if out.get("name") == "stderr"], cell
    return book


def shown(book):
    """All text that a run printed, and the titles of its cells' HTML."""
    return "".join(out.get("text", "") for cell in book.cells for out in cell.outputs)


def test_alone_in_an_empty_folder_by_one_word_every_cell_twice(tmp_path):
    """Nothing but the data beside it: no weights, no results. MNIST by one word."""
    shutil.copytree(ROOT / "assets/data/MNIST", tmp_path / "assets/data/MNIST")
    book = execute(ROOT / PIXELS, tmp_path, {'DATASET = "FashionMNIST"': 'DATASET = "MNIST"'},
                   times=2)
    assert "Later parts use runs" in shown(book)
    assert "FashionMNIST" not in shown(book)
    assert {path.name for path in tmp_path.iterdir()} == {"assets", "runs"}


def test_a_folder_of_shapes_by_one_word(tmp_path):
    """The whole notebook on a few hundred coloured shapes, one subfolder each."""
    from test_own import draw_shapes
    draw_shapes(tmp_path / "shapes", 60)
    book = execute(ROOT / PIXELS, tmp_path, {'"FashionMNIST"  #': '"shapes"  #'})
    assert "Later parts use runs" in shown(book)


def test_latent_clothes_alone_in_an_empty_folder_every_cell_twice(tmp_path):
    shutil.copytree(ROOT / "assets/data/FashionMNIST", tmp_path / "assets/data/FashionMNIST")
    book = execute(ROOT / LATENTS, tmp_path, {
        'DATASET = "MNIST"': 'DATASET = "FashionMNIST"'}, times=2)
    assert "latent-fashionmnist.pt: " in shown(book) and "latent-mnist" not in shown(book)
    assert {path.name for path in tmp_path.iterdir()} == {"assets", "runs"}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_without_data_and_network_the_last_words_name_them(tmp_path, name):
    with pytest.raises(CellExecutionError) as stopped:
        execute(ROOT / name, tmp_path)
    text = re.sub(r"\x1b\[[\d;]*m", "", str(stopped.value)).strip()[-300:]
    assert re.search("network|downloading", text) and "MNIST" in str(stopped.value), text

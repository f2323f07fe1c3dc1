"""The committed notebooks as files, and run in the ways in which people run them."""
import ast
import builtins
import io
import os
import re
import shutil
import urllib.parse

import nbformat
import pytest
from conftest import ROOT, is_definition
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

NOTEBOOKS = sorted(path.name for path in ROOT.glob("*.ipynb"))


@pytest.fixture(params=NOTEBOOKS)
def book(request):
    """Each notebook of the repository, as it is committed."""
    return nbformat.read(ROOT / request.param, as_version=4)


def code_cells(book):
    """The code cells of a notebook."""
    return [cell for cell in book.cells if cell.cell_type == "code"]


def prose(book):
    """All markdown of a notebook."""
    return "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")


def pictures(cell):
    """The output data of a cell that hold a picture."""
    return [out.data for out in cell.outputs if "data" in out
            and any(kind.startswith("image/") for kind in out.data)]


def test_is_valid_and_was_run_once_from_top_to_bottom(book):
    nbformat.validate(book)
    cells = code_cells(book)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert len({cell.id for cell in book.cells}) == len(book.cells)


def test_outputs_are_clean(book):
    for cell in code_cells(book):
        for out in cell.outputs:
            assert out.output_type != "error", cell.id
            assert out.get("name") != "stderr", cell.id
            assert "\r" not in out.get("text", ""), cell.id
    for state in book.metadata.get("widgets", {}).values():
        assert "state" in state


def test_every_picture_has_a_caption_below(book):
    for cell, below in zip(book.cells, book.cells[1:]):
        if cell.cell_type == "code" and pictures(cell):
            assert below.cell_type == "markdown" and "*Figure" in below.source, cell.id


def test_pictures_are_not_blank(book):
    for cell in code_cells(book):
        for data in pictures(cell):
            if "image/png" in data:
                import base64
                image = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
                assert len(set(image.convert("L").tobytes())) > 8, cell.id


def test_pictures_in_prose_have_alt_text_and_are_inside(book):
    for cell in book.cells:
        if cell.cell_type == "markdown":
            for alt, target in re.findall(r"!\[(.*?)\]\((.*?)\)", cell.source):
                assert len(alt) > 20
                assert target.removeprefix("attachment:") in cell.get("attachments", {})


def test_links_resolve(book):
    text = prose(book)
    for target in re.findall(r"\]\(#(.*?)\)", text):
        assert f'<a id="{target}"></a>' in text
    readme = (ROOT / "README.md").read_text()
    for target in re.findall(r"\]\((?!https?:|#)(.*?)\)", readme):
        assert (ROOT / urllib.parse.unquote(target)).exists(), target


def test_no_machine_path_is_shown(book):
    shown = nbformat.writes(book)
    assert not re.findall(r"/(?:root|home|tmp|Users|work)/\w+", shown)


def test_no_placeholder_is_left(book):
    assert "@@" not in prose(book) and "TODO" not in prose(book)


def test_lines_fit_a_projector(book):
    for cell in code_cells(book):
        assert max(map(len, cell.source.splitlines())) <= 88, cell.id


def test_sizes(book):
    for name in NOTEBOOKS:
        assert (ROOT / name).stat().st_size <= 2.5e6
    tracked = sum(path.stat().st_size for path in ROOT.rglob("*") if path.is_file()
                  and not {".git", "runs"} & set(path.relative_to(ROOT).parts)
                  and not path.name.endswith("-ubyte")
                  and "env" not in path.relative_to(ROOT).parts[0])
    assert tracked <= 54 * 2 ** 20


def test_parts_stay_within_their_number_of_cells(book):
    parts = [0]
    for cell in book.cells:
        if cell.cell_type == "markdown" and re.match(r"# Part [2-9]", cell.source):
            parts.append(0)
        parts[-1] += cell.cell_type == "code"
    assert parts[0] <= 45 and max(parts[1:], default=0) <= 26 and sum(parts) <= 110


def test_functions_read_no_global_variable(book):
    """Functions use only their arguments, imports and other definitions."""
    known, bodies = set(dir(builtins)), []
    for cell in code_cells(book):
        if is_definition(cell.source):
            for node in ast.parse(cell.source).body:
                if isinstance(node, (ast.Import, ast.ImportFrom)):
                    known |= {(a.asname or a.name).split(".")[0] for a in node.names}
                else:
                    known.add(node.name)
                    bodies.append((cell.id, node))
    for cell, node in bodies:
        local = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)
                 and isinstance(n.ctx, ast.Store)}
        local |= {n.arg for n in ast.walk(node) if isinstance(n, ast.arg)}
        local |= {n.name for n in ast.walk(node) if isinstance(n, (ast.FunctionDef,))}
        local |= {n.name for n in ast.walk(node) if isinstance(n, ast.ExceptHandler)}
        used = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
        assert not used - local - known, (cell, node.name)


def test_symbols_of_the_notation_table_occur_in_code(book):
    """Every name of its second column is a name in the code, outside text and comments."""
    rows = re.search(r"### Notation\n.*?\n\n\|.*?\n\|[-|]+\n(.*?)(?:\n\n|\Z)",
                     next(cell.source for cell in book.cells if cell.id == "notation"), re.S)
    used = set()
    for cell in code_cells(book):
        for node in ast.walk(ast.parse(cell.source)):
            used |= {getattr(node, key, None) for key in ("id", "arg", "attr")}
    for row in rows[1].split("\n"):
        names = re.findall(r"`(.+?)`", row.split("|")[2])
        assert names and not set(names) - used, row
    assert rows[1].count("\n") >= 7


def run(source, folder, words={}, twice=False):
    """Execute a notebook in a folder under smoke; returns it with its outputs.

    words: a dict of replacements in code; twice: run each cell a second time.
    """
    book = nbformat.read(source, as_version=4)
    book.cells = [nbformat.v4.new_code_cell(cell.source) if again else cell
                  for cell in book.cells
                  for again in range(1 + (twice and cell.cell_type == "code"))]
    for cell in code_cells(book):
        for old, new in words.items():
            cell.source = cell.source.replace(old, new)
    offline = {f"{name}_proxy": "http://127.0.0.1:9" for name in ("http", "https")}
    env = {**os.environ, "DIFFUSION_PROFILE": "smoke", **offline}
    NotebookClient(book, timeout=900, startup_timeout=300,
                   resources={"metadata": {"path": str(folder)}}).execute(env=env)
    return book


def test_mnist_by_one_word(tmp_path):
    shutil.copytree(ROOT / "assets/data/MNIST", tmp_path / "assets/data/MNIST")
    word = 'DATASET = "FashionMNIST"'
    book = run(ROOT / "diffusion_tutorial.ipynb", tmp_path, twice=True,
               words={word: 'DATASET = "MNIST"'})
    shown = "".join(out.get("text", "") for cell in code_cells(book) for out in cell.outputs)
    assert "MNIST, profile smoke" in shown and "Fashion" not in shown
    first, second = ([line for out in cell.outputs
                      for line in out.get("text", "").split("\n") if line]
                     for cell in code_cells(book) if cell.source.startswith("val = val_im"))
    assert not any("read from" in line for line in first)
    assert sum("read from" in line for line in second) == 20, "a rung was trained again"
    assert [line for line in second if line in first] == first, "other results when read"


def test_latent_clothes_by_one_word_and_a_lone_notebook(tmp_path):
    shutil.copytree(ROOT / "assets/data/FashionMNIST", tmp_path / "assets/data/FashionMNIST")
    book = run(ROOT / "latent_diffusion_cab.ipynb", tmp_path, twice=True, words={
        'DATASET = "MNIST"': 'DATASET = "FashionMNIST"',
        "SPACE_CHANGES = {}": "SPACE_CHANGES = dict(channels=2, folds=3, kl=0.0)"})
    shown = "".join(out.get("text", "") for cell in code_cells(book) for out in cell.outputs)
    assert "FashionMNIST, profile smoke" in shown and "shipped" not in shown


def test_changes_that_the_exercises_ask_for(tmp_path):
    shutil.copytree(ROOT / "assets/data/FashionMNIST", tmp_path / "assets/data/FashionMNIST")
    changes = 'CHANGES = dict(sample_steps=100, predict="eps", schedule="linear", heads=2)'
    run(ROOT / "diffusion_tutorial.ipynb", tmp_path, words={"CHANGES = {}": changes})


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_alone_and_offline_it_says_what_it_needs(tmp_path, name):
    with pytest.raises(CellExecutionError, match="connect to the network") as stopped:
        run(ROOT / name, tmp_path)
    assert "MNIST is neither whole in assets/data" in str(stopped.value)
    assert str(stopped.value).count("Traceback") == 0

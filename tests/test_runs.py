"""Both notebooks from top to bottom, alone in an empty folder, every cell twice."""
import os
import re
import shutil

import nbformat
import pytest
from conftest import ROOT
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from test_own import draw_shapes

PIXELS, LATENTS = NOTEBOOKS = ("diffusion_tutorial", "latent_diffusion_cab")
ONCE = {"setup", "train-first", "ideal-run", "flaw", "resume-check", "yardstick",
        "autoencoder-train", "codes", "judge-run"}  # long, and they define all they change


def execute(name, folder, words={}, times=1):
    """Run a notebook under smoke, offline: all that it printed. words: replacements in code."""
    book = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
    book.cells = [nbformat.v4.new_code_cell(cell.source, id=f"{cell.id}-{again}"[-60:])
                  for cell in book.cells if cell.cell_type == "code"
                  for again in range(1 if cell.id in ONCE else times)]
    for cell in book.cells:
        for old, new in words.items():
            cell.source = cell.source.replace(old, new)
    offline = {f"{name}_proxy": "http://127.0.0.1:9" for name in ("http", "https")}
    NotebookClient(book, timeout=900, startup_timeout=300,
                   resources={"metadata": {"path": str(folder)}}
                   ).execute(env={**os.environ, "DIFFUSION_PROFILE": "smoke", **offline})
    for cell in book.cells:
        assert not [out for out in cell.outputs if out.get("name") == "stderr"], cell
    return "".join(out.get("text", "") for cell in book.cells for out in cell.outputs)


def test_pixels_on_a_folder_of_shapes_by_one_word(tmp_path):
    """Nothing but a few coloured pictures beside it: no data set, no weights, no results."""
    draw_shapes(tmp_path / "shapes", 60)
    said = execute(PIXELS, tmp_path, {'"FashionMNIST"  #': '"shapes"  #'}, times=2)
    assert "Later parts use runs" in said and "FashionMNIST" not in said
    assert {path.name for path in tmp_path.iterdir()} == {"shapes", "runs"}


def test_latents_on_clothes_by_one_word(tmp_path):
    """Nothing but the data beside it."""
    shutil.copytree(ROOT / "assets/data/FashionMNIST", tmp_path / "assets/data/FashionMNIST")
    said = execute(LATENTS, tmp_path, {'DATASET = "MNIST"': 'DATASET = "FashionMNIST"'}, 2)
    assert "latent-fashionmnist.pt: " in said and "latent-mnist" not in said
    assert {path.name for path in tmp_path.iterdir()} == {"assets", "runs"}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_without_data_and_network_the_last_words_name_them(tmp_path, name):
    with pytest.raises(CellExecutionError) as stopped:
        execute(name, tmp_path)
    text = re.sub(r"\x1b\[[\d;]*m", "", str(stopped.value)).strip()[-300:]
    assert re.search("network|downloading", text) and "MNIST" in str(stopped.value), text

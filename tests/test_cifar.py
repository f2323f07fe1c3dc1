"""CIFAR-10 by one word: three colours, 32 x 32 pixels, through the same cells.

The data are made here, in torchvision's own files; only its md5s are told about them.
"""
import base64
import hashlib
import io
import json
import pickle
import re
import subprocess
import tarfile
from types import SimpleNamespace

import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT
from nbclient.exceptions import CellExecutionError
from PIL import Image
from test_notebook import code_cells, run
from torchvision.datasets import CIFAR10

FOLDER, ARCHIVE = CIFAR10.base_folder, CIFAR10.filename
KINDS = ("airplane automobile bird cat deer dog frog horse ship truck").split()
WORD = 'DATASET = "FashionMNIST"', 'DATASET = "CIFAR10"'
CPU = torch.device("cpu")


def photographs(n, seed):
    """n pictures uint8 [n, 3, 32, 32] and labels [n]: ten forms before soft grounds."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randint(10, (n,), generator=g)
    ground = 0.35 * torch.randn(n, 3, 5, 5, generator=g)
    ground += 0.4 * torch.randn(n, 3, 1, 1, generator=g)
    ground = torch.nn.functional.interpolate(ground, (32, 32), mode="bicubic")
    place = torch.rand(n, 2, 1, 1, generator=g) - 0.5
    size = (0.4 + 0.4 * torch.rand(n, 1, 1, generator=g))
    line = torch.linspace(-1, 1, 32)
    v, u = ((line.view(shape) - place[:, i]) / size
            for i, shape in enumerate(((1, 32, 1), (1, 1, 32))))
    forms = torch.stack([u.abs() + 0 * v, v.abs() + 0 * u, u.abs().maximum(v.abs()),
                         (u ** 2 + v ** 2).sqrt(), (u.abs() + v.abs()) / 1.4], 1)
    form = forms[torch.arange(n), y % 5]  # below 1 inside
    form = torch.where((y >= 5)[:, None, None], 2 * (form - 0.6).abs() + 0.5, form)
    mask = torch.sigmoid(8 * (1 - form))[:, None]
    hue = torch.randn(10, 3, 1, 1, generator=torch.Generator().manual_seed(0))[y]
    hue = hue + 0.3 * torch.randn(n, 3, 1, 1, generator=g)
    x = mask * hue + (1 - mask) * ground + 0.05 * torch.randn(n, 3, 32, 32, generator=g)
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8), y


def md5(file):
    """The md5 of a file, as torchvision writes it."""
    return hashlib.md5(file.read_bytes()).hexdigest()


class Made:
    """A root with CIFAR-10's archive in it, and the md5s that torchvision must expect."""

    def __init__(self, root, n_train, n_test):
        """n_train training pictures in five batches, n_test test pictures in one."""
        batches = root / FOLDER
        batches.mkdir(parents=True)
        self.root, self.parts = root, {
            True: photographs(n_train, 1), False: photographs(n_test, 2)}
        (batches / "batches.meta").write_bytes(pickle.dumps({"label_names": KINDS}))
        pieces = [*zip(*(part.chunk(5) for part in self.parts[True])), self.parts[False]]
        names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
        for name, (x, y) in zip(names, pieces):
            (batches / name).write_bytes(pickle.dumps(
                {"data": x.flatten(1).numpy(), "labels": y.tolist()}))
        with tarfile.open(root / ARCHIVE, "w:gz", compresslevel=1) as packed:
            packed.add(batches, FOLDER)
        sums = [[name, md5(batches / name)] for name in names]
        self.expected = {
            "train_list": sums[:5], "test_list": sums[5:], "tgz_md5": md5(root / ARCHIVE),
            "meta": {**CIFAR10.meta, "md5": md5(batches / "batches.meta")}}

    def patch(self, monkeypatch):
        """Make torchvision expect these md5s in this process, and refuse the network."""
        for name, value in self.expected.items():
            monkeypatch.setattr(CIFAR10, name, value)
        monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/none")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Fifty training and ten test pictures, unpacked and packed, in an empty folder."""
    made = Made(tmp_path / "assets/data", 50, 10)
    made.patch(monkeypatch)
    monkeypatch.chdir(tmp_path)
    return made


@pytest.mark.parametrize("train", (True, False))
def test_tensors_as_written(nb, small, train, capsys):
    found, (x, y) = nb.load_images("CIFAR10", train), small.parts[train]
    assert isinstance(found.data, torch.Tensor) and found.data.dtype == torch.uint8
    assert torch.equal(found.data, x) and found.data.is_contiguous()
    assert torch.equal(found.targets, y) and found.classes == KINDS
    assert found.data[3:5, :, 7].shape == (2, 3, 32) and len(found.data) == len(x)
    assert capsys.readouterr().out == ""


def test_it_is_unpacked_from_the_archive_alone(nb, small):
    for file in (small.root / FOLDER).iterdir():
        file.unlink()
    assert torch.equal(nb.load_images("CIFAR10", True).data, small.parts[True][0])


def test_a_damaged_batch_is_unpacked_again(nb, small):
    file = small.root / FOLDER / "data_batch_3"
    content = bytearray(file.read_bytes())
    content[5000] ^= 255
    file.write_bytes(content)
    assert torch.equal(nb.load_images("CIFAR10", True).data, small.parts[True][0])


@pytest.mark.parametrize("harm", ("no archive", "damaged archive"))
def test_neither_there_nor_downloaded_is_one_sentence(nb, small, harm):
    (small.root / FOLDER / "test_batch").unlink()
    packed = small.root / ARCHIVE
    content = packed.read_bytes()
    packed.unlink()
    if harm == "damaged archive":
        packed.write_bytes(content[:-100])
    with pytest.raises(nb.ReaderError, match="CIFAR10 is neither whole.*" + ARCHIVE):
        nb.load_images("CIFAR10", False)


def test_git_ignores_the_download(small, tmp_path):
    (tmp_path / ".gitignore").write_text((ROOT / ".gitignore").read_text())
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    status = subprocess.run(["git", "status", "--porcelain", "-uall"], cwd=tmp_path,
                            capture_output=True, text=True, check=True).stdout
    assert status == "?? .gitignore\n"


def decoded(content):
    """The RGB picture [H, W, 3] in the bytes of a file, as integers."""
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).astype(int)


def test_png_has_16_greys_but_more_colours(nb):
    x = nb.to_float(photographs(20, 3)[0])
    colour, grey = nb.grid(x, 5), nb.grid(x[:, :1], 5)
    few = Image.fromarray(colour.numpy()).quantize(16).convert("RGB")
    for picture, most in ((colour, 256), (grey, 16)):
        found = decoded(nb.png(picture))
        assert most / 2 <= len(np.unique(found.reshape(-1, 3), axis=0)) <= most
        off = abs(found - picture.numpy()).mean()
        assert off < 0.5 * abs(np.asarray(few).astype(int) - colour.numpy()).mean()


def test_pictures_of_the_asked_shape(nb, tiny):
    shape, images = (3, 32, 32), photographs(40, 4)
    tiny = nb.replace(tiny, dataset="CIFAR10")
    net = nb.UNet(tiny, 3)
    way = nb.few_step("2M", net, tiny, 3, "trailing")
    assert nb.draw_by(way, torch.arange(4), CPU, 0, shape).shape == (4, *shape)
    assert nb.early_average(net, tiny, 0.9, 1).module.stem.in_channels == 12
    assert nb.MLP(tiny, 3)(torch.zeros(2, *shape), torch.ones(2).long()).shape[1:] == shape
    tuned = nb.fine_tune(net, images, nb.replace(tiny, steps=1), CPU, "time ignored")
    assert tuned(torch.zeros(1, *shape), torch.tensor([1])).shape == (1, *shape)
    judge = nb.train_classifier(*images, 2, CPU)
    assert nb.features_of(judge, images[0]).shape == (40, 128)
    t, row, view, text = nb.noising_slider(images[0], 50, 0).children
    assert decoded(bytes(view.value)).shape == (33 * 6 - 4, 3 * (32 * 6 + 1) + 1, 3)


def test_boxes_are_grey_on_every_colour(nb):
    x = nb.paint([(0, 0, 4, 32, 0.5), (2, 0, 4, 3, -0.25)], (3, 32, 32))
    grey = nb.paint([(0, 0, 4, 28, 0.5), (2, 0, 4, 3, -0.25)])
    assert x.shape == (1, 3, 32, 32) and torch.equal(x[0, 0], x[0, 2])
    assert torch.equal(x[0, 1, :28, :28], grey[0, 0]) and (x[..., 28:, :] == -1).all()


def test_the_yardstick_never_sees_the_pictures_of_the_floor(nb):
    """Cell `classifier`: it trains on all but the last 10,000, which are the floor."""
    loaded = SimpleNamespace(data=torch.arange(10_050), targets=torch.arange(10_050))
    seen, book = [], nbformat.read(ROOT / "diffusion_tutorial.ipynb", as_version=4)
    source = next(cell.source for cell in book.cells if cell.id == "classifier")
    world = {**vars(nb), "loaded": loaded, "shape": (3, 32, 32), "device": CPU,
             "cfg": nb.make_config("smoke", "CIFAR10"),
             "load_images": lambda name, train: loaded,
             "features_of": lambda net, images: torch.zeros(len(images), 128),
             "train_classifier": lambda *args: seen.extend(args) or nb.Classifier(3)}
    exec(source, world)
    assert seen[0].tolist() == seen[1].tolist() == list(range(50))


STARTUP = """
import json
from torchvision.datasets import CIFAR10
for name, value in json.loads({!r}).items():
    setattr(CIFAR10, name, value)
"""
LAST = """
print("final", *(list(x.shape) for x in (
    drawn["live, random labels"][0], edited[0], guess, broken["horizontal flip"]["x"])))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The pixel notebook, run from top to bottom with one word changed."""
    folder = tmp_path_factory.mktemp("cifar")
    made = Made(folder / "assets/data", 12_000, 2000)
    for file in (made.root / FOLDER).iterdir():
        file.unlink()  # it finds the archive only
    startup = folder / "ipython/profile_default/startup"
    startup.mkdir(parents=True)
    (startup / "md5s.py").write_text(STARTUP.format(json.dumps(made.expected)))
    book = nbformat.read(ROOT / "diffusion_tutorial.ipynb", as_version=4)
    book.cells.append(nbformat.v4.new_code_cell(LAST))
    nbformat.write(book, folder / "book.ipynb")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        return {cell.id: cell for cell in code_cells(run(
            folder / "book.ipynb", folder, words=dict([WORD])))}


def shown(cell):
    """All that a cell printed."""
    return "".join(out.get("text", "") for out in cell.outputs)


def in_colour(content):
    """The share of pixels whose three colours differ."""
    picture = decoded(content)
    return (picture.max(-1) - picture.min(-1) > 8).mean()


def test_whole_notebook_by_one_word(whole):
    text = "".join(map(shown, whole.values()))
    assert "CIFAR10, profile smoke" in text and "trained here" in text
    assert "There are no weights called cifar10 here" in text
    assert "7000 training and 5000 validation images, [3, 32, 32]" in text
    assert "(dog, horse, truck)" in text and "shoes" not in text and "nan" not in text
    final = re.search("^final (.*)$", text, re.M)[1]
    assert final == "[40, 3, 32, 32] [8, 3, 32, 32] [10, 3, 32, 32] [20, 3, 32, 32]"


def test_samples_are_drawn_in_colour_and_in_size(whole):
    pngs = {id: base64.b64decode(out.data["image/png"]) for id, cell in whole.items()
            for out in cell.outputs if "image/png" in out.get("data", {})}
    for id in ("load", "samples", "classes", "pairs", "few-run", "sketch", "break-pick"):
        assert in_colour(pngs[id]) > 0.3, id
    gif = whole["strip-reverse"].outputs[-1].data["image/gif"]
    assert decoded(base64.b64decode(gif)).shape == (2 * 33 + 1, 5 * 33 + 1, 3)
    sizes = {"frames": (3, 3), "ddpm-ddim": (1, 10), "guide-run": (10, 3), "sketch": (2, 4)}
    for id, (rows, columns) in sizes.items():
        page = next(out.data["text/html"] for out in whole[id].outputs
                    if "base64" in out.get("data", {}).get("text/html", ""))
        frame = base64.b64decode(re.findall("base64,([^\"]+)", page)[-1])
        assert decoded(frame).shape == (33 * rows + 1, 33 * columns + 1, 3), id
        assert in_colour(frame) > 0.3, id
    assert "aspect-ratio:100/33;" in "".join(
        out.get("data", {}).get("text/html", "") for out in whole["guide-run"].outputs)


def test_the_latent_notebook_says_that_it_is_for_grey_pictures(tmp_path):
    with pytest.raises(CellExecutionError, match='write one of "MNIST", "Fashion') as stopped:
        run(ROOT / "latent_diffusion_cab.ipynb", tmp_path,
            words={'DATASET = "MNIST"': 'DATASET = "CIFAR10"'})
    assert str(stopped.value).count("Traceback") == 0
    assert not (tmp_path / "assets").exists(), "it must not begin to download"

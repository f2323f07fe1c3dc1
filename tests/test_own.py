"""Known data sets, and folders of pictures that the test draws, become tensors."""
import gzip
import types

import pytest
import torch
from PIL import Image, ImageDraw
from conftest import ROOT

COLOURS = {"circle": (220, 40, 40), "square": (40, 180, 60), "triangle": (50, 70, 220)}


def draw_shapes(folder, count, side=64):
    """count pictures of each shape in its colour on white, one subfolder for each."""
    place = torch.Generator().manual_seed(0)
    for (name, colour), corners in zip(COLOURS.items(), (40, 4, 3)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            size, x, y = torch.rand(3, generator=place).tolist()
            radius = side * (0.15 + 0.12 * size)
            x, y = (radius + u * (side - 2 * radius) for u in (x, y))
            picture = Image.new("RGB", (side, side), "white")
            ImageDraw.Draw(picture).regular_polygon((x, y, radius), corners, fill=colour)
            picture.save(folder / name / f"{i:03}.png")
    return folder


@pytest.mark.parametrize("name", ("MNIST", "FashionMNIST"))
def test_known_data_sets_load_from_the_repository_and_fill_the_range(nb, name):
    for train, count in ((True, 60_000), (False, 10_000)):
        x, y, classes = nb.load_data(name, train)
        assert x.shape == (count, 1, 28, 28) and x.dtype == torch.uint8
        assert len(classes) == 10 and set(y.tolist()) == set(range(10))
        assert nb.scale(x[:1000]).min() == -1 and nb.scale(x[:1000]).max() == 1
    raw = gzip.open(ROOT / f"assets/data/{name}/raw/t10k-labels-idx1-ubyte.gz").read()
    assert y.tolist() == list(raw[8:])


def test_cifar_has_its_colours_first(nb, monkeypatch):
    pixels = torch.arange(5 * 32 * 32 * 3).view(5, 32, 32, 3).byte()
    monkeypatch.setattr(nb.datasets, "CIFAR10", lambda *args, **kwargs: types.SimpleNamespace(
        data=pixels.numpy(), targets=[0, 1, 2, 3, 4], classes=["a", "b", "c", "d", "e"]))
    x, y, classes = nb.load_data("CIFAR10")
    assert x.shape == (5, 3, 32, 32) and torch.equal(x[3, :, 7, 9], pixels[3, 7, 9])
    assert y.tolist() == [0, 1, 2, 3, 4] and classes[4] == "e"


def test_a_folder_with_subfolders(nb, tmp_path, capsys):
    folder = draw_shapes(tmp_path / "shapes", 40)
    (x, y, classes), (x_test, y_test, _) = (nb.load_data(str(folder), t) for t in (True, False))
    assert classes == ["circle", "square", "triangle"] and x.dtype == torch.uint8
    assert x.shape == (108, 3, 32, 32) and x_test.shape == (12, 3, 32, 32)
    for pictures, labels in ((x, y), (x_test, y_test)):
        for name, colour in enumerate(COLOURS.values()):  # the darkest pixel is the shape
            own = pictures[labels == name].flatten(2).float()
            middle = own.gather(2, own.sum(1, keepdim=True).argmin(2, keepdim=True)
                                .expand(-1, 3, -1))
            assert (middle[..., 0] - torch.tensor(colour)).abs().max() < 40
    assert torch.equal(x, nb.load_data(str(folder))[0]), "the same split each time"
    both = torch.cat([x, x_test]).flatten(1)
    assert len(both.unique(dim=0)) == 120, "no picture is in both parts"
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("side", (28, 32, 64))
def test_any_size_any_mode_and_what_is_no_picture(nb, tmp_path, capsys, side):
    folder = tmp_path / "mixed"
    (folder / "deep/er").mkdir(parents=True)
    half = Image.new("L", (90, 30), 10)
    half.paste(250, (45, 0, 90, 30))
    for i in range(12):
        half.resize((40 + 7 * i, 20 + 3 * i)).save(folder / f"grey{i}.jpg")
    Image.new("RGBA", (50, 50), (0, 0, 0, 0)).save(folder / "clear.png")
    Image.new("P", (50, 80)).save(folder / "deep/palette.gif")
    Image.new("1", (20, 20), 1).save(folder / "deep/er/bits.png")
    (folder / "notes.txt").write_text("no picture")
    (folder / "broken.png").write_bytes((folder / "clear.png").read_bytes()[:40])
    x, y, classes = nb.load_folder(folder, True, side)
    assert x.shape == (14, 1, side, side), "all are grey: one channel"
    assert classes == ["deep", "mixed"] and x.max() > 200 and x.min() < 60
    said = capsys.readouterr().out
    assert "notes.txt" in said and "broken.png" in said and "clear.png" not in said
    assert "15 pictures" in said  # too few
    Image.new("RGB", (40, 40), "red").save(folder / "red.png")
    assert nb.load_folder(folder, True, side)[0].shape[1] == 3


def test_folders_that_cannot_be_used_are_named(nb, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "missing"):
        with pytest.raises(ValueError, match=name):
            nb.load_data(str(tmp_path / name))

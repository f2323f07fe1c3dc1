"""Loading the data, and what the reader sees when the data are not as they should be."""
import os
import shutil
import socket

import pytest
import torch
from conftest import ROOT

DATA = ROOT / "assets/data"


@pytest.fixture
def packed(tmp_path):
    """A copy of the packed MNIST test and training files."""
    raw = tmp_path / "data/MNIST/raw"
    raw.mkdir(parents=True)
    for file in (DATA / "MNIST/raw").glob("*.gz"):
        shutil.copy(file, raw)
    return raw


@pytest.fixture
def offline(monkeypatch):
    """No network: every connection fails at once."""
    def refuse(*args, **kwargs):
        raise OSError("Network is unreachable")
    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("name", ("MNIST", "FashionMNIST"))
def test_both_data_sets_load_and_fill_the_range(nb, name, offline, monkeypatch):
    monkeypatch.chdir(ROOT)
    train, test = nb.load_images(name, train=True), nb.load_images(name, train=False)
    assert train.data.shape == (60_000, 28, 28) and test.data.shape == (10_000, 28, 28)
    assert train.data.dtype == torch.uint8 and set(train.targets.tolist()) == set(range(10))
    x = nb.to_float(test.data)
    assert x.shape == (10_000, 1, 28, 28) and x.min() == -1 and x.max() == 1
    assert torch.equal(nb.to_float(x), x), "floats, like codes, stay as they are"


def test_colour_images_keep_their_channels(nb):
    assert nb.to_float(torch.zeros(2, 3, 32, 32, dtype=torch.uint8)).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("name", ("mnist", "CIFAR100", "", "Fashion-MNIST"))
def test_unknown_names_get_one_sentence(nb, name):
    with pytest.raises(nb.ReaderError, match='write "FashionMNIST", "MNIST" or "CIFAR10"'):
        nb.load_images(name, train=True)


def test_no_files_and_no_network(nb, tmp_path, offline, capsys):
    with pytest.raises(nb.ReaderError, match="connect to the network"):
        nb.load_images("MNIST", True, str(tmp_path))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("harm", ("cut", "flip"))
def test_damaged_packed_file(nb, packed, offline, harm):
    file = packed / "train-images-idx3-ubyte.gz"
    content = bytearray(file.read_bytes())
    content[5000] ^= 255
    file.write_bytes(content if harm == "flip" else content[:4000])
    with pytest.raises(nb.ReaderError, match="neither whole"):
        nb.load_images("MNIST", True, str(packed.parent.parent))


@pytest.mark.parametrize("harm", ("cut", "flip", "empty"))
def test_damaged_unpacked_file(nb, packed, offline, harm):
    root = str(packed.parent.parent)
    nb.load_images("MNIST", True, root)
    file = packed / "train-images-idx3-ubyte"
    content = bytearray(file.read_bytes())
    content[5000] ^= 255
    file.write_bytes({"flip": content, "cut": content[:4000], "empty": b""}[harm])
    with pytest.raises(nb.ReaderError, match="delete it and run this cell again"):
        nb.load_images("MNIST", True, root)
    file.unlink()  # the sentence's advice works
    assert len(nb.load_images("MNIST", True, root).data) == 60_000


def test_read_only_folder_is_copied(nb, packed, offline, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # as root all is writable
    found = nb.load_images("MNIST", False, str(packed.parent.parent))
    assert len(found.data) == 10_000 and (tmp_path / "runs/data/MNIST/raw").is_dir()
    assert not list(packed.glob("*-ubyte"))


def test_timeout_is_restored(nb, tmp_path, offline):
    with pytest.raises(nb.ReaderError):
        nb.load_images("MNIST", True, str(tmp_path))
    assert socket.getdefaulttimeout() is None


def test_a_mistake_is_shown_without_traceback(nb):
    assert nb.ReaderError("say this")._render_traceback_() == ["Stopped: say this"]
    nb.check(True, "never")

"""Both notebooks from top to bottom on a device that this machine lacks.

A kernel is told that there is an Apple GPU, the strictest of the devices: tensors that should
lie on it are tensors here with a mark, and each call of PyTorch is refused that mixes marked
and unmarked ones, makes a float64 there, or gives BatchNorm a tensor in channels_last.
"""
import functools
import os
import re
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parent.parent
AWAY, HERE = torch.device("mps"), torch.device("cpu")
Tensor = torch.Tensor
SPANNING = {Tensor.copy_, Tensor.to, Tensor.type_as, Tensor.data.__set__}
TO_HERE = {Tensor.cpu, Tensor.item, Tensor.tolist, Tensor.__float__, Tensor.__int__,
           Tensor.__bool__, Tensor.__repr__, Tensor.__format__}
PLAIN = {Tensor.shape.__get__, Tensor.dtype.__get__, Tensor.ndim.__get__,  # no tensor comes out
         Tensor.requires_grad.__get__, Tensor.is_leaf.__get__, Tensor.layout.__get__}


def is_away(value):
    """True for a tensor that plays to lie on the other device."""
    return getattr(value, "_away", False) is True


def marked(value, away):
    """The value, its tensors marked or not."""
    for tensor in tree_leaves(value):
        if isinstance(tensor, Tensor):
            if away and tensor.dtype == torch.float64:
                raise TypeError("this device has no float64")
            tensor._away = away
    return value


class Generator(torch.Generator):
    """A torch.Generator that may play to be on the other device."""

    def __new__(cls, device="cpu"):
        made = super().__new__(cls)
        made._away = str(device).startswith(AWAY.type)
        return made


class Second(TorchFunctionMode):
    """Refuse what a second device would refuse."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in PLAIN:  # most calls: the checked hints ask for shapes
            return func(*args)
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", str(func))
        if func is torch.device or name == "_parse_to":
            return func(*args, **kwargs)
        if func == Tensor.device.__get__:
            return AWAY if is_away(args[0]) else HERE
        if func == Tensor.data.__set__:
            args[0]._away = is_away(args[1])
            return func(*args)
        if func in (Tensor.numpy, Tensor.__array__) and is_away(args[0]):
            raise TypeError(f"{name} of a tensor on the other device: copy it first")
        wanted = self.wanted(func, args, kwargs)
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        away = any(map(is_away, tensors))
        self.check(func, name, args, tensors, away)
        generator = kwargs.get("generator")
        if wanted is None:
            wanted = away and func not in TO_HERE
            if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
                wanted = is_away(args[1])
        if generator is not None and is_away(generator) != wanted:
            raise RuntimeError(f"{name}: the generator is on another device")
        args, kwargs = self.without_device(args, kwargs)
        out = func(*args, **kwargs)
        if isinstance(out, Tensor) and out is tensors[0] if tensors else False:
            if is_away(out) == wanted or name.endswith("_") or func is Tensor.requires_grad_:
                return out
            out = out.clone()  # another device has another tensor
        return marked(out, wanted)

    @staticmethod
    def wanted(func, args, kwargs):
        """Whether a device in the arguments is the other one; None: there is none."""
        named = [kwargs.get("device"), *(args[1:] if func is Tensor.to else ())]
        for value in named:
            if isinstance(value, (str, torch.device)) and value is not None:
                return torch.device(value).type == AWAY.type
        return None

    @staticmethod
    def without_device(args, kwargs):
        """The arguments with this machine's device in place of the other."""
        def real(value):
            return HERE if isinstance(value, torch.device) and value == AWAY else value
        return tuple(map(real, args)), {key: real(value) for key, value in kwargs.items()}

    @staticmethod
    def check(func, name, args, tensors, away):
        """Refuse a mixture; a number may come from the CPU, and so may an index."""
        if "batch_norm" in name and away and args[0].ndim == 4:
            x = args[0]
            if x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous():
                raise RuntimeError("BatchNorm in channels_last is wrong on this device")
        inner = name.startswith("_") and not name.startswith(("__", "_foreach", "_fused"))
        if not away or inner or func in SPANNING or (
                func == Tensor.__getitem__ and is_away(args[0])):
            return
        whole = [t for t in tensors if t.ndim or name in ("cat", "stack")]
        if not all(map(is_away, whole)):
            raise RuntimeError(f"{name}: tensors of two devices, "
                               f"{[(list(t.shape), is_away(t)) for t in tensors]}")


def play():
    """From here on this process has the other device."""
    make = torch.Tensor._make_subclass

    @functools.wraps(make)
    def marking(cls, data, *rest):
        made = make(cls, data, *rest)
        made._away = is_away(data)
        return made

    torch.Tensor._make_subclass = staticmethod(marking)
    torch.Generator = Generator
    torch.backends.mps.is_macos_or_newer = lambda major, minor: True  # older PyTorch asks
    Second().__enter__()


# The mistake that once stopped the latent notebook, as it counted arithmetic, on every GPU.
MIXTURE = """
print(device)
try:
    multiply_adds(lambda: run.net(torch.zeros(1, *code_shape), torch.ones(1).long()))
except RuntimeError as error:
    print("refused:", error)
"""


@pytest.mark.parametrize("name", ("diffusion_tutorial", "latent_diffusion_cab"))
def test_no_cell_mixes_devices(name, tmp_path):
    (tmp_path / "assets").symlink_to(ROOT / "assets")
    book = nbformat.read(ROOT / f"{name}.ipynb", as_version=4)
    for cell in book.cells:
        cell.source = cell.source.replace("torch.backends.mps.is_available()", "True")
    start = f"import sys; sys.path.insert(0, {str(ROOT / 'tests')!r}); import test_device"
    book.cells.insert(0, nbformat.v4.new_code_cell(start + "; test_device.play()"))
    if name.startswith("latent"):
        book.cells.append(nbformat.v4.new_code_cell(MIXTURE))
    NotebookClient(book, timeout=900, startup_timeout=300,
                   resources={"metadata": {"path": str(tmp_path)}}
                   ).execute(env={**os.environ, "DIFFUSION_PROFILE": "smoke"})
    outputs = [out for cell in book.cells for out in cell.get("outputs", ())]
    text = "".join(out.get("text", "") for out in outputs)  # print may come in pieces
    assert "mps" in text
    assert name[0] == "d" or re.search("refused: .*: tensors of two", text)

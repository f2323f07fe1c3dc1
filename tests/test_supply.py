"""What the notebooks may not do, and weights that are what they claim to be.

That no port is opened and nothing is written elsewhere is asked of a real kernel, in
test_kernel.py; files by strangers in test_faults.py.
"""
import ast
import hashlib
import json
import re

import nbformat
import pytest
import torch
from conftest import ROOT

NOTEBOOKS = sorted(path.name for path in ROOT.glob("*.ipynb"))
MODULES = {"pickle", "cPickle", "dill", "marshal", "shelve", "joblib", "subprocess", "pty",
           "commands", "ctypes", "code", "runpy", "multiprocessing", "socketserver", "ftplib"}
CALLS = {"eval", "exec", "compile", "__import__", "execfile", "breakpoint", "input"}
METHODS = {"system", "popen", "spawnl", "spawnv", "fork", "execv", "execl", "run_cell",
           "run_line_magic", "system_raw", "getoutput", "check_output", "Popen", "load_module",
           "bind", "listen", "create_server", "serve_forever", "load_state_dict_from_url"}
PIP = '[sys.executable, "-m", "pip", "install", "-q", *missing]'


def findings(source, guarded=False):
    """What in a cell may not be there."""
    found = []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [a.name for a in node.names] + [getattr(node, "module", None) or ""]
            found += [name for name in names if name.split(".")[0] in MODULES]
        if isinstance(node, ast.Call):
            called = node.func
            if any(word.arg == "shell" for word in node.keywords):
                found.append("shell")
            if isinstance(called, ast.Name) and called.id in CALLS:
                found.append(called.id)
            if isinstance(called, ast.Attribute):
                if called.attr in METHODS:
                    found.append(called.attr)
                if called.attr == "load" and not any(
                        word.arg == "weights_only" and getattr(word.value, "value", 0) is True
                        for word in node.keywords) and ast.unparse(called.value) != "json":
                    found.append(ast.unparse(called))
    return found


def code_of(name):
    """The code cells of a notebook, by id."""
    cells = nbformat.read(ROOT / name, as_version=4).cells
    return {cell.id: cell.source for cell in cells if cell.cell_type == "code"}


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_no_eval_no_pickle_no_shell(name):
    """But for one guarded installation by pip, in Colab."""
    for id, source in code_of(name).items():
        assert not re.search(r"^\s*[!%]", source, re.M), f"{id}: shell or magic"
        found = findings(source)
        assert found == (["subprocess"] if id == "install" else []), id


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_the_installation_is_guarded(name):
    """Only in Colab, only what is missing, without a shell, from a fixed list of names."""
    tree = ast.parse(code_of(name)["install"])
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)
             and ast.unparse(node.func).startswith("subprocess")]
    guards = [node for node in tree.body if isinstance(node, ast.If)]
    assert len(calls) == 1 and ast.unparse(calls[0].args[0]) == PIP.replace('"', "'")
    assert [ast.unparse(guard.test) for guard in guards] == [
        "missing and 'google.colab' in sys.modules"]
    assert calls[0] in ast.walk(guards[0].body[0])


@pytest.mark.parametrize("bad", (
    "eval('1')", "import pickle", "from pickle import loads", "os.system('ls')",
    "subprocess.Popen(['ls'])", "import subprocess as s", "f(x, shell=True)",
    "torch.load('x')", "torch.load('x', weights_only=False)", "socket.bind(('', 80))",
    "exec(code)", "torch.hub.load('a', 'b')", "import joblib"))
def test_the_check_finds(bad):
    assert findings(bad)


def test_all_shipped_weights_have_their_sha256(nb):
    files = sorted((ROOT / "assets/weights").glob("*.pt"))
    assert len(files) >= 6
    for file in files:
        facts = json.loads(file.with_suffix(".json").read_text())
        assert facts["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        assert nb.read_checkpoint(file)  # tensors, numbers and strings only


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_files_are_read_by_read_checkpoint_only(name):
    """torch.load stands once: behind the checks."""
    sources = "\n".join(code_of(name).values())
    assert sources.count("torch.load(") == 1
    assert "weights_only=True" in sources


@pytest.mark.parametrize("swap", (True, False))
def test_other_weights_are_refused(nb, tmp_path, swap):
    """A whole file that loads, with another sha256 than its JSON says, or with none."""
    path = tmp_path / "weights/mnist.pt"
    path.parent.mkdir()
    torch.save({"config": "{}", "ema": {}}, path)
    if swap:
        path.with_suffix(".json").write_bytes((ROOT / "assets/weights/mnist.json").read_bytes())
    with pytest.raises(nb.ReaderError, match="differs from the sha256 in mnist.json: fetch both"
                       " again" if swap else "mnist.json is missing or damaged: fetch it"):
        nb.read_checkpoint(path)

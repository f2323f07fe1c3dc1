"""Whole notebooks in real kernels, as a restless reader and a patient one run them.

The restless reader interrupts every long cell, runs it again, and runs every cell twice; an
audit hook in that kernel notes what is written and which ports are opened. The patient one
works in another kernel and folder: another data set first, then, by changing the word, the
same one. What both get must be equal to the last bit. Both notebooks, profile smoke, one
thread, on the first 20,000 training and 2,500 test images of the real files.
"""
import gzip
import os
import re
import shutil
import struct
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import nbformat
import pytest
from conftest import ROOT, is_definition
from jupyter_client import KernelManager

HOOK = """
import os, sys
log = os.open(os.environ["AUDIT_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
OTHERS = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink",
          "os.truncate", "os.chmod", "os.utime", "sqlite3.connect", "shutil.copyfile")
PROCESSES = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork",
             "pty.spawn")

def note(event, args):
    if event == "open" and isinstance(args[2], int) and args[2] & WRITES and not isinstance(
            args[0], int):
        found = ["write", os.path.abspath(os.fsdecode(args[0]))]
    elif event in OTHERS:
        place = args[1] if event in ("os.rename", "shutil.copyfile") else args[0]
        if isinstance(place, int):
            return
        found = ["write", os.path.abspath(os.fsdecode(place))]
    elif event in PROCESSES:
        found = ["process", str(args[:2])]
    elif event in ("socket.bind", "socket.connect") and isinstance(args[1], tuple):
        found = [event, str(args[1])]
    else:
        return
    os.write(log, ("\\t".join(found).replace("\\n", " ") + "\\n").encode())

sys.addaudithook(note)
"""
STATES = ("import hashlib as _h\nprint(*(_h.sha256(b''.join(p.detach().numpy().tobytes() for p"
          " in part.parameters())).hexdigest() for part in (%s)), _h.sha256(%s.numpy()"
          ".tobytes()).hexdigest())")


class Book:
    """A notebook, and what in it is long; id: what must have been shown before Stop."""

    def __init__(self, name, own, other, first, second, early, states, long):
        cells = nbformat.read(ROOT / f"{name}.ipynb", as_version=4).cells
        self.code = {cell.id: cell.source for cell in cells if cell.cell_type == "code"}
        self.name, self.own, self.other, self.long = name, own, other, long
        self.first, self.second, self.early, self.states = first, second, early, states


BOOKS = {
    "pixels": Book(
        "diffusion_tutorial", "FashionMNIST", "MNIST",
        ["choose", "load", "forward-check", "load-show", "train", "samples"],
        ["classifier", "calibrate", "judge-run", "spacing-fig", "few-run", "few-fid"],
        "guide-measure", STATES % ("state.model, state.ema", "x"),
        {"naive-train": "", "ideal-run": "", "load-show": "", "train": "steps are done",
         "classifier": "", "mlp": "", "ladder-run": "", "few-fid": "calls", "limits": "",
         "guide-measure": "", "break-run": "calls", "break-train-run": "excess"}),
    "latents": Book(
        "latent_diffusion_cab", "MNIST", "FashionMNIST",
        ["choose", "load", "yardstick", "pca", "plan", "autoencoder-train", "judge-run",
         "scale", "codes", "train", "samples"], ["wrong-run"],
        "against-run",
        STATES % ("ae_state.model, coder, state.model, state.ema", "drawn['live'][0]"),
        {"autoencoder-train": "minutes", "yardstick": "", "judge-run": "", "tsne": "",
         "train": "minutes", "wrong-run": "", "ablation-run": "", "shapes": ""})}


def small_data(folder, name):
    """The first images of a data set, as torchvision keeps it, packed and unpacked."""
    raw = folder / f"assets/data/{name}/raw"
    raw.mkdir(parents=True)
    for kind, count, size in (("train", 20_000, 28 * 28), ("t10k", 2500, 28 * 28)):
        for what, each in (("images-idx3", size), ("labels-idx1", 1)):
            whole = gzip.decompress((ROOT / f"assets/data/{name}/raw" / (
                file := f"{kind}-{what}-ubyte.gz")).read_bytes())
            head = 16 if each > 1 else 8
            part = whole[:4] + struct.pack(">I", count) + whole[8:head + count * each]
            (raw / file).write_bytes(gzip.compress(part, 1))
            (raw / file[:-3]).write_bytes(part)


class Kernel:
    """A real kernel without TCP, in a folder of its own, with the audit hook."""

    def __init__(self, base):
        self.base, self.home = base, base / "work"
        for name in ("work", "home", "hook", "temp"):
            (base / name).mkdir(parents=True)
        (base / "hook/sitecustomize.py").write_text(HOOK)
        for name in ("weights", "results"):
            shutil.copytree(ROOT / "assets" / name, self.home / "assets" / name)
        for name in ("MNIST", "FashionMNIST"):
            small_data(self.home, name)
        env = {**os.environ, "DIFFUSION_PROFILE": "smoke", "OMP_NUM_THREADS": "1",
               "PYTHONPATH": str(base / "hook"), "AUDIT_LOG": str(base / "log"),
               "HOME": str(base / "home"), "TMPDIR": str(base / "temp"),
               "PYTHONDONTWRITEBYTECODE": "1",
               **{f"{name}_proxy": "http://127.0.0.1:9" for name in ("http", "https")}}
        env.pop("TORCHINDUCTOR_CACHE_DIR", None)  # PyTorch sets it here, on some imports
        self.sockets = tempfile.mkdtemp(prefix="k", dir="/tmp")  # their paths must be short
        self.manager = KernelManager(transport="ipc", ip=f"{self.sockets}/s")
        self.manager.connection_file = f"{self.sockets}/c.json"
        self.manager.start_kernel(env=env, cwd=str(self.home))
        self.client = self.manager.blocking_client()
        self.client.start_channels()
        self.client.wait_for_ready(timeout=120)
        self.seen = {}  # id of a cell: what its runs showed
        self.own_ports = self.listening()  # Jupyter's, for its debugger

    def run(self, code, stop_at=None):
        """Execute; returns (what ended it or "", text). stop_at: text to interrupt after."""
        asked, text, ended, stopped = self.client.execute(code), "", "", stop_at is None
        started = time.monotonic()
        while True:
            if not stopped and stop_at in text and time.monotonic() - started > 0.3:
                self.manager.interrupt_kernel()
                stopped = True
            try:
                message = self.client.get_iopub_msg(timeout=0.02 if not stopped else 240)
            except Exception:  # Empty
                assert time.monotonic() - started < 240, f"hangs: {code[:200]}"
                continue
            if message["parent_header"].get("msg_id") != asked:
                continue
            kind, content = message["msg_type"], message["content"]
            if kind == "stream":
                text += content["text"]
            elif kind == "error":
                ended = content["ename"]
                text += "\n".join(content["traceback"])
            elif kind == "status" and content["execution_state"] == "idle":
                return ended, text

    def cell(self, book, id, change=("", "")):
        """Run a cell, which must not fail."""
        ended, text = self.run(book.code[id].replace(*change))
        assert not ended, f"{book.name}, {id}: {text}"
        self.seen.setdefault(id, []).append(text)

    def listening(self):
        """TCP ports on which the kernel's process listens."""
        process = Path("/proc", str(self.manager.provisioner.process.pid))
        own = {os.readlink(path) for path in (process / "fd").iterdir() if path.exists()}
        rows = [line.split() for kind in ("tcp", "tcp6") for line in
                (process / "net" / kind).read_text().splitlines()[1:]]
        return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in own]

    def close(self):
        """End the kernel."""
        self.client.stop_channels()
        self.manager.shutdown_kernel(now=True)
        shutil.rmtree(self.sockets, ignore_errors=True)


def restless(book, base):
    """Everything twice, long cells interrupted first. Returns what was found."""
    kernel, stopped = Kernel(base), {}
    try:
        for id, source in book.code.items():
            if id in book.long:
                stopped[id] = kernel.run(source, book.long[id])
            for _ in range(2):
                kernel.cell(book, id)
            if id == "samples":
                states = kernel.run(book.states)[1]
        return {"seen": kernel.seen, "stopped": stopped, "states": states,
                "ports": set(kernel.listening()) - set(kernel.own_ports),
                "log": (base / "log").read_text().splitlines()}
    finally:
        kernel.close()


def patient(book, base):
    """The other data set, then by one word the same as the restless one."""
    kernel = Kernel(base)
    word = f'DATASET = "{book.own}"'
    try:
        (kernel.home / f"assets/weights/classifier-{book.other.lower()}.pt").unlink()
        for id, source in book.code.items():
            if is_definition(source) or id == "install":
                kernel.cell(book, id)
        early = {}
        for turn in (book.other, book.own):
            for id in book.first + book.second:
                if id in ("classifier", "yardstick") and turn == book.other:
                    early["later part"] = kernel.run(book.code[book.early])
                    early["training"] = kernel.run(book.code[id], "")
                kernel.cell(book, id, (word, f'DATASET = "{turn}"'))
                if id == "samples":
                    states = kernel.run(book.states)[1]
        return {"seen": kernel.seen, "early": early, "states": states}
    finally:
        kernel.close()


@pytest.fixture(scope="session")
def found(tmp_path_factory):
    """What all four kernels found; both notebooks at once."""
    jobs = [(kind, reader) for kind in BOOKS for reader in (restless, patient)]
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(reader, BOOKS[kind], tmp_path_factory.mktemp(
            f"{kind}-{reader.__name__}")) for kind, reader in jobs]
        return {(kind, reader.__name__): run.result()
                for (kind, reader), run in zip(jobs, runs)}


@pytest.fixture(params=BOOKS)
def pair(request, found):
    """(notebook, what the restless and the patient reader found)."""
    return (BOOKS[request.param], found[request.param, "restless"],
            found[request.param, "patient"])


def timeless(text):
    """Shown text without what depends on the clock, and without notes on a resume."""
    kept = [line for line in text.splitlines() if "read from" not in line]
    return re.sub(r"[\d.]+(?= (?:ms|minutes|seconds|s\b))", "-", "\n".join(kept))


def test_interrupted_cells_can_be_run_again(pair):
    """Every long cell was stopped by a real SIGINT, and its later runs show the same."""
    book, restless, _ = pair
    hit = {id for id, (ended, text) in restless["stopped"].items()
           if ended == "KeyboardInterrupt" or "Stopped at step" in text}
    assert {ended for ended, _ in restless["stopped"].values()} <= {"KeyboardInterrupt", ""}
    assert len(hit) >= 0.8 * len(book.long), set(book.long) - hit
    assert hit & {"train", "autoencoder-train"}
    for id in ("classifier", "yardstick", "few-fid", "guide-measure", "judge-run", "mlp"):
        if id in book.long:
            first, second = restless["seen"][id]
            assert timeless(first) == timeless(second), id


def test_all_cells_can_be_run_twice(pair):
    book, restless, _ = pair
    assert restless["seen"].keys() == book.code.keys()
    assert all(len(runs) == 2 for runs in restless["seen"].values())


def test_the_same_bits_after_interrupts_and_in_a_new_kernel(pair):
    """Weights, averages and samples; the patient reader had another data set before."""
    _, restless, patient = pair
    assert len(restless["states"].split()) >= 3
    assert restless["states"] == patient["states"]


def test_nothing_is_left_of_another_data_set(pair):
    """What is shown after changing the word is what a reader sees who never changed it."""
    book, restless, patient = pair
    for id in book.first + book.second:
        if id in ("choose", "train", "autoencoder-train", "samples", "forward-check",
                  "few-run"):  # these print times, or draw without a seed of their own
            continue
        assert timeless(patient["seen"][id][1]) == timeless(restless["seen"][id][-1]), id
    shown = "\n".join(runs[1] for id, runs in patient["seen"].items() if len(runs) > 1)
    if book.own == "MNIST":
        assert "mnist" in shown.lower() and "fashion" not in shown.lower()
    else:
        assert "mnist" not in shown.lower().replace("fashionmnist", "")


def test_a_cell_before_its_time_names_what_is_missing(pair):
    _, _, patient = pair
    assert patient["early"]["later part"][0] == "NameError"  # and all later cells went well
    ended, text = patient["early"]["training"]  # of the classifier; then it was run again
    assert ended == "KeyboardInterrupt" and "train_classifier" in text


def test_no_port_is_opened_and_no_process_started(pair):
    _, restless, _ = pair
    assert not restless["ports"]
    other = {line for line in restless["log"] if not line.startswith("write")}
    by_libraries = "uname|fc-list|ldconfig|lsb_release"  # fonts, and where libraries lie
    assert not {line for line in other if not re.match(
        rf"process\t\('(/sbin/)?({by_libraries})'", line)}


def test_nothing_is_written_outside(pair, tmp_path_factory):
    """Only in runs/, and in the temporary folder; Jupyter and Matplotlib keep their own."""
    _, restless, _ = pair
    base = tmp_path_factory.getbasetemp()
    places = {re.sub(rf"{base}/\w+-restless\d+/", "", line.split("\t")[1])
              for line in restless["log"] if line.startswith("write")}
    assert any(place.startswith("work/runs/") for place in places)
    outside = [place for place in places if not re.match(
        r"work/runs(/|$)|temp/|home/\.ipython|home/\.(cache|config)(/matplotlib|$)|/dev/null$",
        place)]
    assert not outside, sorted(outside)[:20]


def test_the_hook_sees(tmp_path):
    """A file elsewhere, a port and a process do not escape the two tests above."""
    kernel = Kernel(tmp_path / "base")
    try:
        elsewhere = tmp_path / "elsewhere"
        for code in (f"open({str(elsewhere)!r}, 'w').close()",
                     "import socket; server = socket.create_server(('127.0.0.1', 0))",
                     "import os; status = os.system('true')"):
            assert kernel.run(code) == ("", "")
        log = (tmp_path / "base/log").read_text()
        assert f"write\t{elsewhere}\n" in log and "socket.bind" in log
        assert re.search("^process\t.*true", log, re.M)
        assert len(set(kernel.listening()) - set(kernel.own_ports)) == 1
    finally:
        kernel.close()


def test_words_of_this_file_exist():
    """The ids above are cells of the notebooks."""
    for book in BOOKS.values():
        assert {*book.first, *book.second, *book.long} <= book.code.keys()
        assert f'DATASET = "{book.own}"' in book.code["choose"]

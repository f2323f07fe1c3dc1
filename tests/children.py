"""A warm parent of short-lived processes: it loads PyTorch and both notebooks once, and forks.

Reads jobs from stdin, one JSON a line, and answers in a line. {"code", "book", "out"}: fork
a child that runs the code with the definitions of that notebook as `nb`; its output goes to
the file out, a mistake of the reader as Jupyter shows it; the answer is the child's number.
{"wait": number}: the answer is how it ended. The parent itself never trains: a fork after a
backward pass cannot train.
"""
import json
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
SETUP = """
import codecs, errno, os, resource, shutil, signal, socket, sys, time
from pathlib import Path
import torch
CPU = torch.device("cpu")
g = torch.Generator().manual_seed(0)
images = torch.randint(0, 256, (300, 28, 28), dtype=torch.uint8, generator=g)
codes = torch.randn(300, 4, 7, 7, generator=g)
labels = torch.arange(300) % 10


def setting(kind, **changes):
    '''The Config of a small training of this kind.'''
    made = nb.make_config("smoke", "MNIST")
    made = {"pixels": made} if kind == "pixels" else dict(zip(("autoencoder", "latents"), made))
    return nb.replace(made[kind], **{"steps": 24, "save_every": 3, **changes})


def training(kind, folder, cfg=None, watch=lambda state: None, data=None):
    '''Resume in folder and train to the end; returns the state.'''
    cfg, folder = cfg or setting(kind), Path(folder)
    if kind == "autoencoder":
        state = nb.State(cfg, 1, CPU, nb.Autoencoder)
        nb.resume(state, cfg, folder)
        nb.train_autoencoder(state, images if data is None else data, cfg, folder, watch)
        return state
    state = nb.State(cfg, 1, CPU) if kind == "pixels" else nb.State(cfg, 4, CPU, nb.LatentUNet)
    data = data if data is not None else images if kind == "pixels" else codes
    nb.resume(state, cfg, folder)
    nb.train(state, data, labels, nb.make_alpha_bar(cfg.schedule, cfg.T), cfg, folder, watch)
    return state


def a_watch(kind, folder, cfg):
    '''The notebook's own Watch for a training of this kind.'''
    if kind == "autoencoder":
        state = nb.State(cfg, 1, CPU, nb.Autoencoder)
        return nb.AutoencoderWatch(state, (images, labels), None, cfg, Path(folder))
    alpha_bar = nb.make_alpha_bar(cfg.schedule, cfg.T)
    return nb.Watch(nb.State(cfg, 1, CPU), (images, labels), alpha_bar, cfg, Path(folder))


def step_said(state):
    print("step", state.step, flush=True)


def as_nobody():
    '''A user who may write only where all may; root otherwise may write anywhere.'''
    if os.getuid() == 0:
        "".encode("idna")  # load now what lies where nobody may read: root's own Python
        codecs.encode(b"", "hex")
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
"""


def serve():
    """Load all, then fork for each job."""
    sys.path.insert(0, str(HERE))
    import torch
    from conftest import load_definitions
    from IPython.core.interactiveshell import InteractiveShell

    torch.set_num_threads(1)
    InteractiveShell.instance()  # else display() gives no handle to update
    spaces = {name: load_definitions(name).__dict__ for name in
              ("diffusion_tutorial", "latent_diffusion_cab")}
    print("warm", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        if "wait" in job:
            print(os.waitpid(job["wait"], 0)[1], flush=True)
            continue
        child = os.fork()
        if child == 0:
            run(job, spaces[job["book"]])
        print(child, flush=True)


def run(job, space):
    """The child: run the code and show what a reader would see. Never returns."""
    file = os.open(job["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number in (1, 2):
        os.dup2(file, number)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    status = 0
    try:
        class nb:
            """The notebook's definitions as attributes."""
        for name, value in space.items():
            if not name.startswith("__"):
                setattr(nb, name, staticmethod(value) if callable(value) and
                        not isinstance(value, type) else value)
        names = {"nb": nb}
        exec(compile(SETUP, "setup", "exec"), names)
        exec(compile(job["code"], "job", "exec"), names)
    except BaseException as error:
        status = 1
        if hasattr(error, "_render_traceback_"):
            print(*error._render_traceback_(), sep="\n")
        else:
            traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


class Child:
    """A running job."""

    def __init__(self, home, number, out):
        self.home, self.number, self.out = home, number, out

    def seen(self):
        """What it has shown so far."""
        return self.out.read_text() if self.out.exists() else ""

    def until(self, text, seconds=60):
        """Wait until it has shown text."""
        end = time.monotonic() + seconds
        while text not in self.seen():
            assert time.monotonic() < end and "Traceback" not in self.seen(), self.seen()
            time.sleep(0.002)

    def end(self):
        """Wait for its end; returns what it showed, which holds no traceback."""
        self.status = self.home.ask({"wait": self.number})
        assert "Traceback" not in self.seen(), self.seen()
        return self.seen()

    def kill(self):
        """SIGKILL; True if it was still running."""
        os.kill(self.number, 9)
        return self.home.ask({"wait": self.number}) == 9


class Home:
    """The warm parent, seen from a test."""

    def __init__(self, folder):
        self.folder, self.count = folder, 0
        env = {**os.environ, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg",
               "OMP_WAIT_POLICY": "PASSIVE"}  # waiting threads leave the cores to others
        self.process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL, text=True, cwd=folder, env=env)
        assert self.process.stdout.readline() == "warm\n"

    def ask(self, job):
        """Send one job; returns the answer, a number."""
        print(json.dumps(job), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline())

    def start(self, code, kind="pixels", folder=None):
        """Run code in a child in folder."""
        self.count += 1
        book = "diffusion_tutorial" if kind == "pixels" else "latent_diffusion_cab"
        out = self.folder / f"seen-{self.count}"
        code = f"os.chdir({str(folder or self.folder)!r})\nkind = {kind!r}\n{code}"
        return Child(self, self.ask({"code": code, "book": book, "out": str(out)}), out)

    def close(self):
        """End the parent."""
        self.process.stdin.close()
        self.process.wait()


if __name__ == "__main__":
    serve()

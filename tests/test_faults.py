"""Real faults in real processes: what the reader sees, and that nothing is lost.

Each child (see children.py) runs the notebooks' own definitions; what it shows is what a
reader would see. No fault may show a traceback (Child.end asserts it).
"""
import contextlib
import json
import os
import pickle
import random
import re
import shutil
import tempfile
import time
from pathlib import Path

import pytest
import torch
from children import Home
from conftest import ROOT
from test_training import same

KINDS = ("pixels", "autoencoder", "latents")
DATA = ROOT / "assets/data/MNIST/raw"
WEIGHTS = ROOT / "assets/weights"


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The warm parent of all children of this file."""
    home = Home(tmp_path_factory.mktemp("home"))
    yield home
    home.close()


@pytest.fixture(scope="module")
def undisturbed(home):
    """For each kind of training the checkpoint of a run without any fault."""
    found = {}
    for kind in KINDS:
        home.start("training(kind, f'straight-{kind}')", kind).end()
        found[kind] = content(home.folder / f"straight-{kind}")
        assert found[kind]["step"] == 24
    return found


def content(folder):
    """What the folder's checkpoint holds."""
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.fixture
def tmp_path():
    """An empty folder that other users may enter, too (pytest's own are closed to them)."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def packed(tmp_path):
    """A folder with the packed MNIST files in assets/data."""
    raw = tmp_path / "assets/data/MNIST/raw"
    raw.mkdir(parents=True)
    for file in DATA.glob("*.gz"):
        shutil.copy(file, raw)
    return raw


# 1. Kills

@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chance", range(2))
def test_killed_at_random(home, undisturbed, tmp_path, kind, chance):
    chance = random.Random(f"{kind} {chance}")
    child = home.start("training(kind, 'run', watch=step_said)", kind, tmp_path)
    child.until(f"step {chance.randint(1, 20)}\n")
    time.sleep(chance.random() * 0.03)
    assert child.kill(), "it had ended before the kill"
    saved = tmp_path / "run/checkpoint.pt"
    assert not saved.exists() or content(tmp_path / "run")["step"] % 3 == 0
    home.start("training(kind, 'run')", kind, tmp_path).end()
    assert same(content(tmp_path / "run"), undisturbed[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("moment", ("half written", "whole, not renamed"))
def test_killed_inside_a_save(home, undisturbed, tmp_path, kind, moment):
    code = """
real, saves = {"os.fsync": os.fsync, "os.replace": os.replace}, []

def hold(number):
    saves.append(number)
    if len(saves) == 4:
        if moment == "half written":
            os.truncate(number, os.fstat(number).st_size // 2)
        else:
            real["os.fsync"](number)
        print("inside", flush=True)
        time.sleep(60)
    real["os.fsync"](number)

os.fsync = hold
training(kind, "run", watch=step_said)
"""
    child = home.start(f"moment = {moment!r}{code}", kind, tmp_path)
    child.until("inside")
    assert child.kill() and "step 12" in child.seen() and "step 13" not in child.seen()
    spare = tmp_path / "run/checkpoint.tmp"
    whole = (tmp_path / "run/checkpoint.pt").stat().st_size
    assert spare.exists() and (spare.stat().st_size < 0.6 * whole) == (moment == "half written")
    assert content(tmp_path / "run")["step"] == 9
    home.start("training(kind, 'run')", kind, tmp_path).end()
    assert same(content(tmp_path / "run"), undisturbed[kind]) and not spare.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_with_as_many_threads(home, undisturbed, tmp_path, kind):
    """One thread, again: the same bits. Two threads, twice: the same, near those of one."""
    found = []
    for threads in (1, 2, 2):
        folder = f"run-{len(found)}"
        home.start(f"torch.set_num_threads({threads})\ntraining(kind, {folder!r})", kind,
                   tmp_path).end()
        found.append(content(tmp_path / folder))
    assert same(found[0], undisturbed[kind]) and same(found[1], found[2])
    torch.testing.assert_close(found[1]["losses"], found[0]["losses"], rtol=0.05, atol=0.0)


# 4. Truncated, and flipped bits

def harmed(whole, chance, harm):
    """The bytes, cut at a random place or with one random bit turned."""
    place = chance.randrange(len(whole))
    if harm == "cut":
        return whole[:place]
    harmed = bytearray(whole)
    harmed[place] ^= 1 << chance.randrange(8)
    return bytes(harmed)


@pytest.mark.parametrize("harm", ("cut", "flip"))
def test_harmed_checkpoints(nb, home, undisturbed, tmp_path, harm):
    """Refused, or the flip touched nothing that is read. PyTorch alone would accept most."""
    chance, path = random.Random(harm), tmp_path / "checkpoint.pt"
    whole = (home.folder / "straight-pixels/checkpoint.pt").read_bytes()
    refused = taken = 0
    for _ in range(60):
        path.write_bytes(harmed(whole, chance, harm))
        try:
            assert same(nb.read_checkpoint(path), undisturbed["pixels"])
        except nb.ReaderError as error:
            refused += 1
            assert re.fullmatch(rf"{path} cannot be read \(.+\): delete it and run this cell"
                                r" again\.", str(error))
            with contextlib.suppress(Exception):
                torch.load(path, weights_only=True)
                taken += 1
    assert refused == 60 if harm == "cut" else refused > 40
    assert taken == 0 if harm == "cut" else taken > 20  # why the checksums are looked at


def test_a_harmed_checkpoint_stops_before_anything_is_written(home, tmp_path):
    home.start("training(kind, 'run', setting(kind, steps=24))", "pixels", tmp_path).end()
    path = tmp_path / "run/checkpoint.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    seen = home.start("training(kind, 'run')", "pixels", tmp_path).end()
    assert re.fullmatch(r"Stopped: run/checkpoint.pt cannot be read \(.+\): delete it and run"
                        r" this cell again\.\n", seen)
    assert path.read_bytes() == content


@pytest.mark.parametrize("harm", ("cut", "flip"))
def test_harmed_unpacked_files(nb, packed, tmp_path, monkeypatch, harm):
    monkeypatch.chdir(tmp_path)
    nb.load_images("MNIST", True)
    files, chance = sorted(packed.glob("*-ubyte")), random.Random(harm)
    for turn in range(20):
        file = files[turn % 4]
        whole = file.read_bytes()
        file.write_bytes(harmed(whole, chance, harm))
        with pytest.raises(nb.ReaderError, match=f"^assets/data/MNIST/raw/{file.name} is"
                           " damaged: delete it and run this cell again.$"):
            nb.load_images("MNIST", True)
        file.write_bytes(whole)


@pytest.mark.parametrize("harm", ("cut", "flip"))
def test_harmed_packed_files(nb, packed, tmp_path, monkeypatch, harm):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(nb.datasets.MNIST, "mirrors", ["http://127.0.0.1:9/"])
    files, chance = sorted(packed.glob("*.gz")), random.Random(harm)
    for turn in range(20):
        whole = files[turn % 4].read_bytes()
        files[turn % 4].write_bytes(harmed(whole, chance, harm))
        with pytest.raises(nb.ReaderError, match="^MNIST is neither whole in assets/data nor"
                           " could it be downloaded"):
            nb.load_images("MNIST", True)
        files[turn % 4].write_bytes(whole)
        for file in packed.glob("*-ubyte"):
            file.unlink()


@pytest.fixture
def weights(tmp_path, monkeypatch):
    """A copy of the shipped weights and classifier, where the notebooks look for them."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(WEIGHTS, tmp_path / "assets/weights")
    return tmp_path / "assets/weights"


NAMES = ("mnist", "latent-mnist", "classifier-mnist")


@pytest.mark.parametrize("name", NAMES)
def test_harmed_weights(nb, weights, name):
    path, chance = weights / f"{name}.pt", random.Random(name)
    whole = path.read_bytes()
    for harm in 10 * ("cut", "flip"):
        path.write_bytes(harmed(whole, chance, harm))
        with pytest.raises(nb.ReaderError, match=f"{name}.pt differs from the sha256 in"
                           f" {name}.json: fetch both again.$"):
            nb.read_checkpoint(path)
    path.write_bytes(whole)
    assert nb.read_checkpoint(path)


@pytest.mark.parametrize("facts", (None, b"", b"{", b"[1]", b"7", b"\xff\xfe\x00", b"{}",
                                   b'{"sha256": 5}'))
def test_weights_with_missing_or_damaged_facts(nb, weights, facts):
    path = weights / "mnist.json"
    path.unlink()
    if facts is not None:
        path.write_bytes(facts)
    with pytest.raises(nb.ReaderError, match="missing or damaged|differs from the sha256"):
        nb.load_model("mnist", nb.make_config("smoke", "MNIST"), 1, torch.device("cpu"))


# 5. Files by others, or from another time

class Attack:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


@pytest.mark.parametrize("form", ("pickle", "zip", "old zip"))
@pytest.mark.parametrize("place", ("run", "weights"))
def test_a_malicious_pickle_is_not_run(nb, home, tmp_path, monkeypatch, form, place):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / {"run": "runs/m/checkpoint.pt", "weights": "assets/weights/m.pt"}[place]
    path.parent.mkdir(parents=True)
    if form == "pickle":
        path.write_bytes(pickle.dumps(Attack()))
    else:
        torch.save({"config": Attack()}, path, _use_new_zipfile_serialization=form == "zip")
    if place == "weights":  # even with the right sha256 beside it
        facts = {"sha256": nb.hashlib.sha256(path.read_bytes()).hexdigest()}
        path.with_suffix(".json").write_text(json.dumps(facts))
    seen = home.start("nb.load_model('m', setting(kind), 1, CPU)", "pixels", tmp_path).end()
    assert re.fullmatch(rf"Stopped: {path.relative_to(tmp_path)} cannot be read \(.+\): delete"
                        r" it and run this cell again\.\n", seen)
    assert not (tmp_path / "owned").exists()
    with pytest.raises(Exception, match="^$|.*"):  # the attack is real
        torch.load(path, weights_only=False)
        pickle.loads(path.read_bytes())
        raise ValueError
    assert (tmp_path / "owned").exists()


def drop(key):
    return lambda content: content.pop(key)


OTHERS = {
    "no rng": drop("rng"), "no config": drop("config"), "no EMA": drop("ema"),
    "no optimizer": drop("optimizer"), "no losses": drop("losses"), "no val": drop("val"),
    "a weight less": lambda c: c["model"].popitem(),
    "a weight more": lambda c: c["model"].update(extra=torch.zeros(1)),
    "an average less": lambda c: c["ema"].popitem(),
    "another width": lambda c: c["model"].update({next(iter(c["model"])): torch.zeros(3)}),
    "another optimizer": lambda c: c["optimizer"].update(param_groups=[]),
    "losses as a list": lambda c: c.update(losses=[1.0]),
    "config with a key less": lambda c: c.update(config='{"T": 50}')}


@pytest.mark.parametrize("name", OTHERS)
def test_a_checkpoint_of_another_version(home, nb, undisturbed, tmp_path, name):
    """One sentence; the state in memory and the file stay as they were."""
    other = content(home.folder / "straight-pixels")
    OTHERS[name](other)
    (tmp_path / "run").mkdir()
    path = tmp_path / "run/checkpoint.pt"
    torch.save(other, path)
    before = path.read_bytes()
    seen = home.start("""
cfg = setting(kind)
state = nb.State(cfg, 1, CPU)
before = [p.clone() for p in [*state.model.parameters(), *state.ema.parameters()]]
try:
    nb.resume(state, cfg, Path("run"))
finally:
    assert all(map(torch.equal, before, [*state.model.parameters(), *state.ema.parameters()]))
    print(state.step, len(state.losses))
""", "pixels", tmp_path).end()
    wanted = ("belongs to another configuration: move or delete it" if "key" in name else
              "does not fit this version of the notebook: move it elsewhere, and run this cell"
              " again")
    assert seen == f"0 0\nStopped: run/checkpoint.pt {wanted}.\n"
    assert path.read_bytes() == before


def test_extra_entries_do_no_harm(home, undisturbed, tmp_path):
    other = content(home.folder / "straight-pixels") | {"news": torch.ones(2)}
    (tmp_path / "run").mkdir()
    torch.save(other, tmp_path / "run/checkpoint.pt")
    assert home.start("print(training(kind, 'run').step)", "pixels", tmp_path).end() == "24\n"


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_of_another_configuration(home, tmp_path, kind):
    shutil.copytree(home.folder / f"straight-{kind}", tmp_path / "run")
    before = (tmp_path / "run/checkpoint.pt").read_bytes()
    seen = home.start("training(kind, 'run', setting(kind, lr=1e-4))", kind, tmp_path).end()
    assert seen == ("Stopped: run/checkpoint.pt belongs to another configuration: move or"
                    " delete it.\n")
    assert (tmp_path / "run/checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("config", ('{"folds": 2}', "{", "[]", None))
def test_weights_of_another_notebook_or_version(home, tmp_path, config):
    (tmp_path / "runs/other").mkdir(parents=True)
    torch.save({"config": config, "ema": {}}, tmp_path / "runs/other/checkpoint.pt")
    seen = home.start("nb.load_model('other', setting(kind), 1, CPU)", "pixels", tmp_path).end()
    assert seen == ("Stopped: runs/other/checkpoint.pt does not fit this version of the"
                    " notebook: move it elsewhere, and run this cell again.\n")


# 6. Numbers out of bounds, and too many of them

@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_the_data(home, tmp_path, kind):
    """Some codes, or pictures, with a NaN: refused at the door, before the first step."""
    seen = home.start("""
data = codes.clone() if kind == "latents" else nb.to_float(images)
data[::40, 0, 3, 3] = float("nan")
training(kind, "run", setting(kind), data=data)
""", kind, tmp_path).end()
    assert re.fullmatch(r"Stopped: images is float32 \[300, .*\] from nan to nan: give it uint8"
                        r" or float32 \[N, \(C,\) H, W\].*, finite and not empty\.\n",
                        seen), seen
    assert not (tmp_path / "run/checkpoint.pt").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_nan_in_a_batch(home, tmp_path, kind):
    """The seventh batch has a NaN: named, and weights and checkpoint are still good."""
    seen = home.start("""
name = "autoencoder_batch" if kind == "autoencoder" else "make_batch"
real = getattr(nb, name)
def poisoned(*args):
    batch = real(*args)
    if args[-2] == 7:  # the step
        batch[-1][0, 0, 3, 3] = float("nan")
    return batch
nb.optimize.__globals__[name] = poisoned
made, begin = [], nb.State.__init__
def keep(self, *args, **named):
    begin(self, *args, **named)
    made.append(self)
nb.State.__init__ = keep
try:
    training(kind, "run", setting(kind))
finally:
    finite = all(p.isfinite().all() for part in (made[0].model, made[0].ema)
                 for p in part.parameters())
    print("finite", finite, "step", made[0].step, "losses", len(made[0].losses))
""", kind, tmp_path).end()
    assert seen == (
        "finite True step 7 losses 7\nStopped: the loss is nan at step 7: lower lr in CHANGES,"
        " which starts a new run. What is saved is of a step before.\n"), seen
    assert content(tmp_path / "run")["step"] == 6


@pytest.mark.parametrize("kind", ("pixels", "latents"))
def test_exploding_loss(home, tmp_path, kind):
    """lr = 1 without clipping: named, and the weights are those of the step before."""
    seen = home.start("""
cfg = setting(kind, lr=1.0, grad_clip=1e6, warmup=1, steps=300, ema_decay=0.9)
state = nb.State(cfg, 1 if kind == "pixels" else 4, CPU, nb.UNet if kind == "pixels"
                 else nb.LatentUNet)
kept = []
def watch(state):
    kept[:] = [p.detach().clone() for p in [*state.model.parameters(), *state.ema.parameters()]]
try:
    nb.train(state, images if kind == "pixels" else codes, labels,
             nb.make_alpha_bar(cfg.schedule, cfg.T), cfg, Path("run"), watch)
finally:
    now = [*state.model.parameters(), *state.ema.parameters()]
    print("as before", all(map(torch.equal, kept, now)),
          "finite", all(p.isfinite().all() for p in now), "of step", state.step)
""", kind, tmp_path).end()
    found = re.search(r"as before True finite True of step (\d+)\nStopped: the loss (explodes,"
                      r" it is [\d.e+]+|is \w+) at step \1: lower lr in CHANGES, which starts a"
                      r" new run\. What is saved is of a step before\.\n$", seen)
    assert found, seen
    assert int(found[1]) < 3 or content(tmp_path / "run")["step"] == int(found[1]) // 3 * 3


# 9. The network

@pytest.mark.parametrize("answer", ("", "HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\nabc"))
def test_a_network_that_hangs(home, tmp_path, answer):
    """A server that accepts and never answers, or stops in the middle of a file."""
    seen = home.start(f"""
server = socket.create_server(("127.0.0.1", 0))
import threading
open_ones = []
def accept():
    while True:
        open_ones.append(server.accept()[0])
        open_ones[-1].sendall({answer!r}.encode())
threading.Thread(target=accept, daemon=True).start()
nb.datasets.MNIST.mirrors = [f"http://127.0.0.1:{{server.getsockname()[1]}}/"] * 2
started = time.monotonic()
try:
    nb.load_images("MNIST", True, patience=0.3)
finally:
    print("in time", bool(open_ones) and time.monotonic() - started < 5)
""", "pixels", tmp_path).end()
    assert re.fullmatch(
        r"(?s:.*)in time True\nStopped: MNIST is neither whole in assets/data nor could it be"
        r" downloaded \(\w+\): connect to the network, or copy its four \.gz files to"
        r" assets/data/MNIST/raw, and run again\.\n", seen), seen



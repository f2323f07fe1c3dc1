"""Several processes equal one: the exported script under torchrun, gloo, one thread each."""
import ast
import builtins
import functools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import export
import nbformat
import pytest
import torch
from conftest import ROOT

NAME = ROOT / "diffusion_tutorial.ipynb"
STEPS = 20
CHANGES = f"CHANGES = dict(steps={STEPS}, save_every=5, n_fid=200, fid_calls=4)"
BEGIN = """
import os, sys, pathlib, torch
torch.cpu._is_avx512_bf16_supported = lambda: False  # float32 on every machine
_rank = int(os.environ["RANK"])
_pid = f"pid-{_rank}-{os.environ['TORCHELASTIC_RESTART_COUNT']}"
pathlib.Path(_pid).write_text(str(os.getpid()))
"""
SPIES = """
_shares, _draw_share, _train_step = [], draw_share, train_step
def draw_share(*args):
    _shares.append(_draw_share(*args))
    return _shares[-1]
def train_step(state, batch, *args):
    if state.step == 3:
        _shares[:] = [part.clone() for part in batch]
    return _train_step(state, batch, *args)
"""
LAUNCHED = "if distributed.is_available() and distributed.is_torchelastic_launched():"
END = """
torch.save({"model": state.model.state_dict(), "ema": state.ema.state_dict(),
            "optimizer": state.optimizer.state_dict(), "step": state.step,
            "share": _shares[:-1], "drawn": _shares[-1]},
           f"rank-{_rank}.pt")
"""


def script(words):
    """The exported script in float32, small, and with spies; words: replacements in it."""
    text = export.make_script(NAME)
    for old, new in {"CHANGES = {}": CHANGES, LAUNCHED: SPIES + LAUNCHED, **words}.items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return BEGIN + text + END


def launch(folder, count, flags=(), words={}):
    """Start the script with count processes in a folder, by torchrun."""
    folder.mkdir(exist_ok=True)
    if not (folder / "assets").exists():
        (folder / "assets").symlink_to(ROOT / "assets")
    (folder / "train.py").write_text(script(words))
    env = {**os.environ, "OMP_NUM_THREADS": "1", "DIFFUSION_PROFILE": "cpu",
           "PYTHONUNBUFFERED": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node",
         str(count), *flags, "train.py"], cwd=folder, env=env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def rest_of(process, seconds):
    """What a run prints until it ends; one that does not end in time is stopped."""
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun takes its processes along
        process.communicate()
        raise


def finish(folder, count, **kwargs):
    """Run to the end: what it printed, and what each rank holds."""
    process = launch(folder, count, **kwargs)
    shown, errors = rest_of(process, 280)
    assert process.returncode == 0, errors[-3000:]
    assert "Traceback" not in errors, errors
    return shown, ranks(folder, count)


def ranks(folder, count):
    """What the ranks of a finished run left."""
    return [torch.load(folder / f"rank-{rank}.pt") for rank in range(count)]


def gap(a, b, part):
    """The largest difference of two states' parts."""
    assert a[part].keys() == b[part].keys()
    return max((a[part][key].float() - b[part][key].float()).abs().max().item()
               for key in a[part])


def identical(a, b):
    """Equal to the last bit: tensors, and whatever holds them."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(identical(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(identical, a, b))
    return a == b


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder for this module."""
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def trained(place):
    """A function of the number of processes: the same training, (printed, ranks)."""
    return functools.cache(lambda count: finish(place / f"by-{count}", count))


@pytest.mark.parametrize("count", (2,))
def test_several_processes_train_as_one(trained, count):
    one, several = trained(1)[1][0], trained(count)[1]
    assert all(rank["step"] == STEPS for rank in several)
    for part in ("model", "ema"):
        print(f"{count} processes, {part}: {gap(one, several[0], part):.1e}")
        assert gap(one, several[0], part) <= 1e-5
    for rank in several[1:]:
        assert all(identical(rank[part], several[0][part])
                   for part in ("model", "ema", "optimizer"))


def test_training_moved_every_parameter(trained, nb):
    """Else the equality above would say little: 1e-5 is far less than what was learned."""
    moved = trained(1)[1][0]["model"]
    torch.manual_seed(0)
    fresh = nb.UNet(nb.make_config("cpu", "FashionMNIST")).state_dict()
    assert sum(value.numel() for value in moved.values()) == 960_260
    for key, value in moved.items():
        assert (value - fresh[key]).abs().max() > 1e-3, key


@pytest.mark.parametrize("count", (2,))
def test_ranks_share_the_batch_out(trained, count):
    whole, several = trained(1)[1][0]["share"], [rank["share"] for rank in trained(count)[1]]
    for number, part in enumerate(whole):
        assert all(len(share[number]) == 32 // count for share in several)
        assert all(torch.equal(share[number], part[rank::count])
                   for rank, share in enumerate(several))


@pytest.mark.parametrize("count", (1, 2))
def test_one_checkpoint_and_one_voice(trained, place, count):
    shown, _ = trained(count)
    folder, = (place / f"by-{count}/runs").glob("fashion*")
    assert {path.name for path in folder.iterdir()} == {"checkpoint.pt"}
    for once in ("FashionMNIST, profile cpu", f"{count} processes, {32 // count} images each",
                 *(f"step {step}, loss" for step in range(1, STEPS + 1)), "FID "):
        assert shown.count(once) == 1, once


def test_the_checkpoint_opens_without_processes(trained, place, nb, monkeypatch):
    """The notebook finds the run: same folder, no wrap in its names."""
    trained(2)
    monkeypatch.chdir(place / "by-2")
    cfg = nb.replace(nb.make_config("cpu", "FashionMNIST"), **eval(CHANGES[10:]))
    state = nb.State(cfg, 1, torch.device("cpu"))
    nb.resume(state, cfg, nb.run_folder(cfg))
    assert state.step == STEPS and state.network is state.model
    assert identical(dict(state.model.state_dict()), dict(trained(2)[1][0]["model"]))


@pytest.mark.parametrize("count", (2,))
def test_sharded_sampling_draws_the_same_pictures(trained, place, nb, count):
    """From one checkpoint, finished by one process, in the units of the last bit."""
    (shown, one), (again, several) = trained(1), finish(place / "by-1", count)
    assert f"{STEPS} of {STEPS} steps are done" in again and "loss" not in again
    parts = [list(rank["drawn"].split(50)) for rank in several]
    together = [parts[number % count].pop(0) for number in range(4)]
    assert not any(parts)
    assert torch.equal(torch.cat(together), one[0]["drawn"])
    assert len(one[0]["drawn"]) == 200 == len(one[0]["drawn"].unique(dim=0))
    scores = [re.search(r"FID (\d+\.\d+), floor (\d+\.\d+), N = 200", text).groups()
              for text in (shown, again)]
    assert scores[0] == scores[1]
    net = nb.Classifier().eval()
    net.load_state_dict(nb.read_checkpoint(
        ROOT / "assets/weights/classifier-fashionmnist.pt")["classifier"])
    data = [nb.load_images("FashionMNIST", train, str(ROOT / "assets/data")).data
            for train in (False, True)]
    real = nb.features_of(net, data[0])
    for score, pictures in zip(scores[0], (one[0]["drawn"], data[1][-10_000:][:200])):
        assert float(score) == pytest.approx(nb.fid(real, nb.features_of(net, pictures)),
                                             abs=1e-3)


def wait_for(process, pattern):
    """Read what the run prints until a line fits; returns all lines."""
    lines = []
    while not lines or not re.search(pattern, lines[-1]):
        lines.append(process.stdout.readline())
        assert lines[-1], "it ended early: " + process.stderr.read()[-3000:]
    return "".join(lines)


def pid(folder, rank, start=0):
    """The process of a rank, after so many restarts."""
    return int((folder / f"pid-{rank}-{start}").read_text())


def test_a_killed_rank_resumes(trained, place, nb):
    """SIGKILL to one rank, started again; SIGKILL to the other, restarted by torchrun."""
    folder = place / "killed"
    process = launch(folder, 2)
    wait_for(process, "^step 7,")
    time.sleep(random.uniform(0, 0.3))
    os.kill(pid(folder, 1), signal.SIGKILL)
    shown, errors = rest_of(process, 120)
    assert process.returncode != 0 and "exitcode: -9" in errors, errors[-3000:]
    assert not (folder / "rank-0.pt").exists()
    with pytest.raises(ProcessLookupError):
        os.kill(pid(folder, 0), 0)
    saved, = folder.glob("runs/*/checkpoint.pt")
    first = nb.read_checkpoint(saved)["step"]
    assert 5 <= first < STEPS

    process = launch(folder, 2, flags=("--max-restarts", "1"))
    shown = wait_for(process, f"^step {first + 2},")
    assert f"{first} of {STEPS} steps are done" in shown
    os.kill(pid(folder, 0), signal.SIGKILL)
    shown, errors = rest_of(process, 200)
    assert process.returncode == 0 and "exitcode: -9" in errors, errors[-3000:]
    second, = re.findall(rf"(\d+) of {STEPS} steps are done", shown)
    assert first <= int(second) < STEPS
    for undisturbed, killed in zip(trained(2)[1], ranks(folder, 2)):
        for part in ("model", "ema", "optimizer"):
            assert identical(undisturbed[part], killed[part])


def refused(folder, count, words):
    """The sentences of a run that must stop."""
    process = launch(folder, count, words=words)
    _, errors = rest_of(process, 120)
    assert process.returncode != 0
    assert "Traceback" not in errors.split("torch/distributed/")[0]  # torchrun's own follows
    return errors


def test_a_batch_without_equal_shares_is_refused(place):
    errors = refused(place / "odd", 2, {CHANGES: "CHANGES = dict(batch=33)"})
    assert "Stopped: a batch of 33 images has no 2 equal shares: start another" in errors
    assert not list((place / "odd").glob("runs/*/checkpoint.pt"))


def test_ranks_that_see_other_checkpoints_are_refused(trained, place):
    """As on two machines without a common disk: one resumes, the other would begin anew."""
    trained(2)
    (place / "elsewhere").mkdir()
    (place / "elsewhere/assets").symlink_to(ROOT / "assets")
    move = LAUNCHED + '\n    os.chdir(["../elsewhere", "."][_rank])\n'
    errors = refused(place / "by-2", 2, {LAUNCHED + '\n': move})
    assert "Stopped: some processes found another checkpoint in runs/fashion" in errors


def test_the_script_is_complete():
    """Every name that the tagged cells use is defined in them."""
    tree = ast.parse(export.make_script(NAME))
    known, used = {*dir(builtins)}, set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            known |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            known.add(node.name)
        elif isinstance(node, ast.arg):
            known.add(node.arg)
        elif isinstance(node, ast.ExceptHandler):
            known.add(node.name)
        elif isinstance(node, ast.Name):
            (known if isinstance(node.ctx, ast.Store) else used).add(node.id)
    assert len(used) > 200 and not used - known


def test_script_needs_tags_and_knows_no_magic(tmp_path):
    new = nbformat.v4
    for cells, sentence in (([new.new_code_cell("x = 1")], "no cell of"),
                            ([new.new_code_cell("%matplotlib inline",
                                                metadata={"tags": ["train"]})], "a magic")):
        nbformat.write(new.new_notebook(cells=cells), tmp_path / "a.ipynb")
        with pytest.raises(export.Refusal, match=sentence):
            export.make_script(tmp_path / "a.ipynb")


def test_arithmetic_on_paper(nb):
    cfg = nb.make_config("cpu", "FashionMNIST")
    parameters, multiply_adds = nb.cost(cfg)
    assert parameters == 960_260 and multiply_adds == pytest.approx(51.04e6, rel=1e-3)
    line = nb.on_paper(cfg, 8, 1e9, 6 * multiply_adds * 1000, 1e-5).split()
    found = [float(word.rstrip("%")) for word in line if word not in ("GB/s", "MB")]
    sent = 960_260 * 4 * 7 / 8 * 2
    reduce, compute, drawn = sent / 1e6 + 0.14, 32.0, 2.56  # ms; 1000 images a second
    assert found == pytest.approx([
        8, 1, 256, 625, 3e-3 * 8 ** 0.5, 0.024, 0.998 ** 8, sent / 1e6, reduce, compute,
        drawn, 100 * compute / (compute + reduce),
        100 * compute / (compute + reduce + drawn)], rel=0.03)


def test_kept_scaling_is_whole():
    kept = json.loads((ROOT / "assets/results/scaling.json").read_text())
    assert {"cpu", "threads a process", "torch", "dtype", "steps", "commit"} <= kept.keys()
    one = kept["rows"][0]
    for row in kept["rows"]:
        runs = row["images a second"]
        assert len(runs) >= 3 and row["median"] == sorted(runs)[len(runs) // 2] > 0
        assert row["times one"] == pytest.approx(row["median"] / one["median"], abs=0.01)
    assert {row["processes"] for row in kept["rows"]} == {1, 2}

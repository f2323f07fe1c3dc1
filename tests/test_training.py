"""Settings, batches, the average, resume to the last bit, a kill inside a save."""
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from conftest import code_cells
from pydantic import ValidationError

IMAGES = torch.randint(0, 256, (300, 1, 1, 1), dtype=torch.uint8, generator=torch.Generator(
    ).manual_seed(0)).expand(-1, -1, 28, 28)  # one grey each: easy to learn
LABELS = torch.arange(300) % 10


@pytest.mark.parametrize("name, value", (
    ("T", 49), ("steps", 0), ("lr", 0.0), ("lr", "fast"), ("label_drop", 1.5), ("batch", -1),
    ("schedule", "cosin"), ("predict", "noise"), ("widths", (32,)), ("ema_decay", -0.1),
    ("t_even", math.nan), ("blocks", 1.5), ("learning_rate", 1e-3)))
def test_nonsense_is_refused_with_the_name_of_its_field(nb, name, value):
    with pytest.raises((ValidationError, TypeError), match=name):
        nb.replace(nb.Config(), **{name: value})


def test_settings_are_few_frozen_and_the_profiles_are_valid(nb):
    assert len(nb.asdict(nb.Config())) <= 16
    assert {"smoke", "cpu", "gpu", "long"} <= nb.PROFILES.keys()
    with pytest.raises(Exception, match="lr"):
        nb.Config().lr = 1


def test_batch_is_a_function_of_seed_and_step(nb, tiny):
    torch.manual_seed(1)
    first = nb.make_batch(IMAGES, LABELS, 3, tiny)
    torch.manual_seed(2)
    assert all(map(torch.equal, first, nb.make_batch(IMAGES, LABELS, 3, tiny)))
    for other in (nb.make_batch(IMAGES, LABELS, 4, tiny),
                  nb.make_batch(IMAGES, LABELS, 3, nb.replace(tiny, seed=1))):
        assert not torch.equal(first[3], other[3]) and not torch.equal(first[0], other[0])


def test_batch_holds_pictures_with_their_own_labels(nb, tiny):
    marked = LABELS.byte().view(-1, 1, 1, 1).expand(300, 1, 4, 4)
    x_0, y, _, eps = nb.make_batch(marked, LABELS, 0, nb.replace(
        tiny, batch=500, label_drop=0.0))
    assert torch.equal(((x_0 + 1) * 127.5).round()[:, 0, 0, 0].long(), y)
    assert eps.shape == x_0.shape and abs(eps.mean()) < 0.05 and abs(eps.std() - 1) < 0.05


def all_t(nb, cfg, steps):
    """The t of the first batches, [steps, batch]."""
    return torch.stack([nb.make_batch(IMAGES[:, :, :4, :4], LABELS, step, cfg)[2]
                        for step in range(steps)])


def test_even_t_are_stratified_over_1_to_T(nb, tiny):
    t = all_t(nb, nb.replace(tiny, T=100, batch=50, t_even=1.0), 200)
    assert torch.equal((t - 1) // 2, torch.arange(50).expand(200, 50))  # slices of two
    assert set(t.flatten().tolist()) == set(range(1, 101))


def test_most_t_are_logit_normal_and_stratified(nb, tiny):
    t = all_t(nb, nb.replace(tiny, T=10_000, batch=50, t_even=0.0), 100)
    assert (t.diff(dim=1) >= 0).all() and t.min() >= 1 and t.max() <= 10_000
    u = (torch.arange(51) / 50).double()
    edges = 1 + 10_000 / (1 + torch.exp(-1.2 * 2 ** 0.5 * torch.erfinv(2 * u - 1)))
    assert (t >= edges[:-1].floor()).all() and (t <= edges[1:].ceil()).all()


def test_a_share_of_t_comes_from_all_of_1_to_T(nb, tiny):
    assert 0 < nb.Config().t_even < 0.5
    t = all_t(nb, nb.replace(tiny, T=50, batch=50, t_even=0.2), 600)
    shares = torch.bincount(t.flatten(), minlength=51) / t.numel()
    assert shares[0] == 0 and (shares[1:] > 0.85 * 0.2 / 50).all()
    assert shares[21:31].sum() > 1.5 * shares[1:11].sum()


def test_labels_are_dropped_for_each_picture(nb, tiny):
    cfg = nb.replace(tiny, batch=200, label_drop=0.3)
    shares = torch.tensor([(nb.make_batch(IMAGES, LABELS, step, cfg)[1] == nb.NO_LABEL
                            ).float().mean() for step in range(50)])
    assert shares.mean() == pytest.approx(0.3, abs=0.02)
    assert 0.1 < shares.min() and shares.max() < 0.5, "never a whole batch"


@pytest.mark.parametrize("kind", ("v", "eps", "x_0", "flow"))
def test_loss_is_zero_for_the_right_answer_only(nb, kind):
    schedule, t = nb.make_schedule("cosine", 100), torch.tensor([1, 50, 100])
    x_0, eps = torch.randn(2, 3, 1, 4, 4).unbind(0)
    right, args = nb.target(x_0, eps, t, schedule, kind), (x_0, LABELS[:3], t, eps, schedule)
    assert nb.loss_of(lambda x, t, y: right, *args, kind).max() < 1e-10
    off = nb.loss_of(lambda x, t, y: right + 0.5, *args, kind)
    torch.testing.assert_close(off, torch.full((3,), 0.25), atol=1e-5, rtol=0)


def test_average_warms_up_and_forgets_the_start(nb, tiny):
    run, average = nb.Run(nb.replace(tiny, ema_decay=0.998), 1), 0.0
    for n in range(8):
        with torch.no_grad():
            for p in run.net.parameters():
                p.fill_(float(n * n))
        run.scheduler.last_epoch = n + 1  # as after train_step
        run.ema.update_parameters(run.net)
        keep = (1 + n) / (10 + n) if n else 0  # first a copy
        average = keep * average + (1 - keep) * n * n
        for p in run.ema.module.parameters():
            torch.testing.assert_close(p, torch.full_like(p, average))
    assert average > 20, "a plain 0.998 would still be near the first values"


def test_learning_rate_warms_up_and_ends_at_zero(nb, tiny):
    cfg = nb.replace(tiny, steps=1000, warmup=50)
    factors = [nb.learning_rate(step, cfg) for step in range(1001)]
    assert factors[0] == pytest.approx(1 / 50, rel=0.01) and max(factors) > 0.99
    assert factors[1000] == 0 and all(a > b for a, b in zip(factors[60:], factors[61:]))


def same(a, b):
    """True if two checkpoint contents are equal to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def content(file):
    """What a checkpoint holds."""
    return torch.load(file, weights_only=True)


def finish(nb, cfg, file, watch=lambda run: None):
    """Go on from the file where there is one, to the end; returns the checkpoint."""
    run = nb.Run(cfg, 1)
    if file.exists():
        run.load(file)
    nb.train(run, IMAGES, LABELS, cfg, file, watch, save_every=50)
    return content(file)


@pytest.fixture(scope="module")
def undisturbed(nb, tmp_path_factory):
    """The settings of a training of 150 steps, and its checkpoint at the end."""
    cfg = nb.Config(widths=(8, 16), blocks=1, batch=8, steps=150, warmup=2, T=50)
    return cfg, finish(nb, cfg, tmp_path_factory.mktemp("whole") / "checkpoint.pt")


def test_training_lowers_the_loss(undisturbed):
    losses = undisturbed[1]["losses"]
    assert len(losses) == 150 and losses[-30:].mean() < 0.5 * losses[:10].mean()


@pytest.mark.parametrize("stop, saved", ((50, None), (100, 50)))
def test_interrupted_training_ends_in_the_same_bits(nb, undisturbed, tmp_path, stop, saved):
    cfg, whole = undisturbed
    file = tmp_path / "new" / "checkpoint.pt"

    def press_stop(run):
        if len(run.losses) == stop:
            raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        finish(nb, cfg, file, press_stop)
    assert (len(content(file)["losses"]) if file.exists() else None) == saved
    torch.manual_seed(7)  # nothing may hang on the global generator
    assert same(finish(nb, cfg, file), whole) and [*file.parent.iterdir()] == [file]


CHILD = """
import io, sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch, test_training as ours
from conftest import load_definitions
nb, real, saves = load_definitions("diffusion_tutorial"), torch.save, []

def save(what, file):
    saves.append(file)
    if len(saves) < 2:
        return real(what, file)
    real(what, buffer := io.BytesIO())
    size = buffer.tell()
    Path(file).write_bytes(buffer.getvalue()[:size // 2])
    print("inside", flush=True)
    time.sleep(600)

torch.save = save
cfg = nb.Config(widths=(8, 16), blocks=1, batch=8, steps=150, warmup=2, T=50)
ours.finish(nb, cfg, Path({file!r}))
"""


def test_killed_inside_a_save_loses_nothing(nb, undisturbed, tmp_path):
    """SIGKILL in a real process: the old checkpoint is whole, and the end is the same."""
    cfg, whole = undisturbed
    file = tmp_path / "checkpoint.pt"
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(tests=str(Path(__file__).parent), file=str(file))],
        stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "inside\n"
    finally:
        child.kill()
        child.wait()
    assert len(content(file)["losses"]) == 50
    assert same(finish(nb, cfg, file), whole) and [*tmp_path.iterdir()] == [file]


def test_a_loss_that_is_no_number_stops_and_keeps_the_checkpoint(nb, undisturbed, tmp_path):
    cfg, _ = undisturbed

    def poison(run):
        if len(run.losses) == 50:
            with torch.no_grad():
                next(run.net.parameters()).fill_(math.nan)
    with pytest.raises(ValueError, match="loss is nan.*lr"):
        finish(nb, cfg, tmp_path / "a.pt", poison)
    saved = content(tmp_path / "a.pt")
    assert len(saved["losses"]) == 50 and saved["losses"].isfinite().all()


def shell_with(*ids: str) -> InteractiveShell:
    """An IPython shell, with the notebook's own magic, in which these cells were run."""
    shell = InteractiveShell.instance()
    for cell in code_cells("diffusion_tutorial"):
        if cell.id in ("setup", "noise-def", "schedule-first-def", "add-noise", *ids):
            lines = cell.source.split("\n\n\nx_0 =")[0].split("\n\n\ncopies, t =")[0]
            assert shell.run_cell(lines).success, cell.id
    shell.run_cell("x = torch.zeros(2, 1, 4, 4)\nt = torch.tensor([3, 5])")
    return shell


def test_hints_refuse_a_wrong_shape_in_four_lines(capsys):
    shell = shell_with()
    assert shell.run_cell("add_noise(x, t, x, circle)").success
    capsys.readouterr()
    for call, words in (("add_noise(x, t, x[0], circle)", ("add_noise", "eps")),
                        ("add_noise(x, t.float(), x, circle)", ("add_noise", "t")),
                        ("add_noise(x, t[:1], x, circle)", ("add_noise", "t")),
                        ("scale(x)", ("scale", "x"))):
        assert not shell.run_cell(call).success, call
        said = capsys.readouterr().out.strip("\n")
        assert said.count("\n") < 4 and max(map(len, said.split("\n"))) < 400, said
        assert all(word in said for word in words), said


def test_sampling_keeps_no_graph_where_hints_are_checked():
    """A generator under torch.no_grad loses it when its hints are checked."""
    shell = shell_with("blocks-def", "first-unet", "schedule-def", "bayes", "sample-def")
    assert shell.run_cell(
        "w = torch.ones(1, requires_grad=True)\n"
        "way = sample(lambda x, t, y: w * x, x, make_schedule('cosine', 50), [50, 25, 0])\n"
        "assert not any(part.requires_grad for step in way for part in step[1:])").success

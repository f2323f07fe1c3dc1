"""Bad input at the doors of both notebooks: one clear sentence, or a right result.

Doors: load_images, make_alpha_bar, train and train_autoencoder, sample and what else
draws, Config and Space. Each test knows by itself which inputs are good: these must give
what was asked, and all others ReaderError with one sentence. SEEN counts the bad ones.
"""
import ast
import math
import re
import types
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from conftest import ROOT, load_definitions
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

CPU, T = torch.device("cpu"), 50
SEEN: set[tuple] = set()
RAN: set[str] = set()


def many(count: int) -> settings:
    """So many examples, the same ones every time."""
    return settings(max_examples=count, derandomize=True, deadline=None, database=None,
                    suppress_health_check=list(HealthCheck))


@pytest.fixture(autouse=True)
def note(request):
    """Note which tests of this file have run."""
    yield
    RAN.add(request.node.originalname)


@pytest.fixture(scope="session")
def lat():
    """The definitions of the latent notebook."""
    return load_definitions("latent_diffusion_cab")


@pytest.fixture(params=("pixels", "latents"))
def book(request, nb, lat):
    """The definitions of each notebook."""
    return nb if request.param == "pixels" else lat


def refused(book, call, names, *said) -> None:
    """call() must raise ReaderError with one sentence that holds one of the names."""
    with pytest.raises(Exception) as info:
        call()
    error, key = info.value, (book.__name__, *map(show, said))
    assert type(error) is book.ReaderError, (key, type(error), str(error))
    sentence = str(error)
    assert len(sentence) <= 200 and sentence.endswith("."), sentence
    assert "\n" not in sentence and ". " not in re.sub(r"(['\"]).*\1", "", sentence), sentence
    assert any(name in sentence for name in names), (names, sentence)
    SEEN.add(key)


def show(value) -> str:
    """A short name of a value that tells apart what a reader would."""
    if isinstance(value, torch.Tensor):
        ends = value.isreal().all() and value.numel() and (value.real.min(), value.real.max())
        return f"{value.dtype} {list(value.shape)} {ends}"
    return f"{type(value).__name__} {str(value)[:60]}"


# ------------------------------------------------------------ what readers may write

ODD = st.one_of(st.none(), st.booleans(), st.text(max_size=80), st.binary(max_size=4),
                st.lists(st.integers(), max_size=3), st.complex_numbers(), st.sampled_from([
                    torch.tensor(3.0), torch.tensor([1, 2]), np.float32(2), np.arange(9),
                    {}, {"T": 3}, (), print, Path("x"), nn.Linear(2, 2), 10 ** 400]))
NUMBER = st.one_of(st.integers(-5, 60), st.integers(-10 ** 6, 10 ** 6), st.integers(),
                   st.floats(), st.floats(-2, 2))
ANY = st.one_of(NUMBER, NUMBER, ODD)
WORD = st.one_of(st.sampled_from(["v", "eps", "x_0", "V", "epsilon", "x0", "cosine", "Linear",
                                  "linear", "sigmoid", "MNIST", "mnist", "none", "gain"]), ANY)


def whole(value, low, high=math.inf) -> bool:
    """True for a whole number from low to high, which True and False are not."""
    return type(value) is int and low <= value <= high


def real(value, low=-math.inf, high=math.inf) -> bool:
    """True for a finite int or float from low to high."""
    return type(value) in (int, float) and (type(value) is int or math.isfinite(value)) \
        and low <= value <= high


def word(value, *words) -> bool:
    """True for one of the words."""
    return type(value) is str and value in words


@st.composite
def tensors(draw, good: torch.Tensor, values=(math.nan, math.inf, -math.inf)):
    """A tensor that good has become by one mistake, or something that is no tensor."""
    kind = draw(st.sampled_from(["type", "axes", "empty", "value", "none"]))
    if kind == "type":
        types = {torch.float16, torch.bfloat16, torch.int32, torch.int16, torch.bool,
                 torch.complex64, torch.int8, torch.int64, torch.float32} - {good.dtype}
        types -= {torch.float32} if good.is_floating_point() else set()
        return good.to(draw(st.sampled_from(sorted(types, key=str))))
    if kind == "axes":
        wrong = [good.flatten(), good[0], good[None], good[None, None], good.sum()]
        wrong = [x for x in wrong if x.ndim != good.ndim]
        return draw(st.sampled_from(wrong[:-2] if good.ndim == 4 else wrong))
    if kind == "empty":
        axis = draw(st.integers(0, good.ndim - 1))
        return good.narrow(axis, 0, 0)
    if kind == "value":
        spoiled = good.clone()
        index = draw(st.integers(0, good.numel() - 1))
        spoiled.view(-1)[index] = draw(st.sampled_from(values))
        return spoiled
    return draw(st.one_of(NUMBER, ODD.filter(lambda x: x is not None), st.sampled_from([
        good.numpy(), good.tolist(), [good], "images"])))


# ------------------------------------------------------------------- Config and Space

SHARES = {"label_drop", "t_even", "fid_eta"}
WORDS = {"schedule": ("linear", "cosine", "sigmoid"), "predict": ("v", "eps", "x_0"),
         "gate": ("attention", "gain", "none")}
FROM_ZERO = {"warmup": 10 ** 9, "seed": 2 ** 31, "snapshots": 100, "rungs": 100}
TUPLES = {"few_calls": 1, "fid_steps": 1}


def acceptable(book, name, value, default) -> bool:
    """What a setting may be, told again."""
    if name == "dataset":
        extra = ("CIFAR10",) if book.__name__ == "diffusion_tutorial" else ()
        return word(value, "MNIST", "FashionMNIST", *extra)
    if name in WORDS:
        return word(value, *WORDS[name])
    if type(default) is str:
        return type(value) is str
    if name in SHARES:
        return real(value, 0, 1)
    if name == "T":
        return whole(value, 50, 100_000)
    if name in FROM_ZERO:
        return whole(value, 0, FROM_ZERO[name])
    most = {"channels": 256, "folds": 5, "side": 1024}.get(name, 10 ** 9)
    if type(default) is int:
        return whole(value, {"yardstick_steps": 2, "side": 4}.get(name, 1), most)
    low, high = {"ema_decay": (0, 0.999999), "lr": (1e-9, 100), "grad_clip": (1e-9, 10 ** 6),
                 "guidance": (-100, 100)}.get(name, (0, 10 ** 6))
    return real(value, low, high)


def classes(book) -> list[type]:
    """The settings of a notebook."""
    return [book.Config, *([book.Space] if hasattr(book, "Space") else [])]


@given(st.data())
@many(500)
def test_settings(book, data):
    kind = data.draw(st.sampled_from(classes(book)))
    default = kind()
    single = [f.name for f in book.fields(kind) if type(getattr(default, f.name)) is not tuple]
    name = data.draw(st.sampled_from(single))
    value = data.draw(WORD if name in {"dataset", *WORDS} else ANY)
    if not acceptable(book, name, value, getattr(default, name)):
        refused(book, lambda: kind(**{name: value}), [name], kind.__name__, name, value)
    elif name == "heads" and 96 % value and 80 % value:
        refused(book, lambda: kind(heads=value), ["heads"], "heads", value)
    elif name != "heads":
        assert getattr(kind(**{name: value}), name) == value


@given(st.data())
@many(150)
def test_settings_of_several_numbers(book, data):
    kind = data.draw(st.sampled_from(classes(book)))
    name = data.draw(st.sampled_from([f.name for f in book.fields(kind)
                                      if type(getattr(kind(), f.name)) is tuple]))
    value = data.draw(st.one_of(ANY, st.lists(ANY, max_size=3), st.lists(
        st.one_of(st.integers(0, 9), st.floats(0, 1)), max_size=3)).map(
            lambda x: tuple(x) if isinstance(x, list) else x))
    good = isinstance(value, tuple)
    if name == "widths":
        good = good and len(value) == 2 and all(whole(v, 1, 10_000) for v in value)
        good = good and (kind.__name__ == "Space" or value[1] % 4 == 0)
    elif name == "fid_band":
        good = good and len(value) == 2 and all(real(v, 0, 1) for v in value)
    elif name in TUPLES:
        good = good and len(value) > 0 and all(whole(v, 1, 100_000) for v in value)
    elif name == "shapes":
        good = value == () and isinstance(value, tuple)
    else:
        low = 1e-3 if name == "rung_budgets" else -100
        high = 10 ** 9 if name == "rung_budgets" else 100
        good = good and len(value) > 0 and all(real(v, low, high) for v in value)
    if good:
        assert getattr(kind(**{name: value}), name) == value
    else:
        refused(book, lambda: kind(**{name: value}), [name], kind.__name__, name, value)


def test_settings_of_all_profiles_and_of_shipped_weights_pass(book):
    for profile in ("smoke", "cpu", "long", "gpu"):
        for dataset in ("MNIST", "FashionMNIST"):
            book.make_config(profile, dataset)
    import json
    for file in sorted((ROOT / "assets/weights").glob("*.json")):
        facts = json.loads(file.read_text())
        if "config" in facts and ("space" in facts) == hasattr(book, "Space"):
            assert book.replace(book.Config(), **facts["config"]).widths  # a list
            if "space" in facts:
                book.Space(**facts["space"])


@pytest.mark.parametrize("shapes", [(4, 2), ((4,),), ((4, 2), (1, 2, 3)), ((0, 2),), ((4, 9),),
                                    (("4", 2),), ((4.0, 2),), "42"])
def test_shapes_are_pairs(lat, shapes):
    refused(lat, lambda: lat.Config(shapes=shapes), ["shapes", "channels", "folds"], "pairs",
            shapes)
    assert lat.Config(shapes=((1, 1), (8, 3))).shapes


@given(st.one_of(st.text(max_size=30), st.text("abcdeflnrst_", min_size=1, max_size=12),
                 st.integers(), st.none()))
@many(100)
def test_unknown_settings_name_the_nearest(book, name):
    settings = book.make_config("smoke", "MNIST")
    settings = settings if isinstance(settings, book.Config) else settings[1]
    names = [field.name for field in book.fields(settings)]
    if name not in names:
        refused(book, lambda: book.changed(settings, {name: 3}), names, "changed", name)


@pytest.mark.parametrize("typo, name", [("batchsize", "batch"), ("step", "steps"), ("LR", "lr"),
                                        ("guidence", "guidance"), ("width", "widths"),
                                        ("ema", "ema_decay"), ("warm_up", "warmup")])
def test_a_typo_is_answered_with_the_right_name(book, typo, name):
    refused(book, lambda: book.changed(book.Config(), {typo: 1}), [f'"{name}"'], "typo", typo)


def cell(name: str, id: str) -> str:
    """The source of a cell."""
    cells = nbformat.read(ROOT / f"{name}.ipynb", as_version=4).cells
    return next(c.source for c in cells if c.id == id)


@pytest.mark.parametrize("changes", ["dict(step=5)", "dict(steps=5.5)", "5", "{3: 4}", "None"])
def test_the_cell_to_edit_answers_in_a_sentence(book, changes):
    source = cell(book.__name__, "choose").replace("\nCHANGES = {}", f"\nCHANGES = {changes}")
    assert f"CHANGES = {changes}" in source and ast.parse(source)
    with book.plt.rc_context():
        refused(book, lambda: exec(source, {**vars(book), "sys": __import__("sys")}),
                ["steps", "CHANGES"], "choose", changes)


@given(st.one_of(st.text(max_size=60), ODD))
@many(40)
def test_profiles_and_data_sets(book, name):
    refused(book, lambda: book.make_config(name, "MNIST"), ["smoke, cpu"], "profile", name)
    refused(book, lambda: book.make_config("cpu", name), ["dataset"], "dataset", name)


# -------------------------------------------------------------- load_images, schedule

@given(st.data())
@many(100)
def test_load_images(book, data):
    what = data.draw(st.sampled_from(["name", "train", "root"]))
    good = {"name": "MNIST", "train": True, "root": "assets/data"}
    bad = {"name": st.one_of(st.sampled_from(["mnist", "Mnist ", "CIFAR100", "QMNIST"]),
                             st.text(max_size=80), ODD, NUMBER),
           "train": st.one_of(ODD.filter(lambda x: type(x) is not bool), NUMBER),
           "root": st.one_of(st.just(str(ROOT / "README.md")), NUMBER, ODD.filter(
               lambda x: not isinstance(x, (str, Path))))}
    value = data.draw(bad[what])
    says = ["data set"] if what == "name" else [what]
    refused(book, lambda: book.load_images(**{**good, what: value}), says, "load", what, value)


@given(name=WORD, steps=st.one_of(ANY, st.integers(45, 55)), which=st.booleans())
@many(200)
def test_schedules(book, name, steps, which):
    name, steps = (name, 60) if which else ("cosine", steps)
    if word(name, "linear", "cosine", "sigmoid") and whole(steps, 50, 100_000):
        curve = book.make_alpha_bar(name, steps)
        assert curve.shape == (steps + 1,) and (curve.diff() < 0).all()
        assert curve[0] == pytest.approx(1) and 1e-5 < curve[-1] < 1e-3
    else:
        refused(book, lambda: book.make_alpha_bar(name, steps),
                ["schedule" if which else "T"], "schedule", name, steps)


# ------------------------------------------------------------------------------ train

def settings_of(book):
    """A small Config."""
    made = book.make_config("smoke", "MNIST")
    made = made[1] if isinstance(made, tuple) else made
    return book.replace(made, batch=4, steps=2, warmup=0)


def data_of(book):
    """Good training data: pictures in the pixel notebook, codes in the latent one."""
    g, y = torch.Generator().manual_seed(0), torch.arange(12) % 10
    if hasattr(book, "Space"):
        return torch.randn(12, 4, 7, 7, generator=g), y
    return torch.rand(12, 1, 8, 8, generator=g) * 2 - 1, y


def state_of(book):
    """A fresh training of the notebook's own network."""
    network = book.LatentUNet if hasattr(book, "Space") else book.UNet
    return book.State(settings_of(book), data_of(book)[0].shape[1], CPU, network)


@pytest.fixture(scope="session")
def idle(nb, lat):
    """A training of each notebook that no bad input may start."""
    return {book.__name__: state_of(book) for book in (nb, lat)}


def spoiled_curves(curve):
    """A schedule with one mistake."""
    rising = curve.flip(0)
    return st.one_of(tensors(curve, (math.nan, math.inf, -0.1, 0.0, 1.5)), st.sampled_from([
        rising, curve[1:], torch.cat([curve, curve[-1:]]), curve * 0.9, 1 - curve,
        torch.ones(T + 1, dtype=torch.float64), torch.linspace(1, 0, T + 1).double()]))


@given(st.data())
@many(300)
def test_train(book, idle, data):
    cfg, (x, y) = settings_of(book), data_of(book)
    curve, latents = book.make_alpha_bar("cosine", T), hasattr(book, "Space")
    good = {"images": x, "labels": y, "alpha_bar": curve, "folder": None}
    what = data.draw(st.sampled_from(["images", "images", "labels", "alpha_bar", "folder"]))
    says = [what, "x_t", "z_t"]
    if what == "images":
        ranges = [x.abs(), x.abs() * 255, x.abs() + 1]
        ranges += [] if latents else [(x + 1) / 2, (x + 1) * 127.5, x * 1.5, x * 255, x - 1,
                                      3 * torch.randn_like(x)]
        shapes = [x.repeat(1, 3, 1, 1), x[:, :1].repeat(1, 2, 1, 1)]
        shapes += [] if latents else [x[..., :7], x[..., 1:, :], x[..., :6, :6], x[:, 0, :5]]
        short = [x[:11], torch.cat([x, x])]
        value = data.draw(st.one_of(tensors(x).filter(lambda v: getattr(
            v, "ndim", 0) != 3 and getattr(v, "dtype", 0) != torch.uint8),
            st.sampled_from(ranges + shapes + short)))
        says = says if value is not short[0] else [*says, "labels"]
    elif what == "labels":
        value = data.draw(st.one_of(tensors(y, (-1, 10, 255, -100)), st.just(None),
                                    st.integers(1, 11).map(lambda n: y[:n]),
                                    st.integers(1, 9).map(lambda n: y + n)))
    elif what == "alpha_bar":
        value = data.draw(st.one_of(spoiled_curves(curve), st.integers(51, 80).map(
            lambda n: book.make_alpha_bar("cosine", n)), st.just(curve[:40])))
    else:
        value = data.draw(ODD.filter(lambda v: v is not None and not isinstance(v, Path)))
    state = idle[book.__name__]
    refused(book, lambda: book.train(state, cfg=cfg, **{**good, what: value}), says,
            "train", what, value)
    assert state.step == 0 and not state.losses, "nothing may have been trained"


@pytest.mark.parametrize("case", range(8))
def test_good_training_data_at_the_edges_pass(book, case, tmp_path):
    x, y = data_of(book)
    cases = [(x, y), (x[:1], y[:1]), (x, y * 0), (x, y * 0 + 9)]
    if hasattr(book, "Space"):
        cases += [(7 * x, y), (x - 2, y), (x[..., :5, :6], y), (x[..., :2, :3], y)]
    else:
        whole_numbers = book.to_uint8(x)
        cases += [(whole_numbers, y), (whole_numbers[:, 0], y), (x[:, 0], y),
                  (x.sign()[..., :4], y)]
    images, labels = cases[case]
    state, cfg = state_of(book), settings_of(book)
    folder = None if case % 2 else tmp_path / "run"
    book.train(state, images, labels, book.make_alpha_bar("cosine", T), cfg, folder)
    assert state.step == 2 and all(math.isfinite(loss) for loss in state.losses)
    assert (tmp_path / "run/checkpoint.pt").exists() == (folder is not None)


@given(st.data())
@many(120)
def test_train_autoencoder(lat, autoencoding, data):
    space = lat.replace(lat.make_config("smoke", "MNIST")[0], batch=2, steps=1)
    x = torch.rand(6, 28, 28) * 2 - 1
    what = data.draw(st.sampled_from(["images", "images", "folder"]))
    if what == "images":
        value = data.draw(st.one_of(tensors(x).filter(
            lambda v: getattr(v, "ndim", 0) not in (2, 4)), st.sampled_from([
                (x + 1) / 2, x * 2, x * 255, x[:, 1:], x[..., :32, :20], x[:, None].repeat(
                    1, 3, 1, 1), torch.rand(6, 32, 32) - 0.5, torch.rand(6, 2, 28, 28) - 0.5])))
    else:
        value = data.draw(ODD.filter(lambda v: v is not None and not isinstance(v, Path)))
    good = {"images": x, "folder": None}
    refused(lat, lambda: lat.train_autoencoder(autoencoding, cfg=space, **{
        **good, what: value}), [what, "pictures"], "autoencoder", what, value)
    assert autoencoding.step == 0


@pytest.fixture(scope="session")
def autoencoding(lat):
    """A training of an autoencoder that no bad input may start."""
    return lat.State(lat.make_config("smoke", "MNIST")[0], 1, CPU, lat.Autoencoder)


def test_good_pictures_pass_the_autoencoder(lat):
    space = lat.replace(lat.make_config("smoke", "MNIST")[0], batch=2, steps=1)
    x = torch.rand(6, 28, 28) * 2 - 1
    for images in (x, x[:, None], lat.to_uint8(x), lat.to_uint8(x)[:1]):
        state = lat.State(space, 1, CPU, lat.Autoencoder)
        lat.train_autoencoder(state, images, space, None)
        assert state.step == 1 and math.isfinite(state.losses[0])


# -------------------------------------------------------------------- sample and draw

@pytest.fixture(scope="session")
def models(nb, lat):
    """A small network of each notebook in which every weight counts."""
    torch.manual_seed(0)
    made = {}
    for book in (nb, lat):
        net = state_of(book).model
        for p in net.parameters():
            nn.init.normal_(p, std=0.1)
        net.dtype = None
        made[book.__name__] = net.requires_grad_(False).eval()
    return made


def ways(book, model):
    """Each function that draws: name to (function, its good arguments)."""
    curve = book.make_alpha_bar("cosine", T)
    x = torch.rand(2, *data_of(book)[0].shape[1:]) * 2 - 1
    y = torch.tensor([3, 10])
    given = {"model": model, "alpha_bar": curve, "kind": "v", "y": y}
    found = {"sample": (lambda **k: book.final(book.sample(**k)), {
        **given, "x_T": x, "steps": 3, "eta": 0.5, "seed": 1})}
    if hasattr(book, "Space"):
        return found
    times = [50, 30, 7, 0]
    return found | {
        "multistep": (lambda **k: book.final(book.multistep(**k)), {
            **given, "x_T": x, "times": times, "eta": 1.0, "order": 2, "seed": 1}),
        "heun": (lambda **k: book.final(book.heun(**k)), {**given, "x_T": x, "times": times}),
        "invert": (book.invert, {**given, "x_0": x, "steps": 3, "repeats": 1}),
        "inpaint": (book.inpaint, {**given, "x_0": x, "steps": 3, "repeats": 2, "seed": 1,
                                   "mask": book.hole((2, 2, 4, 4), 8, 8)}),
        "finish": (book.finish, {**given, "x_t": x, "t": 20, "steps": 9, "eta": 0.0,
                                 "seed": 1}),
        "sdedit": (book.sdedit, {**given, "x_0": x, "strength": 0.5, "steps": 9, "seed": 1})}


def test_all_ways_work_with_good_input(book, models):
    for name, (way, good) in ways(book, models[book.__name__]).items():
        x = way(**good)
        assert x.shape == (2, *data_of(book)[0].shape[1:]) and x.isfinite().all(), name
        assert x.std() > 0 and torch.equal(x, way(**good))


def bad_value(data, book, name, good):
    """Something that the argument called name must not be."""
    x = good.get("x_T", good.get("x_0", good.get("x_t")))
    pictures = [x[:, :0], x.repeat(1, 5, 1, 1), x[:0]]
    if x.shape[-1] == 8:
        pictures += [x[..., 1:], x[..., :6, :], x[..., :3, :3]]
    bounded = name == "x_0" and "mask" in good or "strength" in good
    values = (math.nan, math.inf, -math.inf, *([255.0, 1.2, -3.0] if bounded else []))
    spoiled = tensors(x, values).filter(lambda v: getattr(v, "dtype", 0) != torch.float64)
    return data.draw({
        "x": st.one_of(spoiled, st.none(), st.sampled_from(pictures)),
        "alpha_bar": spoiled_curves(good["alpha_bar"]),
        "kind": WORD.filter(lambda v: not word(v, "v", "eps", "x_0")),
        "steps": st.one_of(ANY, st.integers(51, 99)).filter(lambda v: not whole(v, 1, T)),
        "t": ANY.filter(lambda v: not whole(v, 0, T)),
        "seed": ANY.filter(lambda v: not whole(v, 0, 2 ** 62)),
        "eta": st.one_of(ANY, st.floats(1.01, 9)).filter(lambda v: not real(v, 0, 1)),
        "strength": ANY.filter(lambda v: not real(v, 0, 1)),
        "repeats": ANY.filter(lambda v: not whole(v, 0, 100)),
        "order": ANY.filter(lambda v: not whole(v, 1, 2)),
        "y": st.one_of(tensors(good["y"], (-1, 11, -10, 99)), st.sampled_from([
            torch.arange(n) for n in (1, 3, 4)])).filter(lambda v: show(v) != show(
                torch.tensor([1, 2]))),
        "times": st.one_of(ODD, st.lists(ANY, max_size=4), st.sampled_from([
            [50, 30, 7], [0, 7, 50], [50, 50, 0], [51, 20, 0], [50, -1, 0], [0], [50.0, 0],
            [50, 20, 30, 0], [True, 0], [1000, 0]])).filter(lambda v: not (
                isinstance(v, list) and len(v) > 1 and all(whole(t, 0, T) for t in v)
                and v == sorted(set(v))[::-1] and v[-1] == 0)),
        "mask": st.one_of(ODD, st.sampled_from([
            good.get("mask"), None, torch.ones(1, 1, 8, 8), torch.ones(8, 8).bool(),
            torch.ones(1, 1, 9, 9).bool(), torch.ones(3, 1, 8, 8).bool()]).filter(
                lambda m: m is not good.get("mask")))
    }[name if name[:2] != "x_" else "x"])


@given(st.data())
@many(300)
def test_ways_to_draw(book, models, data):
    known = ways(book, models[book.__name__])
    name = data.draw(st.sampled_from([*known, *["sample"] * (len(known) // 3)]))
    way, good = known[name]
    what = data.draw(st.sampled_from([key for key in good if key != "model"]))
    value = bad_value(data, book, what, good)
    refused(book, lambda: way(**{**good, what: value}), said_of(what), name, what, value)


def said_of(what) -> list[str]:
    """What a sentence about this argument may name."""
    return {"times": ["time"], "x_0": ["x_0", "x_T", "x_t", "mask", "y has"], "x_t": [
        "x_T", "x_t", "y has"], "x_T": ["x_T", "x_t", "z_t", "y has"]}.get(what, [what])


def test_every_argument_of_every_way_to_draw(book, models):
    for name, (way, good) in ways(book, models[book.__name__]).items():
        for what in good.keys() - {"model"}:
            for value in (None, "x", math.nan, -1, 10 ** 6, (), 0.5j, np.zeros(3)):
                if what + str(value) not in ("yNone", "seed1000000"):
                    refused(book, lambda: way(**{**good, what: value}), said_of(what), name,
                            what, value)
        for x in (key for key in ("x_0",) if {"mask", "strength"} & good.keys()):
            for value in (good[x] * 127.5 + 127.5, good[x] * 1.1 + 1):
                refused(book, lambda: way(**{**good, x: value}), ["x_0"], name, x, value)


@pytest.mark.parametrize("times", [
    [50, 30, 7], [0, 7, 50], [50, 50, 0], [51, 20, 0], [50, -1, 0], [0], [50.0, 0], [True, 0],
    [50, 20, 30, 0], [1000, 0], [50, 7.0, 0], [], [50, None, 0], (50, 0), "50, 0"])
def test_times_fall_to_zero(nb, models, times):
    for name in ("multistep", "heun"):
        way, good = ways(nb, models[nb.__name__])[name]
        refused(nb, lambda: way(**{**good, "times": times}), ["time"], name, times)
        assert way(**{**good, "times": [40, 1, 0]}).isfinite().all()  # "leading" starts low


@pytest.mark.parametrize("changes", [
    {"steps": 1}, {"steps": T}, {"eta": 0}, {"eta": 1}, {"eta": 1.0}, {"y": None},
    {"y": torch.tensor([10, 10])}, {"y": torch.tensor([0, 9])}, {"seed": 0}, {"kind": "x_0"}])
def test_good_sampling_at_the_edges_passes(book, models, changes):
    way, good = ways(book, models[book.__name__])["sample"]
    x = way(**{**good, **changes})
    assert x.shape == good["x_T"].shape and x.isfinite().all() and x.abs().max() <= 1 + 1e-5
    again = way(**{**good, **changes, "x_T": good["x_T"].double()})
    torch.testing.assert_close(again.float(), x, atol=1e-4, rtol=1e-3)


@given(st.data())
@many(120)
def test_steps_of_the_process(book, data):
    curve, x = book.make_alpha_bar("cosine", T), torch.randn(3, 1, 4, 4)
    t, eps = torch.tensor([0, 7, T]), torch.randn(3, 1, 4, 4)
    good = {"x_0": x, "t": t, "eps": eps}
    what = data.draw(st.sampled_from(["t", "t", "x_0", "eps", "s"]))
    if what == "s":
        a, b = data.draw(st.tuples(ANY, ANY))
        if whole(a, 1, T) and whole(b, 0, a - 1):
            assert book.reverse_step(x, x, a, b, curve, 0.0, 0.0).isfinite().all()
        else:
            refused(book, lambda: book.reverse_step(x, x, a, b, curve, 0.0, 0.0),
                    ["t is", "s is"], "reverse", a, b)
        return
    wrong = {"t": tensors(t, (-1, -50, 51, 999)), "x_0": tensors(x).filter(
                lambda v: getattr(v, "dtype", 0) != torch.float64 and (
                    not isinstance(v, torch.Tensor) or len(v.shape) != 5)),
             "eps": st.sampled_from([x[:1], x[:, :, :3], x[None], x.flatten(1)])}[what]
    value = data.draw(wrong)
    refused(book, lambda: book.q_sample(alpha_bar=curve, **{**good, what: value}), [what],
            "q_sample", what, value)


@given(ANY)
@many(60)
def test_one_step_of_the_process(nb, t):
    curve, x = nb.make_alpha_bar("cosine", T), torch.zeros(2)
    for step in (lambda: nb.q_step(x, t, curve), lambda: nb.posterior(x, x, t, curve)[0]):
        if whole(t, 1, T):
            assert step().isfinite().all()
        else:
            refused(nb, step, ["t is"], step.__code__.co_firstlineno, t)
    if whole(t, 1, T):
        assert nb.predict(lambda x, t, y: x, x, t, curve, "v")[1].isfinite().all()
    else:
        refused(nb, lambda: nb.predict(lambda x, t, y: x, x, t, curve, "v"), ["t is"],
                "predict", t)
    if whole(t, 1, 100_000):
        assert nb.timesteps(t, 1) == [t, 0]
    else:
        refused(nb, lambda: nb.timesteps(t, 1), ["T is"], "timesteps", t)
    if not whole(t, 0, 2 ** 62):
        refused(nb, lambda: nb.noise((2,), t), ["seed"], "noise", t)


@given(name=WORD, calls=ANY, spaced=WORD, what=st.integers(0, 2))
@many(100)
def test_few_step(nb, models, name, calls, spaced, what):
    name = name if what == 0 else "2M"
    calls = calls if what == 1 else 10
    spaced = spaced if what == 2 else "trailing"
    if what == 1 and whole(calls, 1, T):
        nb.few_step(name, None, settings_of(nb), calls, spaced)
    else:
        too_many = "steps" if whole(calls, T + 1, 2 * T) else "calls"
        refused(nb, lambda: nb.few_step(name, None, settings_of(nb), calls, spaced), [
            ["sampler"], [too_many], ["spacing"]][what], "few", name, calls, spaced)


DRAWN = {"n": lambda v: whole(v, 1, 10 ** 6), "labelled": lambda v: type(v) is bool,
         "seed": lambda v: whole(v, 0, 2 ** 62), "calls": lambda v: whole(v, 1, 10 ** 6),
         "w": lambda v: real(v) or v is True, "eta": lambda v: real(v, 0, 1)}


@given(st.data())
@many(120)
def test_draw(book, models, data):
    what = data.draw(st.sampled_from(list(DRAWN)))
    value = data.draw(ANY.filter(lambda v: not DRAWN[what](v)))
    good = dict(n=2, labelled=True, seed=0, calls=2, w=2.0)
    model, cfg = models[book.__name__], settings_of(book)
    if hasattr(book, "Space") and what != "eta":
        coder = book.Autoencoder(book.make_config("smoke", "MNIST")[0])
        latent = model, coder, book.Scale(torch.randn(9, *coder.code))
        refused(book, lambda: book.draw_latents(latent, its=cfg, **{**good, what: value}),
                [what], "draw_latents", what, value)
    shape = data_of(book)[0].shape[1:]
    refused(book, lambda: book.draw(model, its=cfg, device=CPU, shape=shape, **{
        **good, what: value}), [what], "draw", what, value)


@given(ODD)
@many(30)
def test_draw_latents_wants_three(lat, latent):
    refused(lat, lambda: lat.draw_latents(latent, 2, settings_of(lat), True, 0, 2),
            ["(model, coder, scale)"], "latent", latent)


# ----------------------------------------------------------------- guidance, networks

@given(ANY.filter(lambda v: not real(v)))
@many(60)
def test_weights_of_guidance(book, models, w):
    refused(book, lambda: book.guided(models[book.__name__], w), ["w is"], "w", w)


def test_guidance_without_labels_is_refused(book, models):
    model, good = models[book.__name__], ways(book, models[book.__name__])["sample"][1]
    run = {**good, "model": book.guided(model, 2.0)}
    assert book.final(book.sample(**run)).isfinite().all()
    refused(book, lambda: book.final(book.sample(**{**run, "y": None})), ["give y"], "no y")
    fresh = state_of(book)
    for net in (fresh.model, fresh.ema):
        refused(book, lambda net=net: book.guided(net, 2.0), ["label_drop"], "fresh", type(net))
    deaf = types.SimpleNamespace(calls=0)

    def ignores(x_t, t, y):
        deaf.calls += 1
        return 0.5 * x_t

    refused(book, lambda: book.final(book.sample(**{**run, "model": book.guided(
        ignores, 2.0)})), ["label"], "ignores")
    assert deaf.calls == 1


@pytest.mark.parametrize("drop", (0.0, 1.0))
def test_a_model_trained_with_all_or_no_labels_cannot_be_guided(book, drop):
    x, y = data_of(book)
    network = book.LatentUNet if hasattr(book, "Space") else book.UNet
    states = []
    for share in (drop, 0.5):
        cfg = book.replace(settings_of(book), steps=9, label_drop=share)
        states.append(book.State(cfg, x.shape[1], CPU, network))
        book.train(states[-1], x, y, book.make_alpha_bar("cosine", T), cfg, None)
    for net in (states[0].model, states[0].ema):
        refused(book, lambda net=net: book.guided(net, 2.0), [
            "label_drop below 1" if drop else "label_drop above 0"], drop, type(net))
    state = states[1]
    start = torch.randn(2, *x.shape[1:])
    run = book.sample(book.guided(state.model, 2.0), start, book.make_alpha_bar("cosine", T),
                      "v", 2, y=torch.tensor([1, 2]))
    assert book.final(run).isfinite().all()


@given(batch=st.integers(1, 3), channels=st.integers(0, 5), high=st.integers(0, 33),
       wide=st.integers(0, 33), times=st.integers(1, 3), axes=st.sampled_from([4, 4, 4, 3, 5]))
@many(200)
def test_networks(book, models, batch, channels, high, wide, times, axes):
    model, latents = models[book.__name__], hasattr(book, "Space")
    x = torch.randn(batch, channels, high, wide)
    x = {3: x[0], 4: x, 5: x[None]}[axes]
    good = axes == 4 and batch == times and x.numel() > 0 and (
        channels == 4 if latents else channels == 1 and high % 4 == 0 == wide % 4)
    t = torch.ones(times, dtype=torch.long)
    if good:
        assert model(x, t).shape == x.shape and model(x, t).isfinite().all()
    else:
        refused(book, lambda: model(x, t), [str(list(x.shape))], "net", x.shape, times)
    if latents:
        coder = book.Autoencoder(book.make_config("smoke", "MNIST")[0])
        if x.shape[1:] != (1, 28, 28):
            refused(book, lambda: coder.encode(x), ["pictures"], "encode", x.shape)
        if x.shape[1:] != (4, 7, 7):
            refused(book, lambda: coder.decode(x), ["codes"], "decode", x.shape)


# ------------------------------------------------------------------------- the number

def test_two_thousand_bad_inputs_were_refused(request):
    mine = {item.originalname for item in request.session.items
            if item.path == request.node.path} - {request.node.originalname}
    everything = {name for name in globals() if name.startswith("test_")}
    if mine | {request.node.originalname} != everything or not mine <= RAN:
        pytest.skip("only when the whole file runs")
    by_book = {name: sum(key[0] == name for key in SEEN) for name in ("diffusion_tutorial",
                                                                     "latent_diffusion_cab")}
    print(len(SEEN), by_book)
    assert len(SEEN) >= 2000 and min(by_book.values()) >= 800, by_book

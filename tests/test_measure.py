"""Yardsticks against their formulas, shipped weights and kept results."""
import hashlib
import json
import re

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import ROOT, awake

WEIGHTS = ROOT / "assets/weights"
NAMES = ("FashionMNIST", "MNIST")


@pytest.fixture(scope="module")
def features():
    """Two sets of correlated features, as a classifier would give them."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(128, 128, generator=g) / 11
    return ((torch.randn(600, 128, generator=g) @ mix).relu(),
            (torch.randn(500, 128, generator=g) @ mix + 0.2).relu())


def test_fid_equals_its_formula(nb, features):
    real, fake = features
    a, b = np.cov(real.double().T.numpy()), np.cov(fake.double().T.numpy())
    root = scipy.linalg.sqrtm(a @ b).real
    expected = (real.mean(0) - fake.mean(0)).square().sum() + np.trace(a + b - 2 * root)
    assert nb.fid(real, fake) == pytest.approx(float(expected), rel=1e-3)
    assert abs(nb.fid(real, real)) < 1e-3


def test_excess_is_fid_less_the_mean_floor_at_the_same_number(nb, features):
    real, fake = features
    eye = nb.Eye(lambda x: fake, real, torch.randn(1300, 128))
    by_hand = [nb.fid(real, eye.held_out[i:i + 500]) for i in (0, 500)]  # whole sets
    assert nb.floors(eye, 500) == pytest.approx(by_hand)
    assert nb.excess_fid(eye, torch.zeros(500, 1, 4, 4, dtype=torch.uint8)) == pytest.approx(
        nb.fid(real, fake) - np.mean(by_hand))


def test_precision_and_recall_equal_a_plain_loop(nb, features):
    a, b = features[0][:60], features[1][:50]
    gaps, own = torch.cdist(a, b), torch.cdist(b, b)
    radius = [sorted(row)[3] for row in own.tolist()]  # the 3rd nearest other one
    by_hand = np.mean([any(gaps[i, j] <= radius[j] for j in range(50)) for i in range(60)])
    assert nb.covered(a, b) == pytest.approx(by_hand)
    assert nb.covered(b, b) == 1 and nb.covered(b + 100, b) == 0
    torch.testing.assert_close(nb.neighbour(a, b), gaps.amin(1))


def test_paired_differences_and_their_standard_error(nb):
    gap, error = nb.paired([3.0, 5, 9], [1.0, 4, 4])
    assert gap == pytest.approx(8 / 3)
    assert error == pytest.approx(np.std([2, 1, 5], ddof=1) / 3 ** 0.5)


def test_bytes_are_clamped_before_the_cast_and_come_back(nb):
    x = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5]).view(1, 1, 1, 5)
    assert nb.to_bytes(x).flatten().tolist() in ([0, 0, 127, 255, 255], [0, 0, 128, 255, 255])
    every = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    assert torch.equal(nb.to_bytes(nb.scale(every)), every)


@pytest.mark.parametrize("name, wanted", zip(NAMES, (0.91, 0.99)))
def test_shipped_classifier_is_accurate_and_tells_real_from_damaged(nb, name, wanted):
    x, y, _ = nb.load_data(name, train=False)
    classifier = nb.load_classifier(name)
    f = nb.features_of(classifier, x)
    accuracy = (classifier.head(f).argmax(1) == y).float().mean().item()
    facts = json.loads((WEIGHTS / f"classifier-{name.lower()}.json").read_text())
    assert accuracy >= wanted and accuracy == pytest.approx(facts["test accuracy"], abs=2e-3)
    held = nb.scale(x[5000:7000])
    scores = [nb.fid(f[:5000], nb.features_of(classifier, nb.to_bytes(
        held + amount * nb.draw_noise(held.shape, 0)))) for amount in (0, 0.1, 0.5)]
    assert scores[0] < 0.5 * scores[1] < scores[2]


def test_judge_sees_missing_classes_copies_and_wrong_labels(nb):
    x, y, _ = nb.load_data("MNIST", train=False)
    classifier = nb.load_classifier("MNIST")
    f = nb.features_of(classifier, x)
    eyes = {"classifier": nb.Eye(lambda x: nb.features_of(classifier, x), f[:5000], f[5000:])}
    for keep in (y < 2, y >= 0):
        some, labels = x[5000:][keep[5000:]][:800], y[5000:][keep[5000:]][:800]
        found = nb.judge(some, labels, classifier, eyes, f[:5000], 0.1)
        assert found["as asked"] > 0.97 and found["too near"] < 0.02
        assert found["variety"] == pytest.approx(1 if keep.all() else 0.6, abs=0.2)
        assert found["precision"] > 0.7 and (found["recall"] > 0.7) == bool(keep.all())
        copies = nb.judge(some, (labels + 1) % 10, classifier, eyes, f[5000:], 0.1)
        assert copies["too near"] > 0.99 and copies["as asked"] < 0.03


def test_drawn_pictures_depend_on_the_seed_alone_and_no_noise_is_used_twice(nb, tiny,
                                                                            monkeypatch):
    net, schedule = awake(nb.UNet(tiny), 0.05), nb.make_schedule("cosine", 50)
    denoise, y, seeds = nb.denoiser(net, schedule, "v"), torch.arange(260) % 10, []
    first, again, other = (nb.draw(denoise, schedule, y, nb.timesteps(50, 2), (1, 28, 28),
                                   seed=seed) for seed in (1, 1, 2))
    assert first.shape == (260, 1, 28, 28) and torch.equal(first, again)
    assert not torch.equal(first[:10], first[250:]) and not torch.equal(first, other)
    draw_noise = nb.draw_noise
    monkeypatch.setattr(nb, "draw_noise",
                        lambda shape, seed: seeds.append(seed) or draw_noise(shape, seed))
    monkeypatch.setattr(nb, "sample", lambda d, x_T, schedule, times, eta, y, clip, seed:
                        seeds.append(seed) or iter([(0, x_T, x_T)]))
    nb.draw(denoise, schedule, torch.zeros(600).long(), [50, 0], (1, 4, 4), seed=5)
    assert len(seeds) == len(set(seeds)) == 6


def test_every_rung_has_the_one_interface(nb, tiny):
    x, t, y = torch.randn(4, 1, 28, 28), torch.tensor([1, 9, 30, 50]), torch.arange(4)
    for name, (network, _) in nb.LADDER.items():
        net = awake(network(tiny, 1))
        out = net(x, t, y)
        assert out.shape == x.shape and out.dtype == torch.float32, name
        assert not torch.equal(out, net(x, t)), f"{name} ignores labels"
        assert torch.equal(out, net(x, t.flip(0), y)) == (name == "no time"), name
        alone = torch.cat([net(x[i:i + 1], t[i:i + 1], y[i:i + 1]) for i in range(4)])
        assert torch.allclose(out, alone, atol=1e-3 * out.abs().max().item()), name


@pytest.mark.parametrize("file", sorted(WEIGHTS.glob("*.pt")), ids=lambda file: file.stem)
def test_shipped_files_are_those_of_the_facts_beside_them(file):
    facts = json.loads(file.with_suffix(".json").read_text())
    assert facts["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert {"data", "device", "minutes"} <= facts.keys()
    torch.load(file, weights_only=True)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_network_draws_what_it_is_asked_for(nb, name):
    classifier, (x, _, _) = nb.load_classifier(name), nb.load_data(name, train=False)
    net, cfg = nb.load_net(WEIGHTS / f"{name.lower()}.pt")
    schedule, y = nb.make_schedule(cfg.schedule, cfg.T), torch.arange(200) % 10
    drawn = nb.draw(nb.denoiser(net, schedule, cfg.predict), schedule, y,
                    nb.timesteps(cfg.T, 15), (1, 28, 28))
    real, f, noise = (nb.features_of(classifier, pictures) for pictures in (
        x, nb.to_bytes(drawn), nb.to_bytes(torch.randn(1000, 1, 28, 28))))
    assert nb.fid(real, f) - nb.fid(real, real[:200]) < 0.05 * nb.fid(real, noise)
    assert (classifier.head(f).argmax(1) == y).float().mean() > 0.75


def test_kept_results_are_whole():
    files = [*(ROOT / "assets/results").iterdir(), *(ROOT / "assets/figures").iterdir()]
    assert sum(file.stat().st_size for file in files) <= 2.5e6
    for file in (ROOT / "assets/results").glob("*.json"):
        kept = json.loads(file.read_text())
        assert kept["rows"], file.name
        facts = kept.get("begin", kept)  # the ladder was climbed on two machines
        assert facts["device"] and re.fullmatch("[0-9a-f]{7,}", facts["commit"]), file.name
        assert not re.search(r"\b(NaN|Infinity)\b", file.read_text()), file.name
        for row in kept["rows"] if "floor" in kept else ():
            assert row["excess"] == pytest.approx(row["FID"] - kept["floor"], abs=2e-3)


def mean_excess(file: str, **wanted: object) -> float:
    """Of the kept rows in which these columns have these values."""
    rows = json.loads((ROOT / f"assets/{file}.json").read_text())["rows"]
    return np.mean([row["excess"] for row in rows if wanted.items() <= row.items()])


def test_readme_says_what_the_kept_results_say():
    readme = "".join((ROOT / folder / "README.md").read_text() for folder in (
        "", "assets/results")).replace("**", "")
    rows = json.loads((WEIGHTS / "words-mnist.json").read_text())["rows"]
    for case in {(r["network"], r["question"]) for r in rows if r["question"][4:] in (
            "thing", "things") and r["seed"]}:
        some = [[*r.values()][5:] for r in rows if (r["network"], r["question"]) == case]
        assert " | ".join(f"{100 * np.mean(x):.1f}%" for x in zip(*some)) in readme, case
    clothes, digits = (f"results/verdict-{name}" for name in ("fashionmnist", "mnist"))
    few, best = "results/few-fashionmnist", "2M with noise"
    for line, means in (
            *(("| {:.1f} |", [mean_excess("results/peers", network=name)])
              for name in ("peer", "reference", "ours")),
            ("(the same); {:.2f} |", [mean_excess(clothes, sampler=best, N=2000)]),
            ("H200 | {:.2f}; {:.2f}; {:.2f} |", [mean_excess(few, method="pairs", calls=n)
                                                 for n in (1, 2, 4)]),
            ("2000, 5 seeds | {:.3f} |", [mean_excess(clothes, sampler=best, N=2000)]),
            ("10,000, 1 seed | {:.3f} |", [mean_excess(clothes, sampler=best, N=10_000)]),
            *(("| {:.2f}; {:.2f} |", [mean_excess(file, sampler="eta = 1", N=n)
                                      for n in (2000, 10_000)]) for file in (clothes, digits)),
            ("| {:.2f}; {:.2f} |", [mean_excess(few, method=name, calls=10)
                                    for name in ("DDIM", best)]),
            ("| {:.2f}, {:.2f}, {:.2f}, {:.2f} |", [mean_excess(few, method="pairs", calls=n)
                                                    for n in (1, 2, 4, 8)]),
            ("| {:.2f}; {:.2f} |", [mean_excess("weights/latent-fashionmnist", eta=0.5, w=w)
                                    for w in (1.25, 1)]),
            ("2000, 5 seeds | {:.2f} |", [mean_excess("weights/latent-mnist", eta=1, w=1)])):
        assert line.format(*means) in readme, line

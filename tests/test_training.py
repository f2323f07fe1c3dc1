"""Batches, loss, EMA, and resume to the bit; faults are in test_faults.py."""
import pytest
import torch

IMAGES = torch.randint(0, 256, (300, 28, 28), dtype=torch.uint8)
LABELS = torch.arange(300) % 10
CPU = torch.device("cpu")


def test_batch_is_a_function_of_seed_and_step(nb, tiny):
    first, again = (nb.make_batch(IMAGES, LABELS, 3, tiny) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    for other in (nb.make_batch(IMAGES, LABELS, 4, tiny),
                  nb.make_batch(IMAGES, LABELS, 3, nb.replace(tiny, seed=1))):
        assert not torch.equal(first[3], other[3])


def all_t(nb, cfg, steps):
    """The t of the first batches, [steps, batch]."""
    return torch.stack([nb.make_batch(IMAGES, LABELS, step, cfg)[2] for step in range(steps)])


def test_even_t_are_stratified_over_1_to_T(nb, tiny):
    t = all_t(nb, nb.replace(tiny, T=100, batch=50, t_even=1.0), 200)
    assert torch.equal((t - 1) // 2, torch.arange(50).expand(200, 50))  # slices of two
    assert set(t.flatten().tolist()) == set(range(1, 101))


def test_most_t_are_logit_normal_and_stratified(nb, tiny):
    t = all_t(nb, nb.replace(tiny, T=10_000, batch=50, t_even=0.0), 200)
    assert (t.diff(dim=1) >= 0).all() and t.min() >= 1 and t.max() <= 10_000
    u = (torch.arange(51) / 50).double()
    edges = 1 + 10_000 / (1 + torch.exp(-1.2 * 2 ** 0.5 * torch.erfinv(2 * u - 1)))
    assert (t >= edges[:-1].floor()).all() and (t <= edges[1:].ceil()).all()


def test_a_share_of_t_comes_from_all_of_1_to_T(nb, tiny):
    assert 0 < nb.make_config("cpu", "MNIST").t_even < 0.5
    t = all_t(nb, nb.replace(tiny, T=50, batch=50, t_even=0.2), 1000)
    shares = torch.bincount(t.flatten(), minlength=51) / t.numel()
    assert shares[0] == 0 and (shares[1:] > 0.9 * 0.2 / 50).all()
    assert shares[21:31].sum() > 1.5 * shares[1:11].sum()


def test_labels_are_dropped_per_image(nb, tiny):
    cfg = nb.replace(tiny, batch=200, label_drop=0.3)
    shares = torch.tensor([(nb.make_batch(IMAGES, LABELS, step, cfg)[1] == 10).float().mean()
                           for step in range(50)])
    assert shares.mean() == pytest.approx(0.3, abs=0.02)
    assert 0.1 < shares.min() and shares.max() < 0.5  # never a whole batch


@pytest.mark.parametrize("kind", ("v", "eps", "x_0"))
def test_loss_is_zero_for_the_right_answer_only(nb, kind):
    alpha_bar, t = nb.make_alpha_bar("cosine", 100), torch.tensor([1, 50, 100])
    x_0, eps = torch.randn(2, 3, 1, 4, 4).unbind(0)
    a = alpha_bar[t].float().view(-1, 1, 1, 1)
    right = {"eps": eps, "x_0": x_0, "v": a.sqrt() * eps - (1 - a).sqrt() * x_0}[kind]
    args = (x_0, None, t, eps, alpha_bar, kind)
    assert nb.losses_of(lambda x, t, y: right, *args).max() < 1e-10
    off = nb.losses_of(lambda x, t, y: right + 0.5, *args)
    torch.testing.assert_close(off, torch.full((3,), 0.25), atol=1e-5, rtol=0)


def test_ema_warms_up_and_forgets_the_start(nb, tiny):
    state, average = nb.State(tiny, 1, CPU), 0.0
    for n in range(8):
        with torch.no_grad():
            for p in state.model.parameters():
                p.fill_(float(n * n))
        state.ema.update_parameters(state.model)
        keep = min(tiny.ema_decay, (1 + n) / (10 + n)) if n else 0  # first a copy
        average = keep * average + (1 - keep) * n * n
        for p in state.ema.module.parameters():
            torch.testing.assert_close(p, torch.full_like(p, average))
    assert average > 20  # a plain decay of 0.995 would still be near the first values


def test_learning_rate_warms_up_and_ends_at_zero(nb, tiny):
    cfg = nb.replace(tiny, steps=1000, warmup=50)
    factors = [nb.learning_rate(step, cfg) for step in range(1001)]
    assert factors[0] == pytest.approx(1 / 50, rel=0.01) and max(factors) > 0.99
    assert factors[1000] == 0 and all(a > b for a, b in zip(factors[60:], factors[61:]))


def same(a, b):
    """True if two checkpoint contents are equal to the last bit, but for the time taken."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(
            k == "seconds" or same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def finished(nb, cfg, folder, watch=lambda state: None):
    """Resume in folder, train to the end, and return what the checkpoint holds."""
    state, alpha_bar = nb.State(cfg, 1, CPU), nb.make_alpha_bar(cfg.schedule, cfg.T)
    nb.resume(state, cfg, folder)
    nb.train(state, IMAGES, LABELS, alpha_bar, cfg, folder, watch)
    return nb.read_checkpoint(folder / "checkpoint.pt")


@pytest.mark.parametrize("stop", (1, 4, 5, 9))
def test_interrupted_training_ends_in_the_same_bits(nb, tiny, tmp_path, stop, capsys):
    def press_stop(state):
        if state.step == stop:
            raise KeyboardInterrupt

    straight = finished(nb, tiny, tmp_path / "a")
    state = nb.State(tiny, 1, CPU)
    nb.train(state, IMAGES, LABELS, nb.make_alpha_bar("cosine", tiny.T), tiny,
             tmp_path / "b", press_stop)
    assert f"Stopped at step {stop} of 10" in capsys.readouterr().out
    assert (tmp_path / "b/checkpoint.pt").exists() == (stop > 4)  # a stop writes nothing
    assert torch.isfinite(state.ema(torch.randn(1, 1, 28, 28), torch.tensor([1]))).all()
    assert same(straight, finished(nb, tiny, tmp_path / "b"))


def test_another_configuration_is_refused_and_has_its_own_folder(nb, tiny, tmp_path):
    finished(nb, tiny, tmp_path)
    other = nb.replace(tiny, lr=1e-4)
    with pytest.raises(nb.ReaderError, match="another configuration"):
        finished(nb, other, tmp_path)
    assert nb.run_folder(tiny) != nb.run_folder(other)
    assert nb.run_folder(tiny) == nb.run_folder(nb.replace(tiny, n_samples=4))


def test_nan_stops_with_the_step_and_keeps_the_checkpoint(nb, tiny, tmp_path):
    state, alpha_bar = nb.State(tiny, 1, CPU), nb.make_alpha_bar("cosine", tiny.T)

    def poison(state):
        if state.step == 6:
            with torch.no_grad():
                next(state.model.parameters()).fill_(float("nan"))

    with pytest.raises(nb.ReaderError, match="step 6"):
        nb.train(state, IMAGES, LABELS, alpha_bar, tiny, tmp_path, poison)
    assert nb.read_checkpoint(tmp_path / "checkpoint.pt")["step"] == 4


def test_named_checkpoint_loads_and_unknown_names_list_the_known(nb, tiny, tmp_path):
    folder = nb.run_folder(tiny)
    state = nb.State(tiny, 1, CPU)
    nb.train(state, IMAGES, LABELS, nb.make_alpha_bar("cosine", tiny.T), tiny, folder)
    x, t = torch.randn(2, 1, 28, 28), torch.tensor([5, 40])
    loaded, its = nb.load_model(folder.name, nb.Config(), 1, CPU)
    assert torch.equal(loaded(x, t), state.ema(x, t))
    assert its.T == tiny.T and its.widths == list(tiny.widths)
    with pytest.raises(nb.ReaderError, match=folder.name):
        nb.load_model("nothing", tiny, 1, CPU)


def test_a_warm_start_has_the_named_weights_and_refuses_another_shape(nb, tiny):
    alpha_bar, first = nb.make_alpha_bar("cosine", tiny.T), nb.State(tiny, 1, CPU)
    nb.train(first, IMAGES, LABELS, alpha_bar, tiny, nb.run_folder(tiny))
    cfg = nb.replace(tiny, start=nb.run_folder(tiny).name, seed=1)
    again, fresh = nb.State(cfg, 1, CPU), nb.State(cfg, 1, CPU)
    nb.warm_start(again, cfg, 1)
    for own in (again.model.parameters(), again.ema.module.parameters()):
        assert all(map(torch.equal, own, first.ema.module.parameters()))
    assert nb.run_folder(cfg) != nb.run_folder(tiny)
    nb.train(again, IMAGES, LABELS, alpha_bar, cfg, nb.run_folder(cfg))
    assert again.step == cfg.steps
    wider = nb.replace(cfg, widths=(16, 32))
    with pytest.raises(nb.ReaderError, match="widths"):
        nb.warm_start(nb.State(wider, 1, CPU), wider, 1)
    untouched = [p.clone() for p in fresh.model.parameters()]
    nb.warm_start(fresh, nb.replace(tiny, start=""), 1)
    assert all(map(torch.equal, untouched, fresh.model.parameters()))


def test_validation_loss_is_the_same_each_time(nb, tiny):
    state, alpha_bar = nb.State(tiny, 1, CPU), nb.make_alpha_bar("cosine", tiny.T)
    first, again = (nb.validation_loss(state.ema, (IMAGES, LABELS), alpha_bar, tiny)
                    for _ in range(2))
    assert first == again > 0


def test_training_learns(nb, tiny, tmp_path):
    cfg = nb.replace(tiny, steps=150, lr=5e-3)
    images = torch.zeros(50, 28, 28, dtype=torch.uint8)
    images[:, 7:21, 7:21] = 255
    state, alpha_bar = nb.State(cfg, 1, CPU), nb.make_alpha_bar("cosine", cfg.T)
    nb.train(state, images, torch.zeros(50, dtype=torch.long), alpha_bar, cfg, tmp_path)
    assert sum(state.losses[-5:]) < 0.7 * sum(state.losses[:5])


def test_unknown_profile_gets_one_sentence(nb):
    with pytest.raises(nb.ReaderError, match="smoke, cpu, long, gpu"):
        nb.make_config("fast", "MNIST")

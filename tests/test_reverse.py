"""The reverse process against Bayes, brute force and diffusers over whole trajectories."""
import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm

KINDS = {"eps": "epsilon", "v": "v_prediction", "x_0": "sample"}


def wild(x_t, t, y=None):
    """A deterministic model whose predictions leave [-1, 1], so that clamping matters."""
    return torch.sin(3 * x_t) + 0.5 * x_t + (t.view(-1, 1, 1, 1) % 7) / 7


def oracle_run(scheduler, alpha_bar_T, x, steps, seed, **flags):
    """Drive a diffusers scheduler with `wild`; its timestep is ours minus 1."""
    generator = torch.Generator().manual_seed(seed)
    scheduler.set_timesteps(steps)
    path = [x]
    for k in scheduler.timesteps:
        prediction = wild(x, torch.full((len(x),), int(k) + 1))
        x = scheduler.step(prediction, k, x, generator=generator, **flags).prev_sample
        path.append(x)
    return torch.stack(path)


@pytest.mark.parametrize("kind, clip", (  # "eps" without a clamp grows without bound here
    ("v", True), ("v", False), ("x_0", True), ("x_0", False), ("eps", True)))
@pytest.mark.parametrize("name", ("linear", "cosine"))
def test_ddpm_equals_diffusers_over_a_trajectory(nb, name, kind, clip):
    T, x = 200, nb.noise((4, 1, 8, 8), 0)
    alpha_bar = nb.make_alpha_bar(name, T)
    scheduler = diffusers.DDPMScheduler(
        T, trained_betas=nb.beta_from(alpha_bar)[1:].numpy(), clip_sample=clip,
        variance_type="fixed_small", prediction_type=KINDS[kind])
    theirs = oracle_run(scheduler, alpha_bar, x, T, 5)
    ours = torch.stack([x_t for _, x_t, _ in nb.sample(
        wild, x, alpha_bar, kind, T, eta=1.0, clip=clip, seed=5)])
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def ddim(nb, alpha_bar, kind, spacing="trailing"):
    """diffusers' DDIM under the flags that make it the same algorithm as ours."""
    return diffusers.DDIMScheduler(
        len(alpha_bar) - 1, trained_betas=nb.beta_from(alpha_bar)[1:].numpy(),
        clip_sample=True, set_alpha_to_one=True, timestep_spacing=spacing,
        prediction_type=KINDS[kind])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ("linear", "cosine"))
@pytest.mark.parametrize("steps, eta", ((200, 0.0), (20, 0.0), (20, 0.6), (200, 1.0)))
def test_ddim_equals_diffusers_over_a_trajectory(nb, name, kind, steps, eta):
    T, x = 200, nb.noise((4, 1, 8, 8), 0)
    alpha_bar = nb.make_alpha_bar(name, T)
    theirs = oracle_run(ddim(nb, alpha_bar, kind), alpha_bar, x, steps, 5, eta=eta,
                        use_clipped_model_output=True)
    ours = torch.stack([x_t for _, x_t, _ in nb.sample(
        wild, x, alpha_bar, kind, steps, eta=eta, seed=5)])
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=1e-3)


def test_without_rederived_eps_the_result_is_another(nb):
    alpha_bar, x = nb.make_alpha_bar("cosine", 200), nb.noise((4, 1, 8, 8), 0)
    theirs = oracle_run(ddim(nb, alpha_bar, "v"), alpha_bar, x, 20, 5, eta=0.0,
                        use_clipped_model_output=False)
    ours = nb.final(nb.sample(wild, x, alpha_bar, "v", 20))
    assert (ours - theirs[-1]).abs().max() > 0.1


@pytest.mark.parametrize("t", (1, 2, 50, 99, 100))
def test_posterior_is_bayes(nb, t):
    alpha_bar = nb.make_alpha_bar("cosine", 100)
    x_t, x_0 = 0.4, -0.8
    mean, variance = nb.posterior(torch.tensor(x_t, dtype=torch.float64),
                                  torch.tensor(x_0, dtype=torch.float64), t, alpha_bar)
    if t == 1:
        assert variance == 0 and float(mean) == pytest.approx(x_0)
        return
    a_s, beta = float(alpha_bar[t - 1]), float(1 - alpha_bar[t] / alpha_bar[t - 1])

    def joint(x):
        return (norm.pdf(x_t, (1 - beta) ** 0.5 * x, beta ** 0.5)
                * norm.pdf(x, a_s ** 0.5 * x_0, (1 - a_s) ** 0.5))

    around = float(mean) + np.array([-12, 12]) * variance ** 0.5
    total, m1, m2 = (quad(lambda x, k=k: x ** k * joint(x), *around)[0] for k in (0, 1, 2))
    assert float(mean) == pytest.approx(m1 / total, abs=1e-6)
    assert variance == pytest.approx(m2 / total - (m1 / total) ** 2, abs=1e-6)


@pytest.mark.parametrize("t", (1, 2, 57, 100))
def test_ddpm_step_is_the_posterior(nb, t):
    alpha_bar = nb.make_alpha_bar("linear", 100)
    x_t, x_0, z = torch.randn(3, 2, 1, 4, 4).double().unbind(0)
    mean, variance = nb.posterior(x_t, x_0, t, alpha_bar)
    step = nb.reverse_step(x_t, x_0, t, t - 1, alpha_bar, 1.0, z)
    torch.testing.assert_close(step, mean + variance ** 0.5 * z, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("eta", (0.0, 1.0))
def test_last_step_adds_no_noise_and_returns_x0_hat(nb, eta):
    alpha_bar, x = nb.make_alpha_bar("cosine", 60), nb.noise((3, 1, 8, 8), 1)
    *_, (t, _, x0_hat), (zero, x_0, _) = nb.sample(wild, x, alpha_bar, "v", 60, eta=eta)
    assert (t, zero) == (1, 0)
    torch.testing.assert_close(x_0, x0_hat, atol=1e-6, rtol=0)
    once, twice = (nb.reverse_step(x, x0_hat, 1, 0, alpha_bar, eta, torch.randn_like(x))
                   for _ in range(2))
    assert torch.equal(once, twice)


def test_ddim_repeats_and_ddpm_follows_its_seed(nb):
    alpha_bar, x = nb.make_alpha_bar("cosine", 60), nb.noise((3, 1, 8, 8), 1)

    def run(eta, seed):
        return nb.final(nb.sample(wild, x, alpha_bar, "v", 30, eta=eta, seed=seed))
    assert torch.equal(run(0.0, 1), run(0.0, 2))
    assert torch.equal(run(1.0, 1), run(1.0, 1)) and not torch.equal(run(1.0, 1), run(1.0, 2))


def test_clamp_changes_the_path_and_can_be_left_out(nb):
    alpha_bar, x = nb.make_alpha_bar("cosine", 60), nb.noise((3, 1, 8, 8), 1)
    on, off = (list(nb.sample(wild, x, alpha_bar, "v", 20, clip=c)) for c in (True, False))
    assert max(x0.abs().max() for _, _, x0 in on) <= 1
    assert max(x0.abs().max() for _, _, x0 in off) > 1
    assert not torch.allclose(on[1][1], off[1][1], atol=1e-2)


@given(T=st.integers(50, 2000), share=st.floats(0, 1))
@settings(max_examples=100, deadline=None)
def test_timesteps_start_at_T_fall_and_end_at_zero(nb, T, share):
    steps = max(1, round(share * T))
    times = nb.timesteps(T, steps)
    assert times[0] == T and times[-1] == 0 and len(times) == steps + 1
    assert all(s < t for t, s in zip(times, times[1:]))


def test_full_length_sampling_visits_what_training_saw(nb):
    assert nb.timesteps(1000, 1000) == list(range(1000, -1, -1))


@pytest.mark.parametrize("steps", (0, -3, 61))
def test_bad_numbers_of_steps_get_one_sentence(nb, steps):
    with pytest.raises(nb.ReaderError, match="from 1 to 60"):
        list(nb.sample(wild, torch.zeros(1, 1, 8, 8), nb.make_alpha_bar("cosine", 60),
                       "v", steps))


@pytest.mark.parametrize("kind", KINDS)
def test_prediction_and_x0_are_inverse(nb, kind):
    alpha_bar, t = nb.make_alpha_bar("cosine", 100), torch.arange(1, 91)
    x_0, eps = torch.randn(2, 90, 1, 4, 4).double().unbind(0)
    x_t = nb.q_sample(x_0, t, eps, alpha_bar)
    prediction = nb.target(x_0, eps, t, alpha_bar, kind)
    torch.testing.assert_close(nb.to_x0(prediction, x_t, t, alpha_bar, kind), x_0)


def test_ideal_denoiser_equals_brute_force(nb):
    alpha_bar = nb.make_alpha_bar("cosine", 100)
    x_0, x_t = torch.randn(7, 1, 4, 4), torch.randn(3, 1, 4, 4)
    ideal = nb.IdealDenoiser(x_0, alpha_bar)
    for t in (1, 30, 100):
        a, guess = float(alpha_bar[t]), ideal(x_t, torch.full((3,), t))
        for i in range(3):
            logs = [-((x_t[i] - a ** 0.5 * x) ** 2).sum().item() / (2 * (1 - a)) for x in x_0]
            weight = np.exp(np.array(logs) - max(logs))
            weight /= weight.sum()
            by_hand = sum(w * x for w, x in zip(weight, x_0))
            torch.testing.assert_close(guess[i], by_hand.float(), atol=1e-4, rtol=1e-4)


def test_ideal_denoiser_copies_and_uses_all_images(nb):
    alpha_bar, x_0 = nb.make_alpha_bar("cosine", 100), torch.rand(6, 1, 6, 6) * 2 - 1
    x = nb.final(nb.sample(nb.IdealDenoiser(x_0, alpha_bar), nb.noise((64, 1, 6, 6), 0),
                           alpha_bar, "x_0", 100, eta=1.0))
    gap, index = nb.nearest(x, x_0)
    assert gap.max() < 1e-3 and set(index.tolist()) == set(range(6))


def test_sampling_keeps_no_graph(nb):
    weight = torch.ones(1, requires_grad=True)
    alpha_bar = nb.make_alpha_bar("cosine", 50)
    for _, x_t, x0_hat in nb.sample(lambda x, t, y: weight * x, torch.randn(2, 1, 4, 4),
                                    alpha_bar, "v", 5):
        assert not x_t.requires_grad and not x0_hat.requires_grad

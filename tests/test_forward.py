"""The forward process: closed form, moments, and the same as diffusers."""
import diffusers
import pytest
import torch


@pytest.mark.parametrize("name", ("linear", "cosine", "sigmoid"))
def test_q_sample_equals_diffusers(nb, name):
    alpha_bar = nb.make_alpha_bar(name, 1000)
    oracle = diffusers.DDPMScheduler(1000, trained_betas=nb.beta_from(alpha_bar)[1:].numpy())
    x_0, eps = torch.randn(2, 64, 3, 8, 8).unbind(0)
    t = torch.randint(1, 1001, (64,))
    torch.testing.assert_close(nb.q_sample(x_0, t, eps, alpha_bar),
                               oracle.add_noise(x_0, eps, t - 1), atol=1e-5, rtol=0)


def test_q_sample_at_zero_is_the_image(nb):
    x_0, eps = torch.randn(2, 5, 1, 4, 4).unbind(0)
    alpha_bar = nb.make_alpha_bar("cosine", 100)
    assert torch.equal(nb.q_sample(x_0, torch.zeros(5, dtype=torch.long), eps, alpha_bar), x_0)


def test_steps_and_jump_have_the_same_moments(nb):
    torch.manual_seed(0)
    alpha_bar = nb.make_alpha_bar("linear", 100)
    x = torch.full((200_000,), 0.7)
    for t in range(1, 61):
        x = nb.q_step(x, t, alpha_bar)
    assert x.mean() == pytest.approx(0.7 * float(alpha_bar[60]) ** 0.5, abs=0.01)
    assert x.var() == pytest.approx(1 - float(alpha_bar[60]), abs=0.01)


def test_at_broadcasts_over_any_rank(nb):
    values, t = torch.arange(5, dtype=torch.float64), torch.tensor([0, 4])
    for shape in ((2,), (2, 3), (2, 3, 4, 4)):
        out = nb.at(values, t, torch.zeros(shape))
        assert out.dtype == torch.float32 and out.shape == (2, *[1] * (len(shape) - 1))
        assert out.flatten().tolist() == [0, 4]


def test_noise_depends_on_the_seed_alone(nb):
    assert torch.equal(nb.noise((3, 4), 7), nb.noise((3, 4), 7))
    assert not torch.equal(nb.noise((3, 4), 7), nb.noise((3, 4), 8))


def test_uint8_clamps_before_the_cast(nb):
    x = torch.tensor([-1.5, -1.0, 0.0, 1.0, 1.5])
    assert nb.to_uint8(x).tolist() == [0, 0, 128, 255, 255]
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16)
    assert torch.equal(nb.to_uint8(nb.to_float(every))[:, 0], every)

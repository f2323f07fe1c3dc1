"""The exercises: solutions pass, wrong answers are named, nothing else gets out."""
import ast
import math
import re
import types

import nbformat
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, code_cells

BOOKS = ("diffusion_tutorial", "latent_diffusion_cab")
CASES = [(book, cell.id[3:-4]) for book in BOOKS for cell in code_cells(book)
         if cell.id.startswith("ex-") and cell.id.endswith("-try")]


@pytest.fixture
def books(nb, lat) -> dict[str, types.ModuleType]:
    """The definitions of both notebooks."""
    return dict(zip(BOOKS, (nb, lat)))


def cell(book: str, id: str) -> nbformat.NotebookNode:
    """One cell of a notebook."""
    notebook = nbformat.read(ROOT / f"{book}.ipynb", as_version=4)
    return next(cell for cell in notebook.cells if cell.id == id)


def say(module: types.ModuleType, name: str, answer) -> str:
    """The sentence of a check, which must be one line."""
    torch.manual_seed(1)
    sentence = getattr(module, f"check_{name}")(answer)
    assert isinstance(sentence, str) and "\n" not in sentence and len(sentence) < 250
    return sentence


def scaled(by, z, dims, spread=torch.std):
    """z with the statistics of by, over dims."""
    return (z - by.mean(dims, keepdim=True)) / spread(by, dims, keepdim=True)


def kl(var, share=0.5):
    """The divergence with this variance."""
    return lambda m, v: share * (m ** 2 + var(v) - 1 - v).flatten(1).sum(1)


def gate(h, w1, w2, end=torch.sigmoid, mid=F.relu, over=(2, 3)):
    """The factors [B, C, 1, 1]."""
    mean = h.mean(over, keepdim=True).expand(len(h), -1, 1, 1).flatten(1)
    return end(mid(mean @ w1.T) @ w2.T)[:, :, None, None]


def normal(factor, mean=lambda z: z.flatten(1).mean(0)):
    """Draws with a linear factor of noise made from the covariance."""
    def draw(z, n):
        L = factor(z.flatten(1).T.cov())
        return (torch.randn(n, len(L)) @ L.T + mean(z)).view(n, *z.shape[1:])
    return draw


def arc(a, b, u, swap=False, whole=False):
    """Slerp by a route of its own: the part of b at right angles to a, then a turn."""
    flat = (lambda x: x.flatten()[None]) if whole else (lambda x: x.flatten(1))
    cosine = (flat(a) * flat(b)).sum(1) / flat(a).norm(dim=1) / flat(b).norm(dim=1)
    angle = torch.arctan2((1 - cosine ** 2).sqrt(), cosine).view(-1, 1, 1, 1)
    u = 1 - u if swap else u
    return torch.cos(u * angle) * a + torch.sin(u * angle) / torch.sin(angle) * (
        b - torch.cos(angle) * a)


root = torch.linalg.cholesky
huber = torch.nn.functional.huber_loss


def per_pixel(e, d):
    """Huber's loss by PyTorch, pixel by pixel."""
    return huber(e, torch.zeros_like(e), delta=d, reduction="none")


def scores(x, data, s, n):
    """Logarithms of the densities of x around each of data, up to a constant."""
    return torch.stack([-(x_t - s * data).square().sum(1) / (2 * n ** 2) for x_t in x])


def by_hand(x, y, data, of, s, n, allowed="own"):
    """Densities, each divided by their sum over the allowed pictures."""
    own = of[None] == y[:, None]
    p = scores(x, data, s, n).exp() * {"own": own, "others": ~own, "all": own | ~own}[allowed]
    return p / p.sum(1, keepdim=True)


# Another right answer for each, then wrong ones with a word of their own sentence.
OTHER = {
    "eps": lambda v, x, s, n: (x - s * (s * x - n * v)) / n,
    "huber": lambda e, d: per_pixel(e, d).mean((1, 2, 3)),
    "class": lambda x, y, data, of, s, n: by_hand(x, y, data, of, s, n),
    "times": lambda T, n: torch.tensor(
        [T - round(T * math.sin(i / n * math.pi / 2)) for i in range(n - 5)]
        + [5, 4, 3, 2, 1, 0]),
    "avoid": lambda denoise, bad, w: lambda x, t, y: w * denoise(x, t, y) + (1 - w) * denoise(
        x, t, 0 * y + bad),
    "weight": lambda s, n, g: torch.minimum(s ** 2, g * n ** 2) / (s ** 2 + n ** 2),
    "psnr": lambda x, y: -20 * math.log10(((x - y) / 2).square().mean().sqrt()),
    "scale": lambda a, z: F.batch_norm(z, a.mean((0, 2, 3)), a.var((0, 2, 3)), eps=0),
    "kl": lambda m, v: torch.distributions.kl_divergence(
        torch.distributions.Normal(m, (v / 2).exp()),
        torch.distributions.Normal(0.0, 1.0)).sum((1, 2, 3)),
    "attention": lambda h, w1, w2: torch.einsum("bchw,bc->bchw", h, torch.sigmoid(
        F.linear(F.relu(F.linear(F.adaptive_avg_pool2d(h, 1)[..., 0, 0], w1)), w2))),
    "slerp": arc,
    "prior": lambda z, n: torch.distributions.MultivariateNormal(
        z.flatten(1).mean(0), z.flatten(1).T.cov()).sample((n,)).view(n, *z.shape[1:]),
}
WRONG = {
    "eps": {"this is x0_hat": lambda v, x, s, n: s * x - n * v,
            "this is -x0_hat": lambda v, x, s, n: n * v - s * x,
            "sign of v": lambda v, x, s, n: n * x - s * v,
            "factors are exchanged: near": lambda v, x, s, n: s * x + n * v,
            "must not be squared": lambda v, x, s, n: n ** 2 * x + s ** 2 * v},
    "huber": {"one number for the batch": lambda e, d: per_pixel(e, d).mean(),
              "one number for each pixel": per_pixel,
              "sum over a picture": lambda e, d: per_pixel(e, d).sum((1, 2, 3)),
              "do not meet": lambda e, d: torch.where(
                  e.abs() < d, e ** 2 / 2, d * e.abs()).mean((1, 2, 3)),
              "half is missing": lambda e, d: 2 * per_pixel(e, d).mean((1, 2, 3)),
              "smooth_l1_loss": lambda e, d: F.smooth_l1_loss(
                  e, 0 * e, beta=d, reduction="none").mean((1, 2, 3))},
    "class": {"ignores the class": lambda x, y, *rest: by_hand(x, y, *rest, allowed="all"),
              "add up to 1": lambda x, y, data, of, s, n: by_hand(
                  x, y, data, of, s, n, allowed="all") * (of == y[:, None]),
              "*other* classes": lambda x, y, *rest: by_hand(x, y, *rest, allowed="others"),
              "not probability 0": lambda x, y, data, of, s, n: torch.where(
                  of == y[:, None], scores(x, data, s, n), torch.zeros(())).softmax(1)},
    "times": {"two times are equal": lambda T, n: [
                  round(T * (1 - i / n) ** 2) for i in range(n + 1)],
              "not denser": lambda T, n: torch.linspace(T, 0, n + 1).round(),
              "first time is not T": lambda T, n: [
                  1 + T // n * i for i in range(n)][::-1] + [0],
              "last time is not 0": lambda T, n: [T] + list(range(n, 0, -1)),
              "the times rise: a": lambda T, n: list(range(n)) + [T],
              "somewhere the times rise": lambda T, n: [T, 5, *range(7, 7 - n + 1, -1)][:n]
              + [0],
              "whole numbers": lambda T, n: torch.linspace(1, 0, n + 1) ** 2 * T,
              "need 51 times": lambda T, n: list(range(n, 0, -1))},
    "avoid": {"ordinary guidance": lambda d, bad, w: lambda x, t, y: d(x, t, 0 * y + 10)
              + w * (d(x, t, y) - d(x, t, 0 * y + 10)),
              "towards the unwanted": lambda d, bad, w: lambda x, t, y: d(x, t, y)
              + w * (d(x, t, 0 * y + bad) - d(x, t, y)),
              "with w = 1": lambda d, bad, w: lambda x, t, y: d(x, t, y)
              + w * (d(x, t, y) - d(x, t, 0 * y + bad)),
              "without any push": lambda d, bad, w: d},
    "weight": {"error of x_0": lambda s, n, g: (s / n).square().clamp(max=g),
               "error of eps": lambda s, n, g: (s / n).square().clamp(max=g) / (s / n) ** 2,
               "larger of the two": lambda s, n, g: (s / n).square().clamp(min=g) * n ** 2,
               "counts twice": lambda s, n, g: (s / n).square().clamp(max=g) / n ** 2,
               "ratio of squares": lambda s, n, g: (s / n).clamp(max=g) / (s / n + 1),
               "limit is missing": lambda s, n, g: s ** 2},
    "psnr": {"range of these": lambda x, y: -10 * (x - y).square().mean().log10(),
             "average the squared": lambda x, y: (
                 4 / (x - y).square().mean((1, 2, 3))).log10().mean() * 10,
             "one number for all": lambda x, y: 10 * (
                 4 / (x - y).square().mean((1, 2, 3))).log10(),
             "read it off": lambda x, y: 10 * (
                 (x.max() - x.min()) ** 2 / (x - y).square().mean()).log10(),
             "upside down": lambda x, y: 10 * ((x - y).square().mean() / 4).log10()},
    "scale": {"for all channels": lambda a, z: scaled(a, z, (0, 1, 2, 3)),
              "statistics of z itself": lambda a, z: scaled(z, z, (0, 2, 3)),
              "position": lambda a, z: scaled(a, z, (0,)),
              "not by the variance": lambda a, z: scaled(a, z, (0, 2, 3), torch.var),
              "mean is still in": lambda a, z: z / a.std((0, 2, 3), keepdim=True)},
    "kl": {"one number for each": lambda m, v: kl(torch.exp)(m, v).sum(),
           "do not average": lambda m, v: kl(torch.exp)(m, v) / m[0].numel(),
           "log_var is a logarithm": kl(lambda v: v),
           "this is the deviation": kl(lambda v: (v / 2).exp()),
           "half is missing": kl(torch.exp, 1.0),
           "sign": kl(torch.exp, -0.5)},
    "attention": {"factors alone": gate,
                  "over all pictures": lambda h, a, b: h * gate(h, a, b, over=(0, 2, 3)),
                  "softmax": lambda h, a, b: h * gate(h, a, b, lambda s: s.softmax(1)),
                  "relu is missing": lambda h, a, b: h * gate(h, a, b, mid=lambda s: s),
                  "sigmoid is missing": lambda h, a, b: h * gate(h, a, b, lambda s: s),
                  "the shortcut belongs": lambda h, a, b: h + h * gate(h, a, b)},
    "slerp": {"straight line": torch.lerp,
              "from b to a": lambda a, b, u: arc(a, b, u, swap=True),
              "whole batch": lambda a, b, u: arc(a, b, u, whole=True),
              "lengths are lost": lambda a, b, u: arc(a / a.flatten(1).norm(
                  dim=1).view(-1, 1, 1, 1), b / b.flatten(1).norm(dim=1).view(-1, 1, 1, 1), u)},
    "prior": {"copies": lambda z, n: z[torch.randperm(len(z))[:n]],
              "standard normal": lambda z, n: torch.randn(n, *z.shape[1:]),
              "mean of each": normal(root, lambda z: 0.0),
              "drawn for itself": lambda z, n: z.mean(0) + z.std(0) * torch.randn(
                  n, *z.shape[1:]),
              "transposed": normal(lambda c: root(c).T),
              "covariance is not": normal(lambda c: c)},
}


@pytest.mark.parametrize("book, name", CASES)
def test_starter_runs_and_is_not_done(books, book, name, capsys):
    exec(cell(book, f"ex-{name}-try").source, dict(vars(books[book])))
    assert capsys.readouterr().out.startswith("Not done yet:")


@pytest.mark.parametrize("book, name", CASES)
def test_solution_passes(books, book, name, capsys):
    """The text of the solution, put in place of the starter's function."""
    folded = cell(book, f"ex-{name}-solution")
    assert folded.metadata.get("tags") == ["solution"] and folded.cell_type == "markdown"
    assert folded.source.startswith("<details>") and folded.source.endswith("</details>")
    code = re.findall(r"```python\n(.*?)```", folded.source, re.S)[0]
    starter = ast.parse(cell(book, f"ex-{name}-try").source).body
    assert ast.dump(ast.parse(code).body[0].args) == ast.dump(starter[0].args)
    check = ast.unparse(starter[-1])
    for seed in range(20):
        torch.manual_seed(seed)
        exec(f"{code}\n{check}", dict(vars(books[book])))
        assert capsys.readouterr().out.startswith("Right. ")


@pytest.mark.parametrize("book, name", CASES)
def test_another_right_answer_passes_and_one_beside_it_does_not(books, book, name):
    assert say(books[book], name, OTHER[name]).startswith("Right. ")

    def off(*args):
        """The right answer, half a percent and a bit away."""
        right = OTHER[name](*args)
        if callable(right):
            return lambda *args: right(*args) * 0.99 + 0.01
        right = torch.as_tensor(right)
        return right * 0.99 + 0.01 if name != "prior" else right * 1.2
    assert say(books[book], name, off).startswith("Not yet: ")


@pytest.mark.parametrize("book, name", CASES)
def test_wrong_answers_are_named_each_by_its_own_sentence(books, book, name):
    said = {word: say(books[book], name, wrong) for word, wrong in WRONG[name].items()}
    for word, sentence in said.items():
        assert sentence.startswith("Not yet: ") and word in sentence, (word, sentence)
    assert len(set(said.values())) == len(said) >= 2

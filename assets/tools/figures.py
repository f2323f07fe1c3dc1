"""Draw README's two pictures anew: python assets/tools/figures.py (about a minute).

assets/figures/hero.gif: garments out of noise, by the shipped weights and the pixel
notebook's own sampler. assets/figures/words.png: prompts, and what the text network of
the latent notebook draws for them.
"""
import os
import types

import torch
from definitions import ROOT, load_definitions
from PIL import Image

FIGURES = ROOT / "assets/figures"
COLUMNS, ROWS, ZOOM, DELAY = 14, 5, 2, 2  # delay: of a column behind its left neighbour
TIMES = (1000, 700, 550, 460, 390, 320, 250, 190, 130, 70, 0)  # what each garment shows in turn


def garments(nb: types.ModuleType) -> dict:
    """{t: (x_t, x0_hat)} of COLUMNS * ROWS pictures: DDIM, 100 steps, w = 2."""
    net, cfg = nb.load_net(ROOT / "assets/weights/fashionmnist.pt")
    schedule, count = nb.make_schedule(cfg.schedule, cfg.T), COLUMNS * ROWS
    y = torch.randperm(count, generator=torch.Generator().manual_seed(0)) % 10
    denoise = nb.guided(nb.denoiser(net, schedule, cfg.predict), 2)
    path = nb.sample(denoise, nb.draw_noise((count, 1, 28, 28), 11), schedule,
                     nb.timesteps(cfg.T, 100), y=y)
    return {t: (x_t, x0_hat) for t, x_t, x0_hat in path}


def frame(nb: types.ModuleType, path: dict, tick: int) -> Image.Image:
    """The GIF's picture number tick: columns further left are further on in time.

    16 greys, and 6 of them while there is noise, which would fill the file otherwise.
    """
    tiles = []
    for i in range(COLUMNS * ROWS):
        t = TIMES[min(max(tick - DELAY * (i % COLUMNS), 0), len(TIMES) - 1)]
        step = 1 if t < 150 else 3
        grey = (path[t][0][i].clamp(-1, 1) + 1) * 7.5  # 0 to 15
        tiles.append((grey / step).round() * step / 7.5 - 1)
    grid = nb.make_grid(torch.stack(tiles) / 2 + 0.5, COLUMNS, 1, pad_value=1.0)
    levels = (grid[0] * 15).round().byte()
    levels = levels.repeat_interleave(ZOOM, 0).repeat_interleave(ZOOM, 1)
    picture = Image.fromarray(levels.numpy(), "P")
    picture.putpalette([17 * level for level in range(16) for _ in "rgb"])
    return picture


def hero(nb: types.ModuleType, path: dict) -> None:
    """Write hero.gif: a wave of garments from left to right, then a rest."""
    last = len(TIMES) - 1 + DELAY * (COLUMNS - 1)
    frames = [frame(nb, path, tick) for tick in range(last + 1)]
    pace = [600] + [90] * (len(frames) - 2) + [3500]  # milliseconds
    frames[0].save(FIGURES / "hero.gif", save_all=True, append_images=frames[1:],
                   duration=pace, loop=0)


PROMPTS = ("a thin seven leaning right", "a bold seven leaning left", "a wide zero",
           "a thin three and a bold seven", "a bold three and a thin seven")


def words(latent: types.ModuleType) -> None:
    """Write words.png: unselected pictures for each prompt, beside its text."""
    language, weights = latent.Language("MNIST"), ROOT / "assets/weights"
    painter, _ = latent.load_words(weights / "words-mnist.pt", latent.load_latent(
        weights / "latent-mnist.pt"), language)
    figure, axes = latent.plt.subplots(len(PROMPTS), 1, figsize=(9, 5.2))
    for ax, prompt in zip(axes, PROMPTS):
        count, width = (4, 14) if " and " in prompt else (8, 7)
        x = latent.paint(painter, language, [prompt] * count, w=3.0, width=width)
        grid = latent.make_grid(x / 2 + 0.5, 8, 1, pad_value=1.0)
        ax.imshow(grid.permute(1, 2, 0), interpolation="nearest")
        ax.axis("off")
        ax.text(-6, 14, prompt, ha="right", va="center", fontsize=15)
    figure.savefig(FIGURES / "words.png", dpi=90, bbox_inches="tight")
    Image.open(FIGURES / "words.png").convert("L").quantize(32).save(
        FIGURES / "words.png", optimize=True)


def main() -> None:
    """Write the files and say how large they are."""
    os.chdir(ROOT)
    nb, latent = map(load_definitions, ("diffusion_tutorial", "latent_diffusion_cab"))
    hero(nb, garments(nb))
    words(latent)
    for name in ("hero.gif", "words.png"):
        print(f"{name}: {(FIGURES / name).stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()

"""Draw README's three pictures anew: python assets/tools/figures.py (about a minute).

assets/figures/hero.gif: garments out of noise, by the shipped weights and the pixel
notebook's own sampler. assets/figures/map.svg: the model on one page. Its shapes and
numbers come from the notebooks' definitions. assets/figures/words.png: prompts, and what
the text network of the latent notebook draws for them.
"""
import base64
import io
import os
import types
from html import escape

import torch
from definitions import ROOT, load_definitions
from PIL import Image

FIGURES = ROOT / "assets/figures"
COLUMNS, ROWS, ZOOM, DELAY = 14, 5, 2, 2  # delay: of a column behind its left neighbour
TIMES = (1000, 700, 550, 460, 390, 320, 250, 190, 130, 70, 0)  # what each garment shows in turn
INK, GREY, BLUE, ORANGE, GREEN, RED = (
    "#1a1a1a", "#666666", "#0072B2", "#E69F00", "#009E73", "#D55E00")  # Okabe, Ito
PALE = {BLUE: "#dcecf7", ORANGE: "#fdf0d2", GREEN: "#d8f0e7", RED: "#fbe3d4",
        GREY: "#f0f0f0"}


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


def facts(nb: types.ModuleType, latent: types.ModuleType) -> dict[str, str]:
    """What the map says in numbers, by running the two networks once."""
    cfg, coder, shape = nb.Config(), latent.Autoencoder(), {}
    net, small = nb.UNet(cfg), latent.LatentUNet(nb.Config(widths=(40, 80), blocks=1), 4)
    for key, part in (("14", net.stem), ("7", net.shrink), ("e", net.time),
                      ("latent 7", small.stem), ("latent 4", small.shrink)):
        part.register_forward_hook(lambda module, inputs, out, key=key: shape.update(
            {key: "x".join(map(str, out.shape[1:]))}))
    with torch.no_grad():
        x, t = torch.zeros(1, 1, 28, 28), torch.tensor([1])
        out, code = net(x, t), coder.encode(x)[0]
        small(code, t)
    count = {key: f"{sum(p.numel() for p in part.parameters()):,}"
             for key, part in (("unet", net), ("latent", small), ("coder", coder))}
    return {**shape, **count, "T": str(cfg.T), "schedule": cfg.schedule,
            "blocks": str(cfg.blocks), "heads": str(cfg.heads),
            "picture": "x".join(map(str, out.shape[1:])),
            "code": "x".join(map(str, code.shape[1:])),
            "waves": str(net.time[0].in_features),
            "coder widths": "24, 48"}


def text(x: float, y: float, words: str, size: int = 17, anchor: str = "start",
         extra: str = "") -> str:
    """A line of text; words in `backquotes` stand in fixed width."""
    parts = [f'<tspan font-family="monospace">{part}</tspan>' if i % 2 else part
             for i, part in enumerate(escape(words, quote=False).split("`"))]
    return (f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" {extra}>'
            f'{"".join(parts)}</text>')


def box(x: int, y: int, w: int, h: int, color: str, lines: list[str] = (),
        size: int = 16) -> str:
    """A rounded box with centred lines of text."""
    top = y + h / 2 - (len(lines) - 1) * size * 0.65 + size * 0.35
    return (f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="8" fill="{PALE[color]}"'
            f' stroke="{color}" stroke-width="2"/>' + "".join(
                text(x + w / 2, round(top + i * size * 1.3, 1), line, size, "middle")
                for i, line in enumerate(lines)))


def arrow(points: str, color: str = INK, dashed: bool = False) -> str:
    """A line through "x,y x,y ..." with a head at its end."""
    return (f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width='
            f'"2.5" marker-end="url(#head-{color[1:]})"'
            + (' stroke-dasharray="7 5"' if dashed else "") + "/>")


def thumb(x: int, y: int, side: int, picture: torch.Tensor) -> str:
    """A real picture [1, 28, 28], its pixels kept sharp."""
    file, grey = io.BytesIO(), (picture[0].clamp(-1, 1) + 1) * 127.5
    Image.fromarray(grey.round().byte().numpy()).save(file, "png", optimize=True)
    content = file.getvalue()
    return (f'<image x="{x}" y="{y}" width="{side}" height="{side}" style="'
            'image-rendering:pixelated" href="data:image/png;base64,'
            f'{base64.b64encode(content).decode()}"/>')


def schedule_panel(nb: types.ModuleType, says: dict) -> str:
    """1 and 2, at the left: the curve of the signal, and the jump to x_t."""
    curve = nb.make_schedule(says["schedule"], int(says["T"])).signal[::50].tolist()
    line = " ".join(f"{44 + 210 * i / (len(curve) - 1):.1f},{190 - 84 * value:.1f}"
                    for i, value in enumerate(curve))
    return "\n".join((
        box(24, 64, 250, 162, BLUE), text(40, 92, "1  Noise schedule", 19, extra=BOLD),
        f'<polyline points="{line}" fill="none" stroke="{BLUE}" stroke-width="4"/>',
        text(44, 180, "`signal[t]`", 16),
        text(44, 214, "t = 0", 16), text(254, 214, f"t = {says['T']}", 16, "end"),
        arrow("149,226 149,256"),
        box(24, 258, 250, 174, BLUE), text(40, 286, "2  Forward process", 19, extra=BOLD),
        text(40, 316, "`x_t = signal x_0`", 18), text(40, 340, "`+ noise eps`", 18)))


def unet_panel(says: dict) -> str:
    """3, in the middle: the blocks of the U-Net with their shapes."""
    n, level = says["blocks"], {"14": 182, "7": 270}
    rows = [box(310, 64, 590, 368, GREY),
            text(326, 92, f"3  U-Net, {says['unet']} weights", 19, extra=BOLD)]
    for x, w, key, lines in (
            (324, 84, "14", ["unshuffle", says["14"]]),
            (428, 116, "14", [f"{n} ResBlocks", says["14"]]),
            (680, 116, "14", [f"{n} ResBlocks", says["14"]]),
            (816, 76, "14", ["shuffle", says["picture"]]),
            (428, 116, "7", [f"{n} ResBlocks", says["7"]]),
            (680, 116, "7", [f"{n} ResBlocks", says["7"]])):
        rows.append(box(x, level[key], w, 54, GREEN, lines))
    rows += [box(570, 292, 84, 46, RED, ["attention", f"{says['heads']} heads"], 15),
             box(428, 364, 368, 56, ORANGE, [
                 f"t: {says['waves']} waves, label y or none → {says['e']}",
                 "sum: scale and shift in every ResBlock"], 15)]
    rows += [arrow(points) for points in (
        "366,162 366,180", "408,209 426,209", "486,236 486,268", "544,315 568,315",
        "654,315 678,315", "738,270 738,238", "796,209 814,209",
        "854,182 854,134 934,134")]
    rows += [arrow(points, ORANGE) for points in ("486,364 486,326", "738,364 738,326")]
    rows += [arrow("544,200 678,200", BLUE, True), arrow("544,281 678,281", BLUE, True),
             text(612, 190, "skips: added", 16, "middle", f'fill="{BLUE}"')]
    return "\n".join(rows)


def reverse_panel() -> str:
    """4 and 5, at the right, and the loop back to the left."""
    return "\n".join((
        box(936, 64, 320, 150, GREEN), text(952, 92, "4  Guess the picture", 19,
                                            extra=BOLD),
        text(952, 124, "`x0_hat =`", 17), text(952, 150, "`signal x_t - noise v`", 17),
        text(952, 190, "clamped to [-1, 1]", 16), arrow("1096,214 1096,244"),
        box(936, 246, 320, 186, BLUE), text(952, 274, "5  Reverse step", 19, extra=BOLD),
        text(952, 304, "`x_s = signal x0_hat`", 17),
        text(952, 330, "`+ √(noise²-σ²) eps_hat`", 17), text(952, 356, "`+ σ z`", 17),
        text(952, 390, "both curves at `s < t`", 16),
        text(952, 416, "σ = 0 is DDIM", 16),
        arrow("1096,432 1096,462 292,462 292,134 336,134", INK),
        text(694, 454, "`s` becomes the next `t`", 17, "middle")))


def latent_lane(says: dict) -> str:
    """The second lane: encoder, the same loop on codes, decoder."""
    rows = [box(24, 536, 1232, 166, GREY), text(
        40, 566, "The latent variant: the same loop on the codes of an autoencoder"
        f" ({says['coder']} weights)", 19, extra=BOLD)]
    places = ((40, 110, BLUE, ["picture", says["picture"]]),
              (176, 196, RED, ["encoder, channel", "attention blocks:",
                               f"{says['coder widths']} channels"]),
              (398, 110, BLUE, ["code", says["code"]]),
              (534, 250, GREEN, ["1 to 5, without clamp", f"U-Net: {says['latent 7']},"
                                 f" {says['latent 4']}", f"{says['latent']} weights"]),
              (810, 110, BLUE, ["new code", says["code"]]),
              (946, 156, RED, ["decoder", "(the encoder's", "way back)"]),
              (1128, 112, BLUE, ["new picture", says["picture"]]))
    rows += [box(x, 588, w, 90, color, lines) for x, w, color, lines in places]
    rows += [arrow(f"{x + w},633 {after - 2},633") for (x, w, *_), (after, *_)
             in zip(places, places[1:])]
    return "\n".join(rows)


BOLD = 'font-weight="bold"'


def draw_map(nb: types.ModuleType, latent: types.ModuleType, path: dict) -> str:
    """The whole drawing as SVG; path as garments() gives it."""
    says, curve = facts(nb, latent), nb.make_schedule("cosine", 1000)
    (x_0, _), (eps, _), (x_t, x0_hat), (x_s, _) = (
        [part[3] for part in path[t]] for t in (0, 1000, 500, 400))
    mixed = nb.add_noise(x_0[None], torch.tensor([500]), eps[None], curve)[0]
    heads = "".join(
        f'<marker id="head-{color[1:]}" viewBox="0 0 10 10" refX="9" refY="5" '
        f'markerWidth="6" markerHeight="6" orient="auto"><path d="M0,0 L10,5 L0,10 z" '
        f'fill="{color}"/></marker>' for color in (INK, BLUE, ORANGE))
    return "\n".join((
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1280 720" role="img" '
        f'aria-labelledby="title desc" font-family="sans-serif" fill="{INK}">',
        '<title id="title">A diffusion model on one page</title>',
        '<desc id="desc">The noise schedule gives signal and noise; the forward process mixes '
        "picture and noise to x_t; a U-Net with time and label predicts v; from it "
        "follows the guess x0_hat; the reverse step goes to a smaller t; then again. "
        "Below, the latent variant: encoder, the same loop on codes, decoder.</desc>",
        f"<defs>{heads}</defs>", '<rect width="1280" height="720" fill="#ffffff"/>',
        text(24, 42, "A diffusion model on one page", 27, extra=BOLD),
        text(1256, 42, "shapes: channels x height x width", 17, "end"),
        schedule_panel(nb, says), unet_panel(says), reverse_panel(), latent_lane(says),
        thumb(44, 356, 60, x_0), thumb(119, 356, 60, eps),
        thumb(194, 356, 60, mixed), thumb(338, 104, 58, x_t),
        thumb(1180, 130, 60, x0_hat), thumb(1180, 356, 60, x_s),
        text(111, 394, "+", 20, "middle"), text(186, 394, "=", 20, "middle"),
        text(408, 126, f"`x_t` {says['picture']}", 17),
        text(842, 140, f"`v` {says['picture']}", 17, "end"),
        arrow("274,330 291,330"),
        box(24, 482, 608, 36, ORANGE, ["Training: 1, 2, 3. Loss: squared error of `v`"
                                       " = `signal eps - noise x_0`"], 16),
        box(648, 482, 608, 36, BLUE, ["Sampling: 3, 4, 5, again and again, from pure "
                                      f"noise at t = {says['T']} to t = 0"], 16),
        "</svg>", ""))


def main() -> None:
    """Write the files and say how large they are."""
    os.chdir(ROOT)
    nb, latent = map(load_definitions, ("diffusion_tutorial", "latent_diffusion_cab"))
    path = garments(nb)
    hero(nb, path)
    (FIGURES / "map.svg").write_text(draw_map(nb, latent, path))
    words(latent)
    for name in ("hero.gif", "map.svg", "words.png"):
        print(f"{name}: {(FIGURES / name).stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()

"""The long measurements of latent_diffusion_cab.ipynb, by the notebook's own functions.

    python assets/tools/latents.py beta|gates|against|weights|choose|verdict MNIST

Each writes to assets/results, weights and verdict to assets/weights. One thread, a quarter
of an hour to an hour each.
"""
import hashlib
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from definitions import keep, prepare, where

SEEDS = range(5)


def floor(nb: object, n: int) -> float:
    """The mean FID of up to five disjoint sets of n held-out pictures."""
    scores = [nb.fid(nb.real_test, part) for part in nb.held_out.split(n)[:5]]
    return sum(scores) / len(scores)


def excess(nb: object, x: torch.Tensor) -> float:
    """The FID of pictures, less the floor at as many."""
    return nb.fid(nb.real_test, nb.features_of(nb.yardstick, nb.to_bytes(x))) - floor(
        nb, len(x))


def as_asked(nb: object, x: torch.Tensor, y: torch.Tensor) -> float:
    """Share of the pictures in which the classifier sees their label."""
    seen = nb.yardstick.head(nb.features_of(nb.yardstick, nb.to_bytes(x))).argmax(1)
    return (seen == y).float().mean().item()


def encode(nb: object, coder: object) -> tuple:
    """All training codes, scaled, and their scale."""
    raw = nb.encode_all(coder, nb.images)
    scale = nb.scale_of(raw)
    return scale.to(raw), scale


def new_coder(nb: object, seed: int, steps: int, kl: float = 1e-3, **sizes: object):
    """A trained autoencoder."""
    torch.manual_seed(seed)
    coder = nb.Autoencoder(**sizes).to(memory_format=nb.LAYOUT)
    return nb.train_autoencoder(coder, nb.images, steps, kl, seed).eval()


def train_on(nb: object, coder: object, cfg: object, file: Path,
             watch=lambda run, latent: None):
    """A latent diffusion model on the codes of this autoencoder."""
    z, scale = encode(nb, coder)
    run = nb.Run(cfg, z.shape[1], nb.LatentUNet)
    if file.exists():
        run.load(file)
    road = nb.make_schedule(cfg.schedule, cfg.T)
    latent = nb.Latent(nb.denoiser(run.ema, road, cfg.predict), coder, scale, road)
    nb.train(run, z, nb.labels, cfg, file, lambda run: watch(run, latent), 1000)
    return run, latent


def beta(nb: object, name: str) -> None:
    """Three weights of the divergence, each with a diffusion model, half the page's steps."""
    rows = []
    for kl in (1e-5, 1e-3, 1e-1):
        coder = new_coder(nb, 0, 800, kl)
        codes = nb.encode_all(coder, nb.test_images)
        x_hat = nb.decode_all(coder, codes)
        with torch.no_grad():  # with noise in the codes, as in training
            noise = nb.draw_noise((2000, *codes.shape[1:]), 9)
            error = nb.autoencoder_loss(coder, nb.x_test[:2000], noise, 0.0)[1].item()
        cfg = nb.Config(dataset=name, widths=(40, 80), blocks=1, batch=128, steps=1000,
                        ema_decay=0.99)
        _, latent = train_on(nb, coder, cfg, Path(f"runs/beta-{name}-{kl}.pt"))
        y = nb.random_labels(1000, 10, 100)
        blind = latent.decode(nb.draw_noise((1000, *codes.shape[1:]), 0))
        rows.append({"kl": kl, "beta": 2 * kl / error, "N": 1000, "seed": 0,
                     "deviation of codes": codes.std().item(),
                     "PSNR": (found := nb.quality(nb.x_test, x_hat))["PSNR, dB"],
                     "FID, reconstructions": found["FID"],
                     "excess, decoded noise": excess(nb, blind),
                     "excess, samples": excess(nb, latent.draw(y))})
        print(rows[-1], flush=True)
        keep(f"beta-{name.lower()}", rows)


def gates(nb: object, name: str) -> None:
    """Four gates from equal starts, five seeds, 500 steps."""
    rows = []
    for seed in SEEDS:
        for gate in nb.GATES:
            rows.append(nb.ablate(gate, seed, 500))
            print(rows[-1], flush=True)
    keep(f"gates-{name.lower()}", rows)


def against(nb: object, name: str) -> None:
    """Pixels and latents, one recipe, equal arithmetic, half the page's steps, five seeds."""
    rows, one = [], torch.ones(1, dtype=torch.long)
    cfg = nb.Config(dataset=name, widths=(40, 80), blocks=1, batch=128, steps=1000,
                    ema_decay=0.99)
    code, picture = torch.zeros(1, 4, 7, 7), torch.zeros(1, 1, 28, 28)
    ae = nb.Autoencoder()
    price = {"pixels": nb.multiply_adds(lambda: nb.UNet(nb.Config())(picture, one)),
             "codes": nb.multiply_adds(lambda: nb.LatentUNet(cfg, 4)(code, one)),
             "coder": nb.multiply_adds(lambda: ae.decode(ae.encode(picture)[0]))}
    budget = price["codes"] * 128 * 1000 + price["coder"] * 64 * 800
    steps = round(budget / price["pixels"] / 32)
    for seed in SEEDS:
        y = nb.random_labels(1000, 10, 100 + 10 * seed)
        coder = new_coder(nb, seed, 800)
        _, latent = train_on(nb, coder, replace(cfg, seed=seed),
                             Path(f"runs/against-{name}-{seed}.pt"))
        pixel_cfg = nb.Config(dataset=name, steps=steps, ema_decay=0.99, seed=seed)
        run = nb.Run(pixel_cfg, 1)
        nb.train(run, nb.images, nb.labels, pixel_cfg,
                 Path(f"runs/against-{name}-{seed}-pixels.pt"), save_every=10**9)
        road = nb.make_schedule("cosine", 1000)
        pixels = nb.denoiser(run.ema, road, "v")
        drawn = {"latents": latent.draw(y, seed=100 + 10 * seed),
                 "pixels": nb.draw(pixels, road, y, nb.timesteps(1000, 25), (1, 28, 28),
                                   1.0, 100 + 10 * seed)}
        for model, x in drawn.items():
            rows.append({"model": model, "seed": seed, "N": 1000, "calls": 25,
                         "excess": excess(nb, x), "as asked": as_asked(nb, x, y),
                         "trained on": steps * 32 if model == "pixels" else 128 * 1000,
                         "multiply-adds / 10^12": budget / 1e12})
            print(rows[-1], flush=True)
        keep(f"against-{name.lower()}", rows)


def weights(nb: object, name: str, coder_steps: int = 8000) -> None:
    """The shipped weights: both halves; goes on where it was interrupted."""
    widths, inner, steps = {"MNIST": ((24, 48), (40, 80), 12_000),
                            "FashionMNIST": ((32, 64), (64, 128), 22_000)}[name]
    out, started = Path(f"assets/weights/latent-{name.lower()}.pt"), time.time()
    file = Path(f"runs/coder-{name}-{coder_steps}.pt")
    if file.exists():
        coder = nb.Autoencoder(widths=widths).to(memory_format=nb.LAYOUT).eval()
        coder.load_state_dict(torch.load(file, weights_only=True))
    else:
        coder = new_coder(nb, 0, coder_steps, widths=widths)
        file.parent.mkdir(exist_ok=True)
        torch.save(coder.state_dict(), file)
    x_hat = nb.decode_all(coder, nb.encode_all(coder, nb.test_images))
    facts = nb.quality(nb.x_test, x_hat)
    print(facts, f"{time.time() - started:.0f} s", flush=True)
    cfg = nb.Config(dataset=name, widths=inner, blocks=1, batch=128, steps=steps,
                    warmup=200, ema_decay=0.9995)

    def watch(run: object, latent: object) -> None:
        """Keep weights, and look at samples now and then."""
        step = len(run.losses)
        if step % 2000 and step != steps:
            return
        x = latent.draw(nb.random_labels(1000, 10, 100))
        print(f"{step} steps, {time.time() - started:.0f} s, loss "
              f"{sum(run.losses[-500:]) / 500:.4f}, excess {excess(nb, x):.3f}", flush=True)
        halves = {"coder": coder, "ema": run.ema.module}
        torch.save({name: {k: v.half() for k, v in part.state_dict().items()}
                    for name, part in halves.items()} | latent.scale._asdict() | {
            "autoencoder": json.dumps(coder.sizes), "config": json.dumps(asdict(cfg))},
            out)
        out.with_suffix(".json").write_text(json.dumps(
            {"minutes": round((time.time() - started) / 60, 1)}))  # verdict adds the rest

    run, latent = train_on(nb, coder, cfg, Path(f"runs/latent-{name}-{steps}.pt"), watch)


def choose(nb: object, name: str) -> None:
    """The sampler's settings, by the FID to held-out training pictures; two seeds."""
    rows = []
    latent = nb.load_latent(Path(f"assets/weights/latent-{name.lower()}.pt"))
    for eta, w in ((0.0, 1.0), (0.5, 1.0), (1.0, 1.0), (0.5, 1.25), (0.5, 1.5)):
        for seed in (107, 207):
            x = latent.draw(nb.random_labels(1000, 10, seed), 50, w, eta, seed)
            f = nb.features_of(nb.yardstick, nb.to_bytes(x))
            rows.append({"eta": eta, "w": w, "steps": 50, "seed": seed, "N": 1000,
                         "FID to held-out": nb.fid(nb.held_out, f)})
            print(rows[-1], flush=True)
    keep(f"choice-{name.lower()}", rows)


def verdict(nb: object, name: str) -> None:
    """The JSON beside the weights: reconstructions, and samples of five seeds."""
    file = Path(f"assets/weights/latent-{name.lower()}.pt")
    saved, latent = torch.load(file, weights_only=True), nb.load_latent(file)
    minutes = json.loads(file.with_suffix(".json").read_text())["minutes"]
    x_hat = nb.decode_all(latent.coder, nb.encode_all(latent.coder, nb.test_images))
    facts, rows = nb.quality(nb.x_test, x_hat), []
    for eta, w in ((1.0, 1.0), (0.5, 1.0), (0.5, 1.25)):
        for seed in (100, 200, 300, 400, 500):
            y = nb.random_labels(2000, 10, seed)
            x = latent.draw(y, 50, w, eta, seed)
            rows.append({"seed": seed, "eta": eta, "w": w, "steps": 50, "N": 2000,
                         "excess": excess(nb, x), "as asked": as_asked(nb, x, y)})
            print(rows[-1], flush=True)
    file.with_suffix(".json").write_text(json.dumps(where() | {
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "data": f"55,000 images of the {name} training split",
        "autoencoder": json.loads(saved["autoencoder"]) | {"steps": 8000, "batch": 64},
        "config": json.loads(saved["config"]), "PSNR": facts["PSNR, dB"],
        "SSIM": facts["SSIM"], "FID, reconstructions": facts["FID"], "minutes": minutes,
        "rows": rows}, indent=1))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    globals()[sys.argv[1]](prepare("latent_diffusion_cab", sys.argv[2]), sys.argv[2])

"""The long measurements of diffusion_tutorial.ipynb, by the notebook's own functions.

    python assets/tools/pixels.py worth        what three choices of training are worth
    python assets/tools/pixels.py more         what 2, 5, 10 and 30 minutes of training give
    python assets/tools/pixels.py verdict      a sampler chosen on held-out pictures, and judged
    python assets/tools/pixels.py few          students of few calls; few matching: one of them
    python assets/tools/pixels.py transformers DiT against the U-Net; transformers 1e-3 0 1:
                                               another learning rate, two of the seeds
    python assets/tools/pixels.py likelihood   bits a pixel of the test pictures

MNIST as a last word: on digits. They write to assets/results, few to assets/weights, too.
The first two take half an hour each on one thread, the others some minutes on a GPU, where
there is one, and hours without.
"""
import base64
import hashlib
import json
import sys
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from definitions import keep, load_definitions, prepare, where


def ready(name: str = "FashionMNIST") -> object:
    """The notebook's definitions, its data, its judge, and the shipped network."""
    nb = prepare("diffusion_tutorial", name)
    nb.eye = nb.Eye(partial(nb.features_of, nb.yardstick), nb.real_test, nb.held_out)
    nb.name, nb.shape, nb.CLASSES = name, (1, 28, 28), range(10)
    nb.net, nb.cfg = nb.load_net(Path(f"assets/weights/{name.lower()}.pt"))
    nb.road = nb.make_schedule(nb.cfg.schedule, nb.cfg.T)
    nb.denoise = nb.denoiser(nb.net, nb.road, nb.cfg.predict)
    return nb


def excess(nb: object, net: object, cfg: object, n: int, seed: int) -> float:
    """The excess FID of n pictures: random labels, 25 calls, eta = 0.5."""
    road = nb.make_schedule(cfg.schedule, cfg.T)
    x = nb.draw(nb.denoiser(net, road, cfg.predict), road, nb.random_labels(n, 10, seed),
                nb.timesteps(cfg.T, 25), (1, 28, 28), 0.5, seed)
    return nb.excess_fid(nb.eye, nb.to_bytes(x))


def worth(nb: object) -> None:
    """Flow against v, even t against most t from the middle, the average: five seeds."""
    rows = []
    for seed in range(5):
        for name, change in {"v": {}, "flow": dict(schedule="flow", predict="flow"),
                             "uniform t": dict(t_even=1.0)}.items():
            cfg = nb.Config(steps=1500, seed=seed, **change)
            run = nb.Run(cfg, 1)
            nb.train(run, nb.images, nb.labels, cfg, Path(f"runs/worth-{name}-{seed}.pt"),
                     save_every=10**9)
            row = {"variant": name, "seed": seed, "steps": 1500, "N": 1000,
                   "averaged": excess(nb, run.ema, cfg, 1000, 100 + 10 * seed)}
            if name == "v":
                row["last"] = excess(nb, run.net, cfg, 1000, 100 + 10 * seed)
            rows.append(row)
            print(json.dumps(row), flush=True)
    keep("worth-fashionmnist", rows)


def more(nb: object) -> None:
    """Runs of 2000 and 5000 steps, and the second trained on for 5000 and 20,000 more."""
    rows, run = [], None
    for steps, total in ((2000, 2000), (5000, 5000), (5000, 10_000), (20_000, 30_000)):
        cfg = replace(nb.Config(), steps=steps)
        file = Path(f"runs/more-{total}.pt")
        last, run = run, nb.Run(cfg, 1)
        if total > 5000:
            cfg = replace(cfg, lr=2e-3, ema_decay=0.999)
            run = nb.train_on(last, cfg)
        if file.exists():
            run.load(file)
        nb.train(run, nb.images, nb.labels, cfg, file)
        scores = [excess(nb, run.ema, cfg, 1000, seed) for seed in (100, 200, 300)]
        y, road = torch.arange(10), nb.make_schedule(cfg.schedule, cfg.T)
        x = nb.draw(nb.denoiser(run.ema, road, cfg.predict), road, y,
                    nb.timesteps(cfg.T, 50), (1, 28, 28), 0.5, 7)
        rows.append({"steps": total, "N": 1000, "excess": scores,
                     "pictures": base64.b64encode(
                         nb.to_bytes(x).numpy().tobytes()).decode()})
        print(total, scores, flush=True)
        keep("more-fashionmnist", rows)


def sampler(nb: object, name: str, calls: int) -> dict:
    """The arguments of draw: DDIM with some eta, such as "eta = 0.5", or a rule of 5.1."""
    if name in nb.RULES:
        return nb.few_step(name, nb.denoise, nb.road, calls)
    return dict(denoise=nb.denoise, schedule=nb.road, eta=float(name.split(" = ")[1]),
                times=nb.timesteps(nb.cfg.T, calls))


def verdict(nb: object) -> None:
    """Samplers with 50 calls by FID to 5000 pictures that the network never saw; the best and
    DDPM on the test pictures."""
    fresh = nb.features_of(nb.yardstick, nb.load_data(nb.name)[0][-5000:])
    train = nb.features_of(nb.yardstick, nb.images)
    near = nb.neighbour(nb.eye.test[:1000], train).quantile(0.01).item()
    names = ("eta = 0", "eta = 0.3", "eta = 0.5", "eta = 0.7", "eta = 1", "2M", "2M with noise")

    def drawn(name: str, n: int, seed: int) -> tuple:
        y = nb.random_labels(n, 10, seed)
        return nb.to_bytes(nb.draw(y=y, shape=nb.shape, seed=seed, at_once=1000,
                                   **sampler(nb, name, 50))), y

    choice = {name: nb.fid(fresh, nb.eye.features(drawn(name, 10_000, 7000)[0]))
              for name in names}
    print(choice, flush=True)
    rows = []
    for name in {"eta = 1", min(choice, key=choice.get)}:
        for n, seed in [(2000, 100 * i) for i in range(1, 6)] + [(10_000, 100)]:
            found = nb.judge(*drawn(name, n, seed), nb.yardstick,
                             {"classifier": nb.eye}, train, near)
            rows.append({"sampler": name, "calls": 50, "w": 1, "N": n, "seed": seed,
                         "excess": found.pop("excess, classifier"), **found})
            print(rows[-1], flush=True)
    keep(f"verdict-{nb.name.lower()}", rows, {"FID to held-out, N = 10,000, one seed": choice})


def begin(nb: object, **changes: object) -> tuple:
    """A run that begins at the shipped weights, and its settings."""
    cfg = replace(nb.cfg, label_drop=0.0, **changes)
    run = nb.Run(cfg, 1)
    for part in (run.net, run.ema.module):
        part.load_state_dict(nb.net.state_dict())
    if nb.device.type == "cuda":
        run = nb.captured(run, nb.make_batch(*nb.data, 0, cfg))
    return run, cfg


def pairs(nb: object) -> object:
    """The student of section 7.1: shipped."""
    begun, (run, cfg) = time.time(), begin(nb, batch=256, steps=20_000, lr=1e-3, warmup=100,
                                           ema_decay=0.999)
    drawn = nb.draw_pairs(nb.denoise, nb.road, 100_000, 40, 7, at_once=2000)
    for step in range(cfg.steps):
        nb.train_step(run, nb.pair_batch(drawn, step, cfg), nb.on_device, cfg)
    half = {name: value.half().cpu() for name, value in run.ema.module.state_dict().items()}
    file = Path(f"assets/weights/few-{nb.name.lower()}.pt")
    torch.save({"config": json.dumps(asdict(cfg)), "ema": half}, file)
    file.with_suffix(".json").write_text(json.dumps(where() | {
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "data": f"{len(drawn[1]):,} noises and what the shipped weights draw from them",
        "calls a pair": 40, "steps": cfg.steps, "batch": cfg.batch,
        "minutes": round((time.time() - begun) / 60, 1)}, indent=1))
    return run


def consistency(nb: object) -> object:
    """Consistency distillation, Y. Song et al. 2023: the same answer a step of DDIM later."""
    run, cfg = begin(nb, batch=128, steps=6000, lr=3e-4, warmup=100, ema_decay=0.999)
    student = nb.denoiser(run.net, nb.on_device, cfg.predict)
    for step in range(cfg.steps):
        x_0, y, _, eps = nb.make_batch(*nb.data, step, cfg)
        t = torch.randint(1, cfg.T + 1, y.shape, device=y.device)
        s = (t - 8 - 120 * (cfg.steps - step) // cfg.steps).clamp(min=0)  # nearer and nearer
        with torch.no_grad():
            x_t = nb.add_noise(x_0, t, eps, nb.on_device)
            x0_hat = nb.denoise(x_t, t, y).clamp(-1, 1)
            eps_hat = (x_t - nb.at(nb.on_device.signal, t) * x0_hat) / nb.at(
                nb.on_device.noise, t)
            goal = student(nb.add_noise(x0_hat, s, eps_hat, nb.on_device), s, y).clamp(-1, 1)
            goal = torch.where((s == 0).view(-1, 1, 1, 1), x0_hat, goal)
        error = (student(x_t, t, y) - goal).square().mean((1, 2, 3))
        nb.descend(run, ((error + 0.03 ** 2).sqrt() - 0.03).mean(), cfg)  # pseudo-Huber
    return run


def matching(nb: object) -> object:
    """Distribution matching, Yin et al. 2024; where the picture can be seen, the plain loss."""
    run, cfg = begin(nb, batch=128, steps=6000, lr=2e-4, warmup=100, ema_decay=0.999)
    critic, critic_cfg = begin(nb, batch=128, steps=12_000, lr=6e-4, warmup=40)
    student, seen = (nb.denoiser(each.net, nb.on_device, cfg.predict) for each in (run, critic))
    for step in range(3 * cfg.steps):
        x_0, y, t, eps = nb.make_batch(*nb.data, step, cfg)
        s = torch.randint(1, 6, y.shape, device=y.device).clamp(max=4) * cfg.T // 4
        x_s = nb.add_noise(x_0, s, eps, nb.on_device)
        if step % 3:  # the critic learns what the student draws
            with torch.no_grad():
                x = student(x_s, s, y)
            nb.train_step(critic, (x, y, t, torch.randn_like(x)), nb.on_device, critic_cfg)
            continue
        x = student(x_s, s, y)
        with torch.no_grad():
            t = torch.randint(cfg.T // 50, cfg.T * 49 // 50, y.shape, device=y.device)
            x_t = nb.add_noise(x, t, torch.randn_like(x), nb.on_device)
            real, own = nb.denoise(x_t, t, y), seen(x_t, t, y)
            size = (x - real).abs().mean((1, 2, 3), keepdim=True).clamp(min=0.02)
            goal = x + (real - own) / size
        plain = (s < cfg.T).view(-1, 1, 1, 1) * (x - x_0).square()
        nb.descend(run, ((x - goal).square() + plain).mean() / 2, cfg)
    return run


def draw_again(nb: object, guess: object, y: torch.Tensor, calls: int, seed: int
               ) -> torch.Tensor:
    """Guess, put fresh noise back in, guess again: Y. Song et al. 2023, algorithm 1."""
    x, y = nb.draw_noise((len(y), *nb.shape), seed), y.to(nb.device)
    for k, t in enumerate(nb.timesteps(nb.cfg.T, calls)[:-1]):
        t = torch.full_like(y, t)
        if k:
            x = nb.add_noise(x, t, nb.draw_noise(tuple(x.shape), seed + k), nb.road)
        with torch.no_grad():
            x = guess(x, t, y).clamp(-1, 1)
    return x.cpu()


def few(nb: object, *methods: str) -> None:
    """Excess FID by few calls: the students and the teacher, five seeds."""
    nb.on_device = nb.Schedule(*(curve.float().to(nb.device) for curve in nb.road))
    nb.data = nb.images.to(nb.device), nb.labels.to(nb.device)
    file, rows = Path(f"assets/results/few-{nb.name.lower()}.json"), []
    if file.exists():
        rows = json.loads(file.read_text())["rows"]
    for name in methods or ("DDIM", "2M with noise", "pairs", "consistency", "matching"):
        rows = [row for row in rows if row["method"] != name]
        if name not in nb.RULES:
            guess = nb.denoiser(globals()[name](nb).ema, nb.road, nb.cfg.predict)
        for calls in (1, 2, 4, 8, 10, 20, 50) if name in nb.RULES else (1, 2, 4, 8):
            for seed in range(100, 600, 100):
                y = nb.random_labels(2000, 10, seed)
                if name in ("consistency", "matching"):
                    x = torch.cat([draw_again(nb, guess, part, calls, seed + 1000 * i)
                                   for i, part in enumerate(y.split(500))])
                else:
                    how = nb.few_step(name, nb.denoise, nb.road, calls) if name in nb.RULES \
                        else dict(denoise=guess, schedule=nb.road, eta=0.0,
                                  times=nb.timesteps(nb.cfg.T, calls))
                    x = nb.draw(y=y, shape=nb.shape, seed=seed, at_once=500, **how)
                x = nb.to_bytes(x)
                seen = nb.yardstick.head(nb.eye.features(x).to(nb.device)).argmax(1).cpu()
                rows.append({"method": name, "calls": calls, "seed": seed, "N": 2000,
                             "excess": nb.excess_fid(nb.eye, x),
                             "as asked": (seen == y).float().mean().item()})
            print(rows[-1], flush=True)
        keep(f"few-{nb.name.lower()}", rows)


def transformers(nb: object, lr: str = "3e-3", *seeds: str) -> None:
    """DiT against the U-Net: 6000 steps of 128, on pixels and on the shipped latents."""
    lat = load_definitions("latent_diffusion_cab")
    lat.images, lat.labels = nb.images, nb.labels
    latent = lat.load_latent(Path(f"assets/weights/latent-{nb.name.lower()}.pt"))
    z = latent.scale.to(lat.encode_all(latent.coder, nb.images))
    cases = {("pixels", "DiT, patches of 4"): nb.DiT, ("pixels", "U-Net"): nb.UNet,
             ("pixels", "DiT, patches of 2"): partial(nb.DiT, patch=2, d=72, depth=3),
             ("latents", "DiT"): partial(nb.DiT, side=7, patch=1, d=96, depth=4),
             ("latents", "U-Net"): lat.LatentUNet}
    file, rows = Path("assets/results/transformers.json"), []
    if file.exists():
        rows = json.loads(file.read_text())["rows"]
    for seed in map(int, seeds or "01234"):
        for (space, name), network in cases.items():
            if any((row["space"], row["network"], row["seed"], row["lr"])
                   == (space, name, seed, float(lr)) for row in rows):
                continue
            own, x = (lat, z) if space == "latents" else (nb, nb.images)
            size = {"widths": (64, 128), "blocks": 1} if space == "latents" else {}
            cfg = own.Config(batch=128, steps=6000, seed=seed, lr=float(lr), **size)
            run = own.Run(cfg, x.shape[1], network)
            own.train(run, x, nb.labels, cfg, Path(f"runs/transformer-{seed}.pt"),
                      save_every=10**9)
            guess = own.denoiser(run.ema, nb.road, cfg.predict)
            y, noise = nb.random_labels(2000, 10, 100 + 10 * seed), 100 + 10 * seed
            if space == "latents":
                drawn = lat.Latent(guess, latent.coder, latent.scale, nb.road).draw(
                    y, 25, 1.0, 0.5, noise)
            else:
                drawn = nb.draw(guess, nb.road, y, nb.timesteps(1000, 25), nb.shape, 0.5, noise)
            one = x[:1].float().to(nb.device), torch.ones(1, dtype=torch.long, device=nb.device)
            rows.append({"space": space, "network": name, "lr": cfg.lr, "seed": seed,
                         "steps": 6000, "batch": 128, "N": 2000, "calls": 25, "eta": 0.5,
                         "excess": nb.excess_fid(nb.eye, nb.to_bytes(drawn)),
                         "parameters": sum(p.numel() for p in run.net.parameters()),
                         "multiply-adds": lat.multiply_adds(lambda: run.net(*one))})
            print(rows[-1], flush=True)
            keep("transformers", rows)


def likelihood(nb: object) -> None:
    """Bits a pixel of 500 test pictures, and of MNIST's by the network of Fashion-MNIST."""
    rows = []
    for steps in (1000, 10_000):
        road = nb.road if steps == 1000 else nb.finer(nb.road, steps)
        guess = nb.on_road(nb.denoise, nb.road, road)
        for data in ("FashionMNIST", "MNIST"):
            x, y, _ = nb.load_data(data, train=False)
            y = y.to(nb.device) if data == nb.name else torch.full_like(y, 10).to(nb.device)
            found = torch.cat([nb.bits(guess, x[i:i + 100], road, 50, y[i:i + 100], i)
                               for i in range(0, 500, 100)])
            rows.append({"network": nb.name, "pictures": data, "steps": steps, "N": 500,
                         "strata": 50, "bits": found.sum(1).mean().item(),
                         "error": found.sum(1).std().item() / 500 ** 0.5,
                         "terms": found.mean(0).tolist()})
            print({key: rows[-1][key] for key in ("pictures", "steps", "bits", "error")},
                  flush=True)
    keep("likelihood", rows)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    rest = sys.argv[2:]
    globals()[sys.argv[1]](ready("MNIST" if "MNIST" in rest else "FashionMNIST"),
                           *[word for word in rest if word != "MNIST"])

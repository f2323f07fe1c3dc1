"""The text network of latent_diffusion_cab.ipynb, and how often it obeys.

    python assets/tools/words.py weights|bag|verdict MNIST

The notebook's own functions on one thread: half an hour for weights, ten minutes each for
the bag, which is not shipped, and the verdict, which counts it if runs/ holds it.
"""
import hashlib
import json
import math
import random
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from definitions import prepare, where
from latents import SEEDS

N, BAG_STEPS = 1000, 4000


def study(nb: object, name: str) -> tuple:
    """The latent model, the language, thresholds, and (codes, classes, levels) to learn."""
    latent = nb.load_latent(Path(f"assets/weights/latent-{name.lower()}.pt"))
    language, kinds = nb.Language(name), nb.labels
    values = torch.cat([language.measure(nb.scale(x)) for x in nb.images.split(1000)])
    thresholds = nb.thresholds_of(values, kinds)
    levels = nb.levels_of(values, kinds, thresholds)
    seen = ~language.withheld(kinds, levels)
    z = latent.scale.to(nb.encode_all(latent.coder, nb.images))
    return latent, language, thresholds, (z[seen], kinds[seen], levels[seen])


def learn(nb: object, name: str, network: type, steps: int, widths: tuple) -> object:
    """A network trained with captions, two of three steps on pairs."""
    latent, language, _, examples = study(nb, name)
    cfg = nb.Config(dataset=name, widths=widths, blocks=1, batch=128, steps=steps,
                    warmup=200, ema_decay=0.999, label_drop=0.0)
    run = nb.Run(cfg, 4, partial(network, words=len(language.vocabulary)))
    file = Path(f"runs/words-{network.__name__}-{name}-{steps}.pt")
    if file.exists():
        run.load(file)
    nb.train_words(run, *examples, language, cfg, file, 2, lambda run: print(
        len(run.losses), sum(run.losses[-100:]) / 100, flush=True)
        if len(run.losses) % 500 == 0 else None)
    return latent._replace(denoise=nb.denoiser(run.ema, latent.schedule, "v")), run, cfg


def weights(nb: object, name: str) -> None:
    """The shipped weights."""
    out, started = Path(f"assets/weights/words-{name.lower()}.pt"), time.time()
    _, run, cfg = learn(nb, name, nb.TextUNet, 12_000, (36, 72))
    half = {key: value.half() for key, value in run.ema.module.state_dict().items()}
    torch.save({"config": json.dumps(asdict(cfg)), "ema": half}, out)
    out.with_suffix(".json").write_text(json.dumps(
        {"minutes": round((time.time() - started) / 60, 1)}))  # verdict adds the rest


def bag(nb: object, name: str) -> None:
    """The bag of words on pairs; its checkpoint stays in runs."""
    learn(nb, name, nb.BagUNet, BAG_STEPS, (40, 80))


def combinations(language: object, n: int, seed: int, never: bool) -> tuple:
    """Prompts for what training never saw, or for the same words on other classes."""
    rng, chosen = random.Random(seed), []
    for i in range(n):
        kind, wanted = language.held_out[i % len(language.held_out)]
        others = [c for c in range(10) if c != kind]
        chosen.append((kind if never else rng.choice(others), wanted))
    return ([language.text(*one) for one in chosen],
            torch.tensor([[kind] for kind, _ in chosen]),
            torch.tensor([[wanted] for _, wanted in chosen]))


def weakest(choice: list[dict]) -> float:
    """The lowest w whose mean obedience is within a point of the best."""
    means = {row["w"]: sum(list(row.values())[4:]) / 5 for row in choice}
    return min(w for w, mean in means.items() if mean >= max(means.values()) - 0.01)


def verdict(nb: object, name: str) -> None:
    """The JSON beside the weights: w by other seeds, then five seeds, and the bag."""
    file = Path(f"assets/weights/words-{name.lower()}.pt")
    minutes = json.loads(file.with_suffix(".json").read_text())["minutes"]
    latent, language, thresholds, _ = study(nb, name)
    shipped, choice, rows = nb.load_words(file, latent, language)[0], [], []
    for w in (1.0, 2.0, 3.0, 4.0, 5.0):
        for things in (1, 2):
            found = nb.obeyed(shipped, language, thresholds,
                              nb.ask(language, 400, 7, things), w, 7)
            choice.append({"w": w, "things": things, "N": 400, "seed": 7} | found)
            print(choice[-1], flush=True)
    best = {things: weakest([row for row in choice if row["things"] == things])
            for things in (1, 2)}
    x_hat = nb.decode_all(latent.coder, nb.encode_all(latent.coder, nb.test_images))
    real, after = (nb.levels_of(language.measure(x), nb.test_labels, thresholds)
                   for x in (nb.x_test, x_hat))
    f = nb.features_of(nb.yardstick, nb.to_bytes(x_hat))
    row = {"network": "none: test pictures, decoded", "question": "one thing",
           "seed": 0, "N": len(x_hat), "w": 0,
           "class": (nb.yardstick.head(f).argmax(1) == nb.test_labels).float().mean().item()}
    for j, words in enumerate(language.attributes):
        said = sum(real[:, j] == level for level, word in enumerate(words) if word) > 0
        row[" / ".join(filter(None, words))] = (
            real[said, j] == after[said, j]).float().mean().item()
    rows.append(row)
    questions = {"one thing": (1, partial(nb.ask, language, N)),
                 "two things": (2, partial(nb.ask, language, N, things=2)),
                 "one thing, seen": (1, partial(combinations, language, N, never=False)),
                 "one thing, never seen": (1, partial(combinations, language, N, never=True))}
    tasks = [("shipped", shipped, question) for question in questions]
    if Path(f"runs/words-BagUNet-{name}-{BAG_STEPS}.pt").exists():
        painter = learn(nb, name, nb.BagUNet, BAG_STEPS, (40, 80))[0]
        tasks += [("bag", painter, question) for question in ("one thing", "two things")]
    for network, painter, question in tasks:
        things, ask = questions[question]
        for seed in [100 * (1 + i) for i in SEEDS]:
            found = nb.obeyed(painter, language, thresholds, ask(seed=seed), best[things],
                              seed)
            rows.append({"network": network, "question": question, "seed": seed, "N": N,
                         "w": best[things]} | {key: share for key, share in found.items()
                                               if not math.isnan(share)})  # never asked
            print(rows[-1], flush=True)
    cfg = json.loads(torch.load(file, weights_only=True)["config"])
    file.with_suffix(".json").write_text(json.dumps(where() | {
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(), "config": cfg,
        "data": f"55,000 images of the {name} training split, without the held-out "
                "combinations", "minutes": minutes, "choice": choice, "rows": rows},
        indent=1))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    globals()[sys.argv[1]](prepare("latent_diffusion_cab", sys.argv[2]), sys.argv[2])

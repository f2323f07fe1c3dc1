"""Images a second in training by one process and by two, one thread each. By hand, 3 minutes
on a machine with two cores and nothing else to do:

    python assets/tools/bench_parallel.py

The cases take turns, round after round; torchrun starts each. Writes scaling.json.
"""
import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from definitions import ROOT, load_definitions

CASES = ((1, 32), (2, 32), (2, 64))  # processes, images a step of all together


def work(file, batch, steps):
    """One case, in each process: five steps to warm up, then those that count."""
    nb = load_definitions("diffusion_tutorial")
    torch.distributed.init_process_group("gloo")
    rank, count = torch.distributed.get_rank(), torch.distributed.get_world_size()
    cfg = nb.replace(nb.Config(), batch=batch)
    images, labels, _ = nb.load_data(cfg.dataset)
    run, schedule = nb.Run(cfg), nb.make_schedule(cfg.schedule, cfg.T)
    if count > 1:
        run.net = torch.nn.parallel.DistributedDataParallel(run.net)
    for step in range(5 + steps):
        if step == 5:
            started = time.perf_counter()
        share = tuple(part[rank::count] for part in nb.make_batch(images, labels, step, cfg))
        nb.train_step(run, share, schedule, cfg)
    if rank == 0:
        Path(file).write_text(json.dumps({
            "rate": steps * batch / (time.perf_counter() - started),
            "dtype": "bfloat16" if nb.has_bf16() else "float32"}))
    torch.distributed.destroy_process_group()


def cpu_name():
    """The processor, as Linux names it."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines()
             if line.startswith("model name")] if info.exists() else []
    return names[0] if names else platform.processor()


def main():
    """Run the cases in turn; print and write rates, medians and provenance."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", default=str(ROOT / "assets/results/scaling.json"))
    parser.add_argument("--work", nargs=2)
    args = parser.parse_args()
    os.chdir(ROOT)
    if args.work:
        work(args.work[0], int(args.work[1]), args.steps)
        return
    load = os.getloadavg()[0]  # near 0 where nothing else runs
    found, env = {case: [] for case in CASES}, {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rate.json")
        for _ in range(args.rounds):
            for count, batch in CASES:
                subprocess.run(
                    [sys.executable, "-m", "torch.distributed.run", "--standalone",
                     "--nproc-per-node", str(count), __file__, "--steps", str(args.steps),
                     "--work", file, str(batch)], env=env, check=True)
                made = json.loads(file.read_text())
                found[count, batch].append(round(made["rate"], 1))
                print(f"{count} processes, {batch} images a step: {made['rate']:.0f} a second",
                      flush=True)
    median = {case: sorted(rates)[len(rates) // 2] for case, rates in found.items()}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True,
                            text=True).stdout.strip()
    Path(args.out).write_text(json.dumps({
        "cpu": cpu_name(), "cores": os.cpu_count(), "threads a process": 1,
        "dtype": made["dtype"], "torch": torch.__version__, "backend": "gloo",
        "steps": args.steps, "repetitions": args.rounds, "commit": commit,
        "load average before": round(load, 1), "rows": [
            {"processes": count, "batch": batch, "images a second": found[count, batch],
             "median": median[count, batch],
             "times one": round(median[count, batch] / median[CASES[0]], 2)}
            for count, batch in CASES]}, indent=1) + "\n")
    print(Path(args.out).read_text())


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""State tracking on one GPU: parity, arithmetic modulo 5 and the word problem of S5, for sLSTM, mLSTM and a hybrid.

Inputs are tokens, targets the running state, which is never an input; trained at lengths of up to 40, judged at
positions 200 to 256 of 1,000 fresh sequences (dev/bench/state_tracking.h). Every run is a process of its own, all of
them side by side; with NVIDIA's MPS (nvidia-cuda-mps-control -d, before) they share the GPU without taking turns.

    make build/state_tracking_gpu && python3 dev/bench/state_tracking_gpu.py --out out/state_tracking

Writes state_tracking.md, a table, and state_tracking.svg, the accuracy at every position, to the folder --out. Exit
code 1 if a run failed.
"""
import argparse
import concurrent.futures
import os
import subprocess
import sys
import time

ROOT = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
TASKS = {"parity": ("parity", 1 / 2), "mod5": ("arithmetic modulo 5", 1 / 5), "s5": ("S5 word problem", 1 / 120)}
MODELS = {"slstm": "#c22", "mlstm*2": "#26c", "mlstm,slstm": "#2a2", "slstm*2": "#e80"}
SEEDS = (1, 2, 3)
STEPS = {"parity": 3000, "mod5": 6000, "s5": 8000}
SOLVED, RATE, WIDTH, HEADS, BATCH = 0.1, 3e-3, 128, 1, 128
FIRST, LAST = 200, 256                                                      # positions that count
TRAINED = 40
PANEL = 360, 240


def run(program, task, blocks, seed):
    """(length reached, [accuracy at each position]); None if it failed"""
    command = [program, task, blocks, seed, STEPS[task], RATE, SOLVED, WIDTH, HEADS, BATCH]
    result = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if result.returncode:
        print(f"{task} {blocks} seed {seed}: exit code {result.returncode}: {result.stderr.strip()[-300:]}",
              file=sys.stderr)
        return None
    length, *right = result.stdout.strip().split("\n")[-1].split()
    return int(length), [float(value) for value in right]


def judged(right):
    return sum(right[FIRST - 1:LAST]) / (LAST - FIRST + 1)


def table(results):
    lines = ["| task | chance | model | " + " | ".join(f"seed {seed}" for seed in SEEDS) + " | longest trained |",
             "|---|---|---|" + "---|" * (len(SEEDS) + 1)]
    for task, (title, chance) in TASKS.items():
        for blocks in MODELS:
            runs = [results[task, blocks, seed] for seed in SEEDS]
            cells = [f"{100 * judged(r[1]):.2f} %" if r else "failed" for r in runs]
            lengths = ", ".join(str(r[0]) if r else "-" for r in runs)
            lines.append(f"| {title} | {100 * chance:.1f} % | `{blocks}` | " + " | ".join(cells) + f" | {lengths} |")
    return lines


def plot(results):
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {len(TASKS) * PANEL[0]} {PANEL[1] + 40}" '
           'font-family="sans-serif" font-size="12">', '<rect width="100%" height="100%" fill="white"/>']
    width, height = PANEL[0] - 70, PANEL[1] - 70
    for column, (task, (title, _)) in enumerate(TASKS.items()):
        left, top = column * PANEL[0] + 50, 40

        def X(t):
            return left + (t - 1) / (LAST - 1) * width
        svg += [f'<text x="{left}" y="{top - 12}">{title}: % right at each position</text>',
                f'<rect x="{left}" y="{top}" width="{X(TRAINED) - left:.1f}" height="{height}" fill="#eee"/>',
                f'<path fill="none" stroke="black" d="M{left} {top}v{height}h{width}"/>']
        for t in (1, TRAINED, 100, FIRST, LAST):
            svg.append(f'<text x="{X(t):.1f}" y="{top + height + 16}" text-anchor="middle">{t}</text>')
        for share in (0, 0.5, 1):
            svg.append(f'<text x="{left - 6}" y="{top + (1 - share) * height + 4:.1f}" text-anchor="end">'
                       f'{100 * share:.0f}</text>')
        for blocks, color in MODELS.items():
            for seed in SEEDS:
                if results[task, blocks, seed]:
                    points = " ".join(f"{X(t + 1):.1f},{top + (1 - y) * height:.1f}"
                                      for t, y in enumerate(results[task, blocks, seed][1]) if t % 6 == 0)
                    svg.append(f'<polyline fill="none" stroke="{color}" points="{points}"/>')
    for k, (blocks, color) in enumerate(MODELS.items()):
        x, y = 50 + 150 * k, PANEL[1] + 20
        svg.append(f'<rect x="{x}" y="{y - 5}" width="24" height="3" fill="{color}"/>')
        svg.append(f'<text x="{x + 32}" y="{y}">{blocks}</text>')
    svg.append(f'<text x="660" y="{PANEL[1] + 20}">grey: lengths of training; a curve a seed</text>')
    return "\n".join(svg + ["</svg>"]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--program", default=os.path.join(ROOT, "build", "state_tracking_gpu"))
    parser.add_argument("--out", default=os.path.join(ROOT, "out", "state_tracking"))
    parser.add_argument("--jobs", type=int, default=len(TASKS) * len(MODELS) * len(SEEDS), help="processes at a time")
    options = parser.parse_args()
    os.makedirs(options.out, exist_ok=True)
    begin = time.time()
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        futures = {(task, blocks, seed): pool.submit(run, options.program, task, blocks, seed)
                   for task in reversed(TASKS) for blocks in MODELS for seed in SEEDS}  # the longest first
        results = {key: future.result() for key, future in futures.items()}
    lines = [f"D {WIDTH}, heads: {HEADS}, batches of {BATCH}, learning rate {RATE}; sequences grow below a loss of "
             f"{SOLVED}; steps: " + ", ".join(f"{task} {STEPS[task]}" for task in TASKS)
             + f"; accuracy at positions {FIRST} to {LAST}; {time.time() - begin:.0f} s in all", "", *table(results)]
    for name, text in (("md", "\n".join(lines) + "\n"), ("svg", plot(results))):
        with open(os.path.join(options.out, "state_tracking." + name), "w") as file:
            file.write(text)
    print("\n".join(lines))
    return None in results.values()


if __name__ == "__main__":
    sys.exit(main())

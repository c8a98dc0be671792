#!/usr/bin/env python3
"""Training speed of train_xlstmcu on two GPUs against one, in one table.

    make train_xlstmcu && python3 dev/bench/bench_ranks.py              # all; needs mpirun and two GPUs
    python3 dev/bench/bench_ranks.py --case dp --steps 40 --turns 3

dp: the 406m model, 8 x 2048 tokens a GPU, plain data parallel and with --zero 1; two GPUs do twice the work of one.
16384, 262144, 1048576: so many tokens in one sequence over two GPUs (--sp 2), against half of it on one.

A time is the median over the steps of all turns, but the first ones of each; the sides take turns. "ratio" is tokens a
second on two GPUs over those on one, so 2 would be perfect. With --kernels FILE (build/libkernel_times.so) one more
turn of each case is run with it: how long collectives took, and how long nothing else ran meanwhile, a step.
"""
import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from bench_gpu import ROOT, write_shard  # noqa: E402

MODEL = ["--model", "406m"]
LONG = ["--batch", "1", "--recompute", "block"]
# case: [(label, ranks, flags)], the first is what the others are compared with; steps that do not count, and that do
CASES = {
    "dp": ([("1 GPU, 8 x 2048", 1, ["--batch", "8", "--seq-len", "2048"]),
            ("2 GPUs, 2 x 8 x 2048", 2, ["--batch", "8", "--seq-len", "2048"]),
            ("2 GPUs, --zero 1", 2, ["--batch", "8", "--seq-len", "2048", "--zero", "1"])], 5, 30),
    "16384": ([("1 GPU, 8192", 1, ["--batch", "1", "--seq-len", "8192"]),
               ("2 GPUs, --sp 2, 16384", 2, ["--batch", "1", "--seq-len", "16384", "--sp", "2"])], 5, 30),
    "262144": ([("1 GPU, 131072", 1, LONG + ["--seq-len", "131072"]),
                ("2 GPUs, --sp 2, 262144", 2, LONG + ["--seq-len", "262144", "--sp", "2"])], 2, 5),
    "1048576": ([("1 GPU, 524288", 1, LONG + ["--seq-len", "524288"]),
                 ("2 GPUs, --sp 2, 1048576", 2, LONG + ["--seq-len", "1048576", "--sp", "2"])], 2, 2),
}


def run(program, ranks, flags, shard, steps, env=None):
    """One process or mpirun; the milliseconds of all steps, and what the plan says of memory."""
    with tempfile.TemporaryDirectory() as out:
        command = [program] + MODEL + flags + ["--train", shard, "--steps", str(steps), "--save-every", "0",
                                               "--no-shuffle", "--lr", "1e-4", "--out", out + "/run"]
        if ranks > 1:
            command = ["mpirun", "--bind-to", "none", "-np", str(ranks)] + command
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                              env={**os.environ, **(env or {})})
        if done.returncode:
            sys.exit(f"{' '.join(command)}\n{done.stderr.strip()}")
        with open(out + "/run/log.jsonl") as f:
            lines = [json.loads(line) for line in f]
        memory = re.search(r"^memory .*", done.stdout, re.M)
        parts = [float(x) for x in re.findall(r"([\d.]+) MiB", memory.group(0))]
        losses = [line["loss"] for line in lines if "loss" in line]
        return [line["ms"] for line in lines if "ms" in line], sum(parts[:2]) / 1024, losses


def collectives(program, library, ranks, flags, shard, steps):
    """{kernel of NCCL: (ms a step, ms a step alone)} on the slowest rank."""
    worst = {}
    with tempfile.TemporaryDirectory() as tmp:
        run(program, ranks, flags, shard, steps,
            {"CUDA_INJECTION64_PATH": os.path.abspath(library), "KERNEL_TIMES_STEP": "grad_norm_add_kernel",
             "KERNEL_TIMES_OUT": tmp + "/kernels.%d"})
        for rank in range(ranks):
            with open(f"{tmp}/kernels.{rank}") as f:
                text = f.read()
            count = int(re.search(r"^steps (\d+)", text, re.M).group(1))
            for words in (line.split(None, 5) for line in text.splitlines() if "nccl" in line):
                total, alone = float(words[1]) / count, float(words[2]) / count
                if alone >= worst.get(words[5], (0, 0))[1]:
                    worst[words[5]] = (total, alone)
    return worst


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--program", default=os.path.join(ROOT, "train_xlstmcu"))
    parser.add_argument("--case", action="append", choices=sorted(CASES))
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--steps", type=int, help="that count, a turn")
    parser.add_argument("--kernels", metavar="FILE", help="build/libkernel_times.so")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as tmp:
        shard = os.path.join(tmp, "tokens.bin")
        write_shard(shard, 50304)
        for case in args.case or CASES:
            sides, warmup, steps = CASES[case]
            steps = args.steps or steps
            times, memory = {label: [] for label, _, _ in sides}, {}
            for _ in range(args.turns):
                for label, ranks, flags in sides:
                    ms, memory[label], _ = run(args.program, ranks, flags, shard, warmup + steps)
                    times[label] += ms[warmup:]
            base = None
            for label, ranks, flags in sides:
                ms = statistics.median(times[label])
                length, batch = int(flags[flags.index("--seq-len") + 1]), int(flags[flags.index("--batch") + 1])
                groups = ranks // (int(flags[flags.index("--sp") + 1]) if "--sp" in flags else 1)
                speed = 1e3 * length * batch * groups / ms
                base = base or speed
                print(f"{label:26} {ms:9.2f} ms (fastest {min(times[label]):.2f})  {speed / 1e3:8.1f}k tok/s  "
                      f"ratio {speed / base:.3f}  memory {memory[label]:.1f} GiB a GPU", flush=True)
            for label, ranks, flags in sides:
                if args.kernels and ranks > 1:
                    for name, (total, alone) in collectives(args.program, args.kernels, ranks, flags, shard,
                                                            8 + 2 * warmup).items():
                        print(f"    {label}: {name}: {total:.3f} ms a step, {alone:.3f} ms alone", flush=True)


if __name__ == "__main__":
    main()

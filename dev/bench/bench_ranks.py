#!/usr/bin/env python3
"""Training speed of train_xlstmcu on two GPUs against one, in one table.

    make train_xlstmcu && python3 dev/bench/bench_ranks.py              # all; needs mpirun and two GPUs
    python3 dev/bench/bench_ranks.py --case dp --steps 40 --turns 3

dp: the 406m model, 8 x 2048 tokens a GPU, with --zero 1 and without; two GPUs do twice the work of one.
16384, 262144, 1048576: so many tokens in one sequence over two GPUs (--sp 2), against half of it on one.

A time is the median over the steps of all turns, but the first ones of each; the sides take turns. Two GPUs are seldom
equally fast, and together as slow as the slower one: one GPU is measured on either. "ratio" is tokens a second on two
GPUs over the mean of those on one, and in brackets over those on the slower and the faster one; 2 would be perfect.
"apart": both GPUs train at the same time, but know nothing of each other; what the slower one of them then takes.
With --kernels FILE (build/libkernel_times.so) one more turn of each case is run with it: how long collectives took, and
how long nothing else ran meanwhile, a step.
"""
import argparse
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from bench_gpu import ROOT, write_shard  # noqa: E402

MODEL = ["--model", "406m"]
LONG = ["--batch", "1", "--recompute", "block"]
EIGHT, ONE = ["--batch", "8", "--seq-len", "2048"], ["--batch", "1"]
BOTH, APART = "0,1", "0 1"
# case: [(label, GPUs, flags)], the first two are what the others are compared with; steps that do not count, that do
CASES = {
    "dp": ([("GPU 0, 8 x 2048", "0", EIGHT), ("GPU 1, 8 x 2048", "1", EIGHT),
            ("apart, 8 x 2048 each", APART, EIGHT), ("2 GPUs, 2 x 8 x 2048", BOTH, EIGHT),
            ("2 GPUs, --zero 0", BOTH, EIGHT + ["--zero", "0"])], 5, 30),
    "16384": ([("GPU 0, 8192", "0", ONE + ["--seq-len", "8192"]), ("GPU 1, 8192", "1", ONE + ["--seq-len", "8192"]),
               ("apart, 8192 each", APART, ONE + ["--seq-len", "8192"]),
               ("2 GPUs, --sp 2, 16384", BOTH, ONE + ["--seq-len", "16384", "--sp", "2"]),
               ("2 GPUs, --sp 2, --zero 0", BOTH, ONE + ["--seq-len", "16384", "--sp", "2", "--zero", "0"])], 5, 30),
    "262144": ([("GPU 0, 131072", "0", LONG + ["--seq-len", "131072"]),
                ("GPU 1, 131072", "1", LONG + ["--seq-len", "131072"]),
                ("apart, 131072 each", APART, LONG + ["--seq-len", "131072"]),
                ("2 GPUs, --sp 2, 262144", BOTH, LONG + ["--seq-len", "262144", "--sp", "2"])], 2, 5),
    "1048576": ([("GPU 0, 524288", "0", LONG + ["--seq-len", "524288"]),
                 ("GPU 1, 524288", "1", LONG + ["--seq-len", "524288"]),
                 ("2 GPUs, --sp 2, 1048576", BOTH, LONG + ["--seq-len", "1048576", "--sp", "2"])], 2, 2),
}


def ranks_of(gpus):
    return len(gpus.split(","))


def command(program, ranks, flags, shard, steps, more):
    own = [program] + MODEL + flags + ["--train", shard, "--steps", str(steps), "--no-shuffle", "--lr", "1e-4"] + more
    return ["mpirun", "--bind-to", "none", "-np", str(ranks)] + own if ranks > 1 else own


def kill_session(leader):
    """Ends a process and all that it started, ranks among them: nobody is to save a checkpoint."""
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.getsid(int(name)) == leader:
                os.kill(int(name), signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            pass


def start(program, gpus, flags, shard, tmp):
    words = command(program, ranks_of(gpus), flags, shard, 1000000, ["--save-every", "0", "--out", tmp + "/run"])
    with open(tmp + "/said", "w") as said:
        return subprocess.Popen(words, stdout=said, stderr=said, start_new_session=True,
                                env={**os.environ, "CUDA_VISIBLE_DEVICES": gpus})


def step_times(tmp):
    try:
        with open(tmp + "/run/log.jsonl") as f:
            return [float(x) for x in re.findall(r'"ms": ([\d.e+]+),', f.read())]
    except FileNotFoundError:
        return []


def run(program, gpus, flags, shard, steps):
    """The milliseconds of the first steps, of the slowest of the programs where they are apart, and the GiB planned."""
    with tempfile.TemporaryDirectory() as tmp:
        places = [os.path.join(tmp, str(k)) for k in range(len(gpus.split()))]
        for place in places:
            os.mkdir(place)
        processes = [start(program, those, flags, shard, place) for those, place in zip(gpus.split(), places)]
        while all(p.poll() is None for p in processes) and any(len(step_times(place)) < steps for place in places):
            time.sleep(0.1)
        ended = any(p.poll() is not None for p in processes)
        for p in processes:
            kill_session(p.pid)
            p.wait()
        with open(places[0] + "/said") as f:
            text = f.read()
        if ended:
            sys.exit(f"{program} {' '.join(flags)}\n{text.strip()}")
        memory = re.search(r"^memory .*", text, re.M)
        slowest = max((step_times(place)[:steps] for place in places), key=statistics.median)
        return slowest, sum(float(x) for x in re.findall(r"([\d.]+) MiB", memory.group(0))[:2]) / 1024


def collectives(program, library, ranks, flags, shard, steps):
    """{kernel of NCCL or copy: (ms a step, ms a step alone)} on the slowest rank."""
    worst = {}
    with tempfile.TemporaryDirectory() as tmp:
        subprocess.run(command(program, ranks, flags, shard, steps, []), stdout=subprocess.DEVNULL, check=True,
                       env={**os.environ, "CUDA_INJECTION64_PATH": os.path.abspath(library),
                            "KERNEL_TIMES_STEP": "grad_norm_add_kernel", "KERNEL_TIMES_OUT": tmp + "/kernels.%d"})
        for rank in range(ranks):
            with open(f"{tmp}/kernels.{rank}") as f:
                text = f.read()
            count = int(re.search(r"^steps (\d+)", text, re.M).group(1))
            for words in (line.split(None, 5) for line in text.splitlines()
                          if re.search("nccl|another GPU|copies", line)):
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
                for label, gpus, flags in sides:
                    ms, memory[label] = run(args.program, gpus, flags, shard, warmup + steps)
                    times[label] += ms[warmup:]
            single = []
            for label, gpus, flags in sides:
                ms = statistics.median(times[label])
                length, batch = int(flags[flags.index("--seq-len") + 1]), int(flags[flags.index("--batch") + 1])
                groups = ranks_of(gpus) // (int(flags[flags.index("--sp") + 1]) if "--sp" in flags else 1)
                speed = 1e3 * length * batch * groups * len(gpus.split()) / ms
                ratio = ""
                if gpus in (BOTH, APART):
                    ratio = (f"  ratio {speed / statistics.mean(single):.3f} ({speed / min(single):.3f}, "
                             f"{speed / max(single):.3f})")
                else:
                    single.append(speed)
                print(f"{label:26} {ms:9.2f} ms (fastest {min(times[label]):.2f})  {speed / 1e3:8.1f}k tok/s  "
                      f"memory {memory[label]:.1f} GiB a GPU{ratio}", flush=True)
            for label, gpus, flags in sides:
                if args.kernels and gpus == BOTH:
                    for name, (total, alone) in collectives(args.program, args.kernels, ranks_of(gpus), flags, shard,
                                                            8 + 2 * warmup).items():
                        print(f"    {label}: {name}: {total:.3f} ms a step, {alone:.3f} ms alone", flush=True)


if __name__ == "__main__":
    main()

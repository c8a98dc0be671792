#!/usr/bin/env python3
"""Training speed on one GPU: train_xlstmcu against the authors' PyTorch code, same models, same batches, one table.

A step is the whole step on both sides: forward, backward, clipping by the global norm, AdamW, with fp32 weights and
bf16 arithmetic. PyTorch runs the authors' `xlstm_large` model as they train it: bf16 autocast, their Triton kernels
"limit_chunk" (chunk 64), fused AdamW, eagerly. Its steps are timed by CUDA events without a synchronisation in between.
train_xlstmcu's times are those in its log.

Every turn is a process of its own, so neither side's memory, clocks or caches help or hurt the other. The sides take
turns (A B A B ...) and medians over all steps of all turns are compared; the first steps of every turn do not count.
MFU counts 6 FLOP a matmul weight and token (without the embedding) plus the mLSTM cell at chunk length 64, for both
sides (model_flops_per_token in xlstmc/model.h), of 989 TFLOP/s. Memory is what the device reports as in use, at its
peak, less what was in use before; for PyTorch also what its tensors alone needed.

    pip install torch xlstm mlstm_kernels numpy         (or PYTHONPATH=FOLDER with the sources of xlstm, mlstm_kernels)
    make train_xlstmcu && python3 dev/bench/bench_gpu.py
    python3 dev/bench/bench_gpu.py --case 162m --side torch

`--case smoke --device cpu --program ./train_xlstm` tries the script itself, without a GPU.
"""
import argparse
import array
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
PEAK_FLOPS = 989e12                                                         # dense bf16, H100 SXM and H200
CHUNK = 64                                                                  # of the kernels "limit_chunk", and of MFU
WARMUP = 5                                                                  # steps of every turn that do not count
SHARD_TOKENS = 1 << 22

# name: width, blocks, heads, feed-forward width, vocabulary, batch, sequence, and the same model for train_xlstmcu
CASES = {
    "162m": (768, 12, 6, 2048, 50304, 16, 2048, ["--model", "164m", "--ffn", "2048"]),
    "407m": (1024, 24, 4, 2752, 50304, 8, 2048, ["--model", "406m"]),
    "407m-long": (1024, 24, 4, 2752, 50304, 1, 16384, ["--model", "406m"]),
    "smoke": (128, 2, 4, 384, 256, 2, 128, ["--blocks", "mlstm*2", "--dim", "128", "--heads", "4", "--ffn", "384"]),
}


def flops_per_token(case):
    """Training on one token, as model_flops_per_token in xlstmc/model.h; and the number of parameters."""
    dim, blocks, heads, ffn, vocab, _, _, _ = CASES[case]
    dk, dv = dim // 2 // heads, dim // heads
    mlstm = 2 * dim * (dim // 2) + 3 * dim * dim + 2 * (dim * heads + heads) + dim     # q k, v o out, gates, head norm
    weights = blocks * (mlstm + 3 * dim * ffn + 2 * dim) + dim + vocab * dim           # ... norms, last norm, head
    cell = blocks * heads * (4 * dk * dv + CHUNK * (dk + dv))
    return 6 * weights + 3.47 * cell, weights + vocab * dim


def write_shard(path, vocab):
    """Random tokens as a shard of llm.c's version 1: 256 int32, then uint16 tokens, little-endian."""
    header = array.array("i", [20240520, 1, SHARD_TOKENS, vocab] + [0] * 252)
    generator = random.Random(2)
    tokens = array.array("H", generator.choices(range(vocab), k=SHARD_TOKENS))
    if sys.byteorder == "big":
        header.byteswap()
        tokens.byteswap()
    with open(path, "wb") as f:
        header.tofile(f)
        tokens.tofile(f)


# ----------------------------------------------------------------------------------------------------------------------
# PyTorch's side, in its own process (bench_gpu.py --peer CASE); prints one line of JSON
# ----------------------------------------------------------------------------------------------------------------------
def peer(case, shard, steps, device):
    import numpy as np
    import torch
    from xlstm.xlstm_large import xLSTMLarge, xLSTMLargeConfig
    dim, blocks, heads, ffn, vocab, batch, length, _ = CASES[case]
    cuda = device == "cuda"
    torch.manual_seed(42)
    torch.set_float32_matmul_precision("high")
    with torch.device(device):
        model = xLSTMLarge(xLSTMLargeConfig(
            embedding_dim=dim, num_heads=heads, num_blocks=blocks, vocab_size=vocab, mode="train", chunk_size=CHUNK,
            ffn_proj_factor=(ffn - 0.5) / dim, ffn_round_up_to_multiple_of=64,
            return_last_states=True,                    # the model's layer unpacks two values, come what may
            chunkwise_kernel="chunkwise--triton_limit_chunk" if cuda else "chunkwise--native_autograd",
            sequence_kernel="native_sequence__triton" if cuda else "native_sequence__native",
            step_kernel="triton" if cuda else "native", autocast_kernel_dtype="bfloat16" if cuda else "float32"))
    groups = [{"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.ndim <= 1], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    tokens = torch.from_numpy(np.fromfile(shard, dtype="<u2", offset=1024).astype(np.int64)).to(device)

    def step(k):
        at = k * batch * length % (len(tokens) - batch * length - 1)
        window = tokens[at:at + batch * length + 1]
        with torch.autocast(device, torch.bfloat16, enabled=cuda):
            logits, _ = model(window[:-1].view(batch, length))
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), window[1:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    losses, marks = [], []
    for k in range(WARMUP + steps + 1):                 # mark k lies before step k
        if cuda:
            marks.append(torch.cuda.Event(enable_timing=True))
            marks[-1].record()
        else:
            marks.append(time.perf_counter())
        if k < WARMUP + steps:
            losses.append(step(k))
    if cuda:
        torch.cuda.synchronize()
    ms = [a.elapsed_time(b) if cuda else 1e3 * (b - a) for a, b in zip(marks, marks[1:])]
    print(json.dumps({"ms": ms[WARMUP:], "losses": [float(losses[0]), float(losses[-1])], "torch": torch.__version__,
                      "parameters": sum(p.numel() for p in model.parameters()),
                      "tensors": torch.cuda.max_memory_allocated() if cuda else None}))


# ----------------------------------------------------------------------------------------------------------------------
# Both sides, seen from here
# ----------------------------------------------------------------------------------------------------------------------
class Device:
    """Memory in use and SM clock of GPU 0, sampled while a turn runs; by NVML if Python has it, else by nvidia-smi."""

    def __init__(self, present):
        self.present, self.nvml = present, None
        if present:
            try:
                import pynvml
                pynvml.nvmlInit()
                self.nvml, self.handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)
            except Exception:                           # not installed, or it does not work here: nvidia-smi will do
                self.nvml = None

    def now(self):
        """(bytes in use, MHz)"""
        if self.nvml:
            return (self.nvml.nvmlDeviceGetMemoryInfo(self.handle).used,
                    self.nvml.nvmlDeviceGetClockInfo(self.handle, self.nvml.NVML_CLOCK_SM))
        text = subprocess.run(["nvidia-smi", "--query-gpu=memory.used,clocks.sm", "--format=csv,noheader,nounits",
                               "--id=0"], stdout=subprocess.PIPE, text=True, check=True).stdout
        used, clock = text.split(",")
        return int(used) << 20, int(clock)

    def watch(self):
        """Samples until the returned function is called, which returns (peak bytes above the start's, median MHz)."""
        if not self.present:
            return lambda: (None, None)
        before, _ = self.now()
        samples, done = [], threading.Event()

        def sample():
            while not done.wait(0.25 if self.nvml else 1.0):
                samples.append(self.now())
        thread = threading.Thread(target=sample, daemon=True)
        thread.start()

        def stop():
            done.set()
            thread.join()
            # the clock under load: the upper half of the samples, because a turn begins with loading and compiling
            clocks = sorted(clock for _, clock in samples)
            return (max((used for used, _ in samples), default=before) - before,
                    statistics.median(clocks[len(clocks) // 2:]) if clocks else None)
        return stop


class Side:
    """What one side has shown so far: milliseconds of every counted step, one list a turn."""

    def __init__(self, name):
        self.name, self.turns, self.memory, self.tensors, self.clocks, self.error = name, [], 0, None, [], None

    def median(self):
        return statistics.median([ms for turn in self.turns for ms in turn]) if self.turns else None


def fail(side, what, output):
    lines = [line for line in output.strip().splitlines() if line.strip()]
    side.error = f"{what}: {lines[-1][:200] if lines else 'no output'}"
    sys.stderr.write(f"{side.name} failed\n" + "\n".join(lines[-15:]) + "\n")


def torch_turn(side, case, options, shard):
    done = subprocess.run([sys.executable, os.path.abspath(__file__), "--peer", case, "--shard", shard, "--steps",
                           str(options.steps), "--device", options.device],
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        return fail(side, f"exit code {done.returncode}", done.stdout + done.stderr)
    result = json.loads(done.stdout.strip().splitlines()[-1])
    if result["parameters"] != flops_per_token(case)[1]:
        return fail(side, "another model", f"{result['parameters']} parameters, not {flops_per_token(case)[1]}")
    side.turns.append(result["ms"])
    side.tensors = result["tensors"]


def our_turn(side, case, options, shard):
    """The trainer is ended by SIGKILL once its log holds enough steps: at its own end it would write a checkpoint."""
    _, _, _, _, vocab, batch, length, model = CASES[case]
    with tempfile.TemporaryDirectory(dir=options.work) as folder:
        out, screen = os.path.join(folder, "run"), os.path.join(folder, "screen")
        command = [options.program, *model, "--vocab", str(vocab), "--train", shard, "--batch", str(batch), "--seq-len",
                   str(length), "--steps", "1000000", "--clip", "1", "--save-every", "0", "--out", out]
        if options.device == "cuda":
            command += ["--precision", "bf16"]
        command += options.flags.split()
        with open(screen, "w") as f:
            process = subprocess.Popen(command, stdout=f, stderr=subprocess.STDOUT)
        try:
            ms, start = [], time.time()
            while len(ms) < WARMUP + options.steps and process.poll() is None and time.time() - start < 300:
                time.sleep(0.1)
                ms = steps_of_log(os.path.join(out, "log.jsonl"))
        finally:
            process.kill()
            process.wait()
        with open(screen) as f:
            text = f.read()
    if len(ms) < WARMUP + options.steps:
        return fail(side, f"{len(ms)} steps", text)
    told = re.search(r"([\d.]+) MFLOP a token", text)
    if told and abs(float(told[1]) * 1e6 / flops_per_token(case)[0] - 1) > 0.01:
        return fail(side, "another model", told[0])
    side.turns.append(ms[WARMUP:WARMUP + options.steps])


def steps_of_log(path):
    """Milliseconds of every step in a log.jsonl; its last line may be half written."""
    try:
        with open(path) as f:
            lines = [json.loads(line) for line in f.read().split("\n")[:-1]]
    except FileNotFoundError:
        return []
    return [line["ms"] for line in lines if "step" in line and "ms" in line]


# ----------------------------------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------------------------------
def row(cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def cells(side, case):
    """tokens/s with milliseconds, MFU, memory"""
    ms = side.median()
    if ms is None:
        return ["failed" if side.error else "-", "-", "-"]
    rate = 1e3 * CASES[case][5] * CASES[case][6] / ms
    memory = f"{side.memory / 2**30:.1f} GiB" if side.memory else "-"
    if side.tensors:
        memory += f" (tensors {side.tensors / 2**30:.1f})"
    return [f"{rate:,.0f} tok/s ({ms:.1f} ms)", f"{100 * rate * flops_per_token(case)[0] / PEAK_FLOPS:.1f} %", memory]


def notes(case, sides):
    for side in sides:
        if side.error:
            yield f"{case}, {side.name}: {side.error}"
        if side.turns:
            turns = ", ".join(f"{statistics.median(turn):.2f} ({min(turn):.2f}-{max(turn):.2f})" for turn in side.turns)
            clock = f"; SM clock {statistics.median(side.clocks):.0f} MHz" if side.clocks else ""
            yield f"{case}, {side.name}: ms a step, median (range) of each turn: {turns}{clock}"


def main():
    parser = argparse.ArgumentParser(description="training speed on one GPU, PyTorch against train_xlstmcu")
    parser.add_argument("--program", default=os.path.join(ROOT, "train_xlstmcu"))
    parser.add_argument("--flags", default="", help="more flags for the program, in one string")
    parser.add_argument("--side", choices=("torch", "ours", "both"), default="both")
    parser.add_argument("--case", action="append", choices=CASES, help="only this case; may be repeated")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--steps", type=int, default=20, help="timed steps a turn")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--peer", choices=CASES, help=argparse.SUPPRESS)        # one turn of PyTorch, in this process
    parser.add_argument("--shard", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rounds < 1 or options.steps < 1:
        parser.error("--rounds and --steps must be at least 1")
    if options.peer:
        return peer(options.peer, options.shard, options.steps, options.device)
    if options.side != "torch" and not os.access(options.program, os.X_OK):
        sys.exit(f"{options.program} is not there: run make train_xlstmcu, or use --side torch")

    device = Device(options.device == "cuda")
    name = "the CPU"
    if device.present:
        name = subprocess.run(["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader", "--id=0"],
                              stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    print(f"Training steps on {name}; medians of {options.rounds} x {options.steps} steps, in turns\n")
    row(["case", "PyTorch", "MFU", "memory", "train_xlstmcu", "MFU", "memory", "ratio"])
    row(["---"] * 8)
    remarks, failed = [], False
    with tempfile.TemporaryDirectory() as options.work:
        for case in options.case or [c for c in CASES if c != "smoke"]:
            _, _, _, _, vocab, batch, length, _ = CASES[case]
            shard = os.path.join(options.work, f"random_{vocab}.bin")
            if not os.path.exists(shard):
                write_shard(shard, vocab)
            theirs, ours = Side("PyTorch"), Side("train_xlstmcu")
            for _ in range(options.rounds):
                for side, turn, wanted in ((theirs, torch_turn, options.side != "ours"),
                                           (ours, our_turn, options.side != "torch")):
                    if not wanted or side.error:        # what failed once is not tried again
                        continue
                    stop = device.watch()
                    turn(side, case, options, shard)
                    memory, clock = stop()
                    side.memory = max(side.memory, memory or 0)
                    side.clocks += [clock] if clock else []
            ratio = f"**{theirs.median() / ours.median():.2f}**" if theirs.turns and ours.turns else "-"
            row([f"{case} B{batch} T{length}", *cells(theirs, case), *cells(ours, case), ratio])
            remarks += notes(case, (theirs, ours))
            failed |= bool(theirs.error or ours.error)
    print("\n" + "\n".join(remarks))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

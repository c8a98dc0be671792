#!/usr/bin/env python3
"""Speed of train_xlstm on the CPU against the authors' PyTorch code: same models, same threads, one table.

Training is the whole step on both sides (forward, backward, clipping by the global norm, AdamW); generation is one
sequence, token by token, with the state carried along. PyTorch runs eagerly in float32, with its native kernels:
chunkwise for mlstm, "vanilla" for slstm; of its AdamW variants, and of its two weight layouts for generation, the
faster one counts.

The two sides take turns and medians are compared, because machines drift. It needs an idle machine: with one of two
cores taken by another program, OpenMP's waiting threads make a PyTorch step 30 times slower. The table's last column
says what other programs used meanwhile, in cores.

A slow PyTorch would flatter the ratios, so its sgemm is compared with OpenBLAS's first; below 60 % the table says so.

    python3 -m venv venv && venv/bin/pip install torch xlstm safetensors numpy
    make && venv/bin/python dev/bench/bench_cpu.py          both sides
    venv/bin/python dev/bench/bench_cpu.py --side torch     without train_xlstm

OpenBLAS for that comparison is the system's (libopenblas0) or, where there is none, the copy inside numpy's wheel.
"""
import argparse
import ctypes
import ctypes.util
import glob
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np
import torch
from safetensors.torch import save_file
from xlstm import (FeedForwardConfig, sLSTMBlockConfig, sLSTMLayerConfig, xLSTMLMModel, xLSTMLMModelConfig)
from xlstm.xlstm_large import xLSTMLarge, xLSTMLargeConfig

VOCAB, HEADS = 256, 4
WARMUP = 2                                                                  # steps of every run that do not count
TRAINING = {                                                                # name: blocks, D, B, T
    "mlstm*4": ("mlstm", 4, 128, 8, 256),
    "mlstm*6": ("mlstm", 6, 512, 4, 512),
    "slstm*4": ("slstm", 4, 128, 8, 256),
}
GENERATION = ("mlstm*6", 16), ("mlstm*6", 1024)                             # model, prompt length
SGEMM = (2048, 512, 512), (2048, 2048, 2048)                                # M, N, K


# ----------------------------------------------------------------------------------------------------------------------
# sgemm
# ----------------------------------------------------------------------------------------------------------------------
def load_openblas(threads):
    """(sgemm(a, b, c) on row-major float32 arrays, path of the library), or (None, None) if there is no OpenBLAS."""
    system = ctypes.util.find_library("openblas")
    beside_numpy = os.path.join(os.path.dirname(np.__file__), "..", "numpy.libs", "*openblas*.so*")
    for path in ([system] if system else []) + sorted(glob.glob(beside_numpy)):
        library = ctypes.CDLL(path)
        # the copy in numpy's wheels prefixes its names and takes 64-bit sizes
        for prefix, suffix, integer in (("", "", ctypes.c_int), ("scipy_", "64_", ctypes.c_int64)):
            if not hasattr(library, f"{prefix}cblas_sgemm{suffix}"):
                continue
            getattr(library, f"{prefix}openblas_set_num_threads{suffix}")(ctypes.c_int(threads))
            function = getattr(library, f"{prefix}cblas_sgemm{suffix}")
            function.restype = None
            pointer, real = ctypes.c_void_p, ctypes.c_float
            function.argtypes = [ctypes.c_int] * 3 + [integer] * 3 + [real, pointer, integer, pointer, integer, real,
                                                                      pointer, integer]

            def sgemm(a, b, c, function=function):
                (m, k), n = a.shape, b.shape[1]
                row_major, no_transpose = 101, 111
                function(row_major, no_transpose, no_transpose, m, n, k, 1.0, a.ctypes.data, k, b.ctypes.data, n, 0.0,
                         c.ctypes.data, n)
            return sgemm, os.path.basename(path)
    return None, None


def sgemm_rates(threads):
    """Prints GFLOP/s of both libraries; returns the lowest ratio torch / OpenBLAS, or None without OpenBLAS."""
    openblas, path = load_openblas(threads)
    ratios = []
    print(f"sgemm, {threads} threads (GFLOP/s): OpenBLAS is {path or 'not found (install libopenblas0)'}\n")
    print("| M x N x K | PyTorch | OpenBLAS | ratio |\n|---|---|---|---|")
    for m, n, k in SGEMM:
        a, b, c = (np.random.default_rng(1).random(shape, dtype=np.float32) for shape in ((m, k), (k, n), (m, n)))
        ta, tb, tc = torch.from_numpy(a), torch.from_numpy(b), torch.empty(m, n)
        times = {"torch": [], "openblas": []}
        # In turns of several calls with a pause before each: the idle threads of either library spin for a while after
        # a call and would take the other's core.
        for _ in range(3):
            for side, product in (("torch", lambda: torch.mm(ta, tb, out=tc)), ("openblas", lambda: openblas(a, b, c))):
                if side == "torch" or openblas:
                    time.sleep(0.3)
                    times[side] += [seconds(product) for _ in range(12)][2:]
        rate = {side: 2e-9 * m * n * k / statistics.median(t) for side, t in times.items() if t}
        if openblas:
            assert np.allclose(c, tc.numpy(), rtol=1e-3), "the two products differ"
            ratios.append(rate["torch"] / rate["openblas"])
        print(f"| {m} x {n} x {k} | {rate['torch']:.0f} | {rate.get('openblas', float('nan')):.0f} | "
              f"{f'{ratios[-1]:.2f}' if openblas else '-'} |")
    print()
    return min(ratios) if ratios else None


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


# ----------------------------------------------------------------------------------------------------------------------
# PyTorch's side
# ----------------------------------------------------------------------------------------------------------------------
def torch_model(kind, blocks, dim, context, inference=False, weight_mode="single"):
    torch.manual_seed(42)
    if kind == "slstm":
        config = sLSTMBlockConfig(slstm=sLSTMLayerConfig(embedding_dim=dim, num_heads=HEADS, backend="vanilla"),
                                  feedforward=FeedForwardConfig(embedding_dim=dim, proj_factor=1.3, act_fn="gelu"))
        return xLSTMLMModel(xLSTMLMModelConfig(vocab_size=VOCAB, embedding_dim=dim, num_blocks=blocks, slstm_at="all",
                                               slstm_block=config, context_length=context))
    return xLSTMLarge(xLSTMLargeConfig(
        embedding_dim=dim, num_heads=HEADS, num_blocks=blocks, vocab_size=VOCAB, chunk_size=64, weight_mode=weight_mode,
        chunkwise_kernel="chunkwise--native_autograd", sequence_kernel="native_sequence__native", step_kernel="native",
        mode="inference" if inference else "train", return_last_states=True, autocast_kernel_dtype="float32"))


class TorchTraining:
    def __init__(self, kind, blocks, dim, batch, context, tokens):
        self.model = torch_model(kind, blocks, dim, context)
        self.tokens, self.batch, self.context, self.position = torch.from_numpy(tokens), batch, context, 0
        candidates = {name: torch.optim.AdamW(self.groups(), lr=1e-4, betas=(0.9, 0.95), **{name: True})
                      for name in ("fused", "foreach")}
        self.forward_backward()
        times = {name: min(seconds(optimizer.step) for _ in range(5)) for name, optimizer in candidates.items()}
        self.adamw = min(times, key=times.get)
        self.optimizer = candidates[self.adamw]
        self.optimizer.zero_grad(set_to_none=True)

    def groups(self):
        decayed = [p for p in self.model.parameters() if p.ndim > 1]
        rest = [p for p in self.model.parameters() if p.ndim <= 1]
        return [{"params": decayed, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]

    def next_batch(self):
        length = self.batch * self.context
        if self.position + length >= len(self.tokens):
            self.position = 0
        window = self.tokens[self.position:self.position + length + 1].long()
        self.position += length
        return window[:-1].view(self.batch, -1), window[1:].view(self.batch, -1)

    def forward_backward(self):
        inputs, targets = self.next_batch()
        logits = self.model(inputs)
        logits = logits[0] if isinstance(logits, tuple) else logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        return loss.item()

    def step(self):
        """Milliseconds of one training step."""
        start = time.perf_counter()
        self.forward_backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return 1e3 * (time.perf_counter() - start)


class TorchGeneration:
    def __init__(self, kind, blocks, dim, prompt):
        self.prompt = torch.from_numpy(prompt.astype(np.int64)).view(1, -1)
        self.models = {mode: torch_model(kind, blocks, dim, None, inference=True, weight_mode=mode).eval()
                       for mode in ("single", "fused")}
        times = {mode: min(self.token(64, mode) for _ in range(2)) for mode in self.models}
        self.layout = min(times, key=times.get)

    def token(self, count, layout=None):
        """Milliseconds a token over `count` greedy tokens, after the prompt."""
        model = self.models[layout or self.layout]
        token, state = model.generate(self.prompt, max_length=1)
        start = time.perf_counter()
        model.generate(token, max_length=count, state=state)
        return 1e3 * (time.perf_counter() - start) / count

    def save(self, directory):
        """The model as a checkpoint directory that train_xlstm loads."""
        model = self.models["single"]
        tensors = {("backbone.embeddings.weight" if n == "embedding.weight" else n): p.detach().contiguous()
                   for n, p in model.named_parameters()}
        save_file(tensors, os.path.join(directory, "model.safetensors"), metadata={"format": "pt"})
        c = model.config
        config = {"model_type": "xlstm", "architectures": ["xLSTMForCausalLM"], "hidden_size": c.embedding_dim,
                  "embedding_dim": c.embedding_dim, "num_hidden_layers": c.num_blocks, "num_blocks": c.num_blocks,
                  "num_heads": c.num_heads, "vocab_size": c.vocab_size, "use_bias": False, "weight_mode": "single",
                  "tie_word_embeddings": False, "add_out_norm": True, "norm_eps": c.norm_eps, "eps": c.eps,
                  "qk_dim_factor": c.qk_dim_factor, "v_dim_factor": c.v_dim_factor, "gate_soft_cap": c.gate_soft_cap,
                  "output_logit_soft_cap": c.output_logit_soft_cap, "chunk_size": c.chunk_size,
                  "ffn_proj_factor": (model.backbone.blocks[0].ffn.up_proj_dim - 32) / c.embedding_dim,
                  "ffn_round_up_to_multiple_of": 64}
        with open(os.path.join(directory, "config.json"), "w") as f:
            json.dump(config, f)


# ----------------------------------------------------------------------------------------------------------------------
# Our side
# ----------------------------------------------------------------------------------------------------------------------
def run(command):
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)[:300]}\nended with {done.returncode}: {done.stderr.strip()}")


def write_shard(path, tokens):
    header = np.zeros(256, dtype="<i4")
    header[:4] = 20240520, 1, len(tokens), VOCAB
    with open(path, "wb") as f:
        f.write(header.tobytes() + tokens.astype("<u2").tobytes())


def our_steps(program, threads, kind, blocks, dim, batch, context, shard, steps):
    """Milliseconds of `steps` training steps of one run of train_xlstm, from its log."""
    with tempfile.TemporaryDirectory() as out:
        run([program, "--blocks", f"{kind}*{blocks}", "--dim", str(dim), "--heads", str(HEADS), "--vocab", str(VOCAB),
             "--train", shard, "--batch", str(batch), "--seq-len", str(context), "--steps", str(steps + WARMUP),
             "--threads", str(threads), "--clip", "1.0", "--save-every", "0", "--out", os.path.join(out, "run")])
        with open(os.path.join(out, "run", "log.jsonl")) as f:
            lines = [json.loads(line) for line in f]
    return [line["ms"] for line in lines if "step" in line and "ms" in line][WARMUP:]


def our_token(program, threads, directory, prompt, count):
    """Milliseconds a token: a long generation minus a short one, so that loading and the prompt drop out."""
    command = [program, "--load", directory, "--threads", str(threads), "--prompt", prompt.tobytes().decode("ascii"),
               "--temperature", "0", "--generate"]
    short = seconds(lambda: run(command + ["1"]))
    return 1e3 * (seconds(lambda: run(command + [str(count + 1)])) - short) / count


# ----------------------------------------------------------------------------------------------------------------------
# The table
# ----------------------------------------------------------------------------------------------------------------------
class OtherPrograms:
    """Cores that programs other than this one and its children kept busy since it was made (Linux; else nan)."""

    def __init__(self):
        self.start = self.now()

    @staticmethod
    def now():
        """(seconds, busy seconds of the whole machine, busy seconds of ours)"""
        try:
            with open("/proc/stat") as f:
                user, nice, system, _, _, irq, softirq, steal = map(int, f.readline().split()[1:9])
        except OSError:
            return time.time(), float("nan"), 0.0
        busy = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
        return time.time(), busy, sum(os.times()[:4])

    def cores(self):
        wall, machine, ours = (now - start for now, start in zip(self.now(), self.start))
        return max((machine - ours) / wall, 0.0) if machine == machine else machine


def row(cells):
    print("| " + " | ".join(cells) + " |", flush=True)


def report(case, unit, torch_ms, our_ms, tokens, note, others):
    """One line of the table: tokens/s and milliseconds, from medians."""
    def side(times):
        if not times:
            return "-"
        ms = statistics.median(times)
        return f"{1e3 * tokens / ms:,.0f} tok/s ({ms:.1f} ms {unit})"
    ratio = f"{statistics.median(torch_ms) / statistics.median(our_ms):.2f}" if torch_ms and our_ms else "-"
    busy = others.cores()
    row([case, side(torch_ms), side(our_ms), ratio, note, f"{busy:.2f}{' (too busy)' if busy > 0.1 else ''}"])


def bench_training(options, work):
    tokens = np.random.default_rng(2).integers(0, VOCAB, 1 << 16)
    shard = os.path.join(work, "tokens.bin")
    write_shard(shard, tokens)
    for case, (kind, blocks, dim, batch, context) in TRAINING.items():
        if options.case and case not in options.case:
            continue
        others = OtherPrograms()
        theirs = TorchTraining(kind, blocks, dim, batch, context, tokens) if options.side != "ours" else None
        torch_ms, our_ms = [], []
        for _ in range(options.rounds):
            if theirs:
                theirs.step()                           # the caches are the other side's
                torch_ms += [theirs.step() for _ in range(options.steps)]
            if options.side != "torch":
                our_ms += our_steps(options.program, options.threads, kind, blocks, dim, batch, context, shard,
                                    options.steps)
        report(f"train {case} D{dim} B{batch} T{context}", "a step", torch_ms, our_ms, batch * context,
               f"AdamW {theirs.adamw}" if theirs else "", others)


def bench_generation(options, work):
    for case, length in GENERATION:
        kind, blocks, dim, _, _ = TRAINING[case]
        if options.case and case not in options.case:
            continue
        prompt = np.random.default_rng(3).integers(97, 123, length).astype(np.uint8)
        others = OtherPrograms()
        theirs = TorchGeneration(kind, blocks, dim, prompt)
        theirs.save(work)
        torch_ms, our_ms = [], []
        for _ in range(options.rounds):
            if options.side != "ours":
                torch_ms.append(theirs.token(options.tokens))
            if options.side != "torch":
                our_ms.append(our_token(options.program, options.threads, work, prompt, options.tokens))
        report(f"generate {case} D{dim}, prompt {length}", "a token", torch_ms, our_ms, 1,
               f"weights {theirs.layout}" if options.side != "ours" else "", others)


def main():
    root = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
    parser = argparse.ArgumentParser(description="training and generation speed, PyTorch against train_xlstm")
    parser.add_argument("--program", default=os.path.join(root, "train_xlstm"))
    parser.add_argument("--side", choices=("torch", "ours", "both"), default="both")
    parser.add_argument("--case", action="append", choices=TRAINING, help="only this model; may be repeated")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side")
    parser.add_argument("--steps", type=int, default=4, help="timed training steps a turn")
    parser.add_argument("--tokens", type=int, default=256, help="generated tokens a turn")
    options = parser.parse_args()
    if options.side != "torch" and not os.access(options.program, os.X_OK):
        sys.exit(f"{options.program} is not there: run make, or use --side torch")

    torch.set_num_threads(options.threads)
    print(f"PyTorch {torch.__version__}, {options.threads} threads, load before the start {os.getloadavg()[0]:.2f}; "
          f"medians of {options.rounds} x {options.steps} steps or {options.rounds} x {options.tokens} tokens\n")
    ratio = sgemm_rates(options.threads)
    if ratio is not None and ratio < 0.6:
        print("**PyTorch's sgemm is below 60 % of OpenBLAS's: the ratios below flatter train_xlstm.**\n")
    row(["case", "PyTorch", "train_xlstm", "ratio", "PyTorch's faster variant", "others"])
    row(["---"] * 6)
    with tempfile.TemporaryDirectory() as work:
        bench_training(options, work)
        bench_generation(options, work)


if __name__ == "__main__":
    main()

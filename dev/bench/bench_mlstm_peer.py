#!/usr/bin/env python3
"""The mLSTM cell alone on one GPU: build/bench_mlstm against the authors' Triton kernels ("xl_chunk", exponential input
gate, chunk 128), forward and forward + backward, in one run.

q, k, v and the gradient of h are bf16, the gates' pre-activations fp32; all lie ready in memory. The peer is called
directly, without autocast: forward under no_grad; forward + backward as forward and torch.autograd.grad with an
explicit gradient, so that no loss is reduced and no gradient accumulated. Times are medians of Triton's do_bench, which
empties the L2 cache before every repetition. chunk 128 is the peer's default and its fastest correct setting (its
gradients are wrong above).

The sides take turns, shape by shape; the medians of the turns are compared. build/bench_mlstm is a process of its own
in every turn and prints, for every argument B,NH,T,dk,dv, a line

    B,NH,T,dk,dv fwd X ms fwd+bwd Y ms

    pip install torch mlstm_kernels einops              (or PYTHONPATH=FOLDER with the sources of mlstm_kernels, einops)
    make build/bench_mlstm && python3 dev/bench/bench_mlstm_peer.py
    python3 dev/bench/bench_mlstm_peer.py --side torch 8,8,2048,256,512
"""
import argparse
import os
import re
import statistics
import subprocess
import sys

ROOT = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
# the shapes of whole models at T 2048 (widths 1024, 1536, 768), and 65,536 tokens of 256/512 heads at growing T
SHAPES = ["32,4,2048,128,256", "16,4,2048,192,384", "16,6,2048,64,128", "8,8,2048,256,512", "2,8,8192,256,512",
          "1,8,65536,256,512"]
SERVED = "served:"                                                          # before a line of the peer's process
LINE = re.compile(r"(\d+,\d+,\d+,\d+,\d+)\D*?\bfwd\s+([\d.]+)\s*ms.*?\bfwd\+bwd\s+([\d.]+)\s*ms")


class Peer:
    """The official kernel on one shape; functions of no arguments."""

    def __init__(self, shape, kernel, device):
        import torch
        self.torch = torch
        batch, heads, length, dk, dv = shape
        generator = torch.Generator(device).manual_seed(1)

        def normal(*size, dtype=torch.bfloat16, mean=0.0):
            values = torch.randn(batch, heads, length, *size, generator=generator, device=device) + mean
            return values.to(dtype).requires_grad_()
        # forget gates lean open, as in a trained model; input gates as after their soft cap
        self.inputs = [normal(dk), normal(dk), normal(dv), normal(dtype=torch.float32, mean=-1.0),
                       normal(dtype=torch.float32, mean=3.0)]
        self.gradient = normal(dv).detach()
        self.kernel = kernel

    def forward(self):
        with self.torch.no_grad():
            return self.kernel(*self.inputs, chunk_size=128, autocast_kernel_dtype=self.torch.bfloat16)

    def forward_backward(self):
        h = self.kernel(*self.inputs, chunk_size=128, autocast_kernel_dtype=self.torch.bfloat16)
        return self.torch.autograd.grad(h, self.inputs, self.gradient)


def serve(text):
    """The peer's process for one shape: for every line on stdin one turn, and a line "X Y" of its times in ms."""
    import torch
    from mlstm_kernels.torch.chunkwise.triton_xl_chunk import mlstm_chunkwise__xl_chunk
    from triton.testing import do_bench
    peer = Peer(tuple(map(int, text.split(","))), mlstm_chunkwise__xl_chunk, "cuda")
    for x in (peer.forward(), *peer.forward_backward()):                            # compiles, too
        if not torch.isfinite(x).all():
            sys.exit(f"the peer's result on {text} is not finite")
    for _ in sys.stdin:
        times = [do_bench(f, warmup=100, rep=500, return_mode="median") for f in (peer.forward, peer.forward_backward)]
        torch.cuda.empty_cache()                        # the other side's turn comes next
        print(SERVED, *times, flush=True)


class PeerProcess:
    """The peer lives in a process of its own, one a shape: an abort in Triton's compiler costs that shape only."""

    def __init__(self, text):
        self.process = subprocess.Popen([sys.executable, os.path.abspath(__file__), "--serve", text],
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def times(self):
        """(forward ms, forward + backward ms), None if the process has died"""
        try:
            self.process.stdin.write("turn\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            return None
        for line in self.process.stdout:
            if line.startswith(SERVED):
                return tuple(map(float, line.split()[1:]))
        return None

    def end(self):
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            pass
        return self.process.wait()


def our_times(program, text):
    done = subprocess.run([program, text], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    times = parse(done.stdout)
    if done.returncode or text not in times:
        sys.exit(f"{program} {text} ended with {done.returncode}: {done.stdout.strip()[-500:] or 'no output'}")
    return times[text]


def parse(output):
    """{"B,NH,T,dk,dv": (forward ms, forward + backward ms)} of all lines of that form"""
    return {m[1]: (float(m[2]), float(m[3])) for m in map(LINE.search, output.splitlines()) if m}


def main():
    parser = argparse.ArgumentParser(description="the mLSTM cell on one GPU, the authors' kernels against bench_mlstm")
    parser.add_argument("shapes", nargs="*", metavar="B,NH,T,dk,dv", help=f"default: {' '.join(SHAPES)}")
    parser.add_argument("--program", default=os.path.join(ROOT, "build", "bench_mlstm"))
    parser.add_argument("--side", choices=("torch", "ours", "both"), default="both")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each side on every shape")
    parser.add_argument("--serve", metavar="SHAPE", help=argparse.SUPPRESS)     # the peer's process
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    if options.serve:
        return serve(options.serve)
    shapes = options.shapes or SHAPES
    for text in shapes:
        if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*){4}", text):
            parser.error(f"{text} is not B,NH,T,dk,dv")
    if options.side != "torch" and not os.access(options.program, os.X_OK):
        sys.exit(f"{options.program} is not there: run make build/bench_mlstm, or use --side torch")

    if options.side != "ours":
        import torch
        import triton
        print(f"PyTorch {torch.__version__}, Triton {triton.__version__}; ", end="")
    print(f"ms, medians of {options.rounds} turns (forward / forward + backward)\n")
    print("| B,NH,T,dk,dv | xl_chunk, chunk 128 | bench_mlstm | ratio forward | ratio forward + backward | spread |")
    print("|---|---|---|---|---|---|", flush=True)
    failed = False
    for text in shapes:
        peer = PeerProcess(text) if options.side != "ours" else None
        theirs, ours = [], []
        for _ in range(options.rounds):
            if peer:
                theirs.append(peer.times())
            if options.side != "torch":
                ours.append(our_times(options.program, text))
        died = peer is not None and (peer.end() != 0 or None in theirs)
        if died:
            theirs = []
        failed |= died
        a, b = ([statistics.median(column) for column in zip(*turns)] for turns in (theirs, ours))
        # largest over smallest time of any column: how far the turns were apart
        spread = max([max(column) / min(column) for turns in (theirs, ours) for column in zip(*turns)], default=1)
        pair = [f"{x[0]:.3f} / {x[1]:.3f}" if x else "-" for x in (a, b)]
        pair[0] = "failed" if died else pair[0]
        ratios = [f"**{x / y:.2f}**" for x, y in zip(a, b)] if a and b else ["-", "-"]
        print("| " + " | ".join([text, *pair, *ratios, f"{100 * (spread - 1):.0f} %"]) + " |", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

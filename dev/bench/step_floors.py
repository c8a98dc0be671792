#!/usr/bin/env python3
"""Where the time of a training step goes, against what the GPU's memory and its matrix units allow.

    make train_xlstmcu build/libkernel_times.so
    export KERNEL_TIMES_STEP=adamw_kernel KERNEL_TIMES_OUT=kernels.txt
    CUDA_INJECTION64_PATH=build/libkernel_times.so ./train_xlstmcu --model 164m --ffn 2048 --batch 16 --seq-len 2048 \\
        --steps 25 --train ...
    python3 dev/bench/step_floors.py 162m kernels.txt

Prints a row for each kind of kernel: milliseconds a step, the floor, and the fraction of the floor's speed that is
reached. The floor of a kernel is the larger of two times: every tensor that it reads or writes moved once at 3.0 TB/s
(the bytes that the comment above each kernel counts), and its products at 730 TFLOP/s, where mma.sync computes them at
640. "-": so little that nobody counted. Idle is longer than in a run without kernel_times.
"""
import argparse
import re
import sys

sys.dont_write_bytecode = True                  # no __pycache__ beside the sources
from bench_gpu import CASES, flops_per_token

BYTES_PER_S, CUBLAS_FLOPS, MMA_FLOPS = 3.0e12, 730e12, 640e12
MLSTM_CHUNK, SCAN_CHUNK = 128, 64               # tokens: of mlstm.cuh, of mlstm_scan.cuh


def pad8(n):
    return (n + 7) // 8 * 8


def gemm(m, n, k, out_bytes=2, reads_out=False):
    """Seconds of a product [m, k] x [k, n] at its floor; operands in bf16, out_bytes an element of the result."""
    moved = 2 * (m * k + k * n) + out_bytes * m * n * (2 if reads_out else 1)
    return max(moved / BYTES_PER_S, 2 * m * n * k / CUBLAS_FLOPS)


def matmuls(rows, dim, blocks, ffn, vocab, gates):
    """Seconds a step of all products that cuBLASLt computes."""
    qkvo = 3 * dim                                                      # q and k are half as wide
    forward = [gemm(rows, qkvo, dim), gemm(rows, gates, dim, out_bytes=4), gemm(rows, dim, dim, reads_out=True),
               gemm(rows, 2 * ffn, dim), gemm(rows, dim, ffn, reads_out=True)]  # two add the residual stream

    def backward(n, k):                                                 # of the input; of the weights, added to
        return gemm(rows, k, n) + gemm(n, k, rows, out_bytes=4, reads_out=True)
    block = sum(forward) + sum(backward(n, k) for n, k in [(qkvo + gates, dim), (dim, dim), (2 * ffn, dim), (dim, ffn)])
    return blocks * block + gemm(rows, vocab, dim) + backward(vocab, dim)


def floors(case):
    """[(name of the kind, pattern of its kernels' names, seconds a step at the floor or None)]"""
    dim, blocks, heads, ffn, vocab, batch, length, _ = CASES[case]
    rows, dk, dv = batch * length, dim // 2 // heads, dim // heads
    parameters, cells = flops_per_token(case)[1], rows * heads * blocks
    state = dk * dv / (MLSTM_CHUNK // 2)        # bytes a token and head for a state that is moved once a chunk
    assert dk <= 256 and dv <= 256, "a block of attend no longer has the whole width of a head"

    def moved(count):
        return count / BYTES_PER_S

    def cell(count, flop=0):                    # bytes and FLOP a token and head
        return cells * max(count / BYTES_PER_S, flop / MMA_FLOPS)

    def scan(count):                            # reading and changing the state, and a tile of 64 keys twice
        return cells * max(count / BYTES_PER_S, (4 * dk * dv + 2 * SCAN_CHUNK * (dk + dv)) / CUBLAS_FLOPS)
    snapshot = dk * dv / 64                     # C in bf16, every 128 tokens
    inside = 2 * dk * dv + 1.5 * MLSTM_CHUNK * (dk + dv)    # FLOP of a row: the state, and 1.5 tiles of 64 keys
    return [
        ("matrix products (cuBLASLt)", r"gemm|nvjet|cutlass|splitK|xmma|cublas",
         matmuls(rows, dim, blocks, ffn, vocab, pad8(2 * heads))),
        ("mLSTM states, forward", r"mlstm_fwd_states", cell(2 * (dk + dv) + state, 2 * dk * dv)),
        ("mLSTM states, reverse", r"mlstm_bwd_states", cell(2 * (dk + dv) + 2 * state, 2 * dk * dv)),
        ("mLSTM attend H", r"mlstm_fwd_attend", cell(4 * (dk + dv) + state, inside)),
        ("mLSTM attend dQ", r"mlstm_bwd_attend_kernel<\w+, 1,", cell(6 * dk + 4 * dv + state, inside)),
        ("mLSTM attend dK", r"mlstm_bwd_attend_kernel<\w+, 2,", cell(6 * dk + 4 * dv + state, inside)),
        ("mLSTM attend dV", r"mlstm_bwd_attend_kernel<\w+, 3,", cell(4 * (dk + dv) + state, inside)),
        # the kernels of mlstm_scan.cuh: no states, but C in bf16 between spans, written by H and read by dV
        ("mLSTM scan H", r"mlstm_fwd_scan_kernel", scan(4 * (dk + dv) + snapshot)),
        ("mLSTM scan dQ", r"mlstm_bwd_scan_kernel<Scan<1,", scan(6 * dk + 4 * dv)),
        ("mLSTM scan dK", r"mlstm_bwd_scan_kernel<Scan<2,", scan(6 * dk + 4 * dv)),
        ("mLSTM scan dV", r"mlstm_bwd_scan_kernel<Scan<3,", scan(4 * (dk + dv) + snapshot)),
        # side by side: what one finds of the other's in L2 is moved once
        ("mLSTM scan dV and dK", r"mlstm_bwd_scan_pair_kernel", scan(6 * (dk + dv) + snapshot)),
        # all three in one walk; scores of both kinds, dS K, dS^T Q, P^T dH, and four products with a state
        ("mLSTM narrow dV, dK and dQ", r"mlstm_bwd_narrow",
         cell(8 * dk + 6 * dv + snapshot, 8 * dk * dv + 2 * SCAN_CHUNK * (3 * dk + 3 * dv))),
        # summary 8, tokens 36, factors of the rows 24, gradient 36
        ("mLSTM gates, all kernels", r"mlstm_(fwd|bwd)_(gate|row_factors)", cell(104)),
        ("mLSTM segments of long sequences", r"_segment_kernel|_enter_kernel", None),
        ("norm, forward", r"^norm_forward", moved(4 * rows * dim * (2 * blocks + 1))),
        ("norm, backward", r"^norm_backward", moved(rows * dim * (8 * 2 * blocks + 6))),
        ("head norm with output gate, forward", r"head_norm_forward", moved(6 * rows * dim * blocks)),
        ("head norm with output gate, backward", r"head_norm_backward", moved(10 * rows * dim * blocks)),
        ("gated FFN, forward", r"gated_forward", moved(6 * rows * ffn * blocks)),
        ("gated FFN, backward", r"gated_backward", moved(10 * rows * ffn * blocks)),
        ("classifier without its products", r"classifier_kernel", moved(4 * rows * vocab)),
        ("embedding, forward", r"embedding_forward", moved(6 * rows * dim)),
        ("embedding, backward", r"embedding_(backward|add)|sort_pass", moved(10 * rows * dim)),
        ("AdamW", r"adamw", moved(30 * parameters)),
        ("gradient norm", r"grad_norm", moved(4 * parameters)),
        ("sums over partial sums and losses", r"add_partials|loss_sum", None),
        ("memset", r"^\[memset", moved(4 * parameters)),       # of the gradients
        ("copies", r"^\[copy", None),
    ]


def read_table(path):
    """What kernel_times prints: the number of steps, {kernel: total ms}, and span, busy, idle in ms."""
    steps, span, kernels, begun = 0, None, {}, False
    try:
        with open(path, errors="replace") as f:
            lines = f.read().splitlines()
    except OSError as e:
        sys.exit(f"{path}: {e.strerror}")
    for line in lines:
        words = line.split(None, 5)
        if line.startswith("steps "):
            steps = int(words[1])
        elif line.startswith("span "):
            span = [float(x) for x in re.findall(r"([\d.]+) ms", line)]
        elif words[:1] == ["launches"]:
            begun = True
        elif begun and len(words) == 6:
            kernels[words[5].strip()] = float(words[1])
    if not steps or span is None or not kernels:
        sys.exit(f"{path}: not a table of whole steps from kernel_times; set KERNEL_TIMES_STEP=adamw_kernel")
    return steps, kernels, span


def row(name, measured, floor, total):
    parts = [f"{measured:9.3f}", f"{100 * measured / total:6.1f} %"]
    parts += ["        -", "       -"] if floor is None else [f"{floor:9.3f}", f"{100 * floor / measured:6.0f} %"]
    print(f"{name:42s}" + "  ".join(parts))


def main():
    parser = argparse.ArgumentParser(description="time of a step by kind of kernel, against each one's floor")
    parser.add_argument("case", choices=CASES)
    parser.add_argument("table", help="file that kernel_times wrote")
    options = parser.parse_args()
    steps, kernels, span = read_table(options.table)
    kinds = floors(options.case)
    sums, unknown = [0.0] * len(kinds), []
    for name, ms in kernels.items():
        kind = next((k for k, (_, pattern, _) in enumerate(kinds) if re.search(pattern, name)), None)
        if kind is None:
            unknown.append((name, ms / steps))
        else:
            sums[kind] += ms / steps
    total = span[0] / steps
    print(f"{options.case}, {steps} steps\n{'':42s}{'ms':>9s}  {'of step':>8s}  {'floor':>9s}  {'reached':>8s}")
    for (name, _, floor), ms in sorted(zip(kinds, sums), key=lambda pair: -pair[1]):
        if ms:
            row(name, ms, None if floor is None else 1e3 * floor, total)
    for name, ms in unknown:
        row("unknown: " + name[:32], ms, None, total)
    floor_sum = sum(1e3 * floor for (_, _, floor), ms in zip(kinds, sums) if floor and ms)
    row("idle", span[2] / steps, None, total)
    row("step", total, floor_sum, total)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Draws a piece of a step as an SVG: what the GPU computes, and the collectives beside it.

    KERNEL_TIMES_STEP=grad_norm_add_kernel KERNEL_TIMES_TRACE=trace.%d KERNEL_TIMES_OUT=/dev/null \\
        CUDA_INJECTION64_PATH=build/libkernel_times.so mpirun -np 2 ./train_xlstmcu --sp 2 ... --steps 12
    python3 dev/bench/timeline.py trace.0 --from 0.3 --to 0.34 >timeline.svg         (shares of the step)
"""
import argparse
import html

WIDTH, LEFT, LANE, GAP = 1000, 96, 34, 14
KINDS = [("mLSTM", ("mlstm",), "#d9822b"), ("matrix products", ("gemm", "nvjet", "cutlass", "splitK"), "#4a7fb5"),
         ("sLSTM", ("slstm",), "#8a5fb0"), ("collectives", ("nccl", "another GPU", "copies"), "#b5384a"), ("all else", ("",), "#8a9a8a")]


def kind_of(name):
    return next(k for k, (_, words, _) in enumerate(KINDS) if any(w in name for w in words))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace")
    parser.add_argument("--from", dest="begin", type=float, default=0)
    parser.add_argument("--to", dest="end", type=float, default=1)
    args = parser.parse_args()
    with open(args.trace) as f:
        rows = [(float(a), float(b), name.strip()) for a, b, name in (line.split(None, 2) for line in f)]
    last = max(end for _, end, _ in rows)
    begin, end = args.begin * last, args.end * last
    scale = (WIDTH - LEFT - 10) / (end - begin)
    bottom = 2 * (LANE + GAP) + 30
    print(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom + 40}" font-family="sans-serif" '
          'font-size="13">')
    print(f'<rect width="{WIDTH}" height="{bottom + 40}" fill="#ffffff"/>')
    for lane, text in enumerate(("kernels", "collectives")):
        print(f'<text x="4" y="{GAP + lane * (LANE + GAP) + 22}">{text}</text>')
    for a, b, name in rows:
        if b <= begin or a >= end:
            continue
        kind = kind_of(name)
        x, w = LEFT + scale * (max(a, begin) - begin), max(scale * (min(b, end) - max(a, begin)), 0.4)
        y = GAP + (LANE + GAP if KINDS[kind][0] == "collectives" else 0)
        print(f'<rect x="{x:.2f}" y="{y}" width="{w:.2f}" height="{LANE}" fill="{KINDS[kind][2]}">'
              f'<title>{html.escape(name)}: {b - a:.1f} us</title></rect>')
    y = 2 * (LANE + GAP) + GAP
    print(f'<line x1="{LEFT}" y1="{y}" x2="{WIDTH - 10}" y2="{y}" stroke="#444"/>')
    step = next(s for s in (10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000) if (end - begin) / s <= 10)
    for k in range(int((end - begin) / step) + 1):
        x = LEFT + scale * k * step
        print(f'<line x1="{x:.1f}" y1="{y}" x2="{x:.1f}" y2="{y + 4}" stroke="#444"/>'
              f'<text x="{x:.1f}" y="{y + 18}" text-anchor="middle">{k * step}</text>')
    print(f'<text x="{WIDTH - 10}" y="{y + 18}" text-anchor="end">us</text>')
    x = LEFT
    for text, _, color in KINDS:
        print(f'<rect x="{x}" y="{bottom + 16}" width="12" height="12" fill="{color}"/>'
              f'<text x="{x + 17}" y="{bottom + 27}">{text}</text>')
        x += 40 + 8 * len(text)
    print("</svg>")


if __name__ == "__main__":
    main()

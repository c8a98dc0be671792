#!/usr/bin/env python3
"""On paper: how the training of one long sequence would scale to many GPUs (doc/parallel.md, section 9). No measurement.

    python3 dev/bench/scale_model.py --rate 150e3           (tokens a second on one GPU, from doc/results.md)

In a node (8 GPUs) these are copies, as measured on two GPUs (doc/results.md): 7 us a meeting, 157 GB/s for a pair,
363 GB/s for a bucket of gradients. Between nodes they are NCCL's rings, by its own constants: 350 GB/s, base
6.6 / 14 / 8.4 us and per hop 0.6 / 1.9 / 3.4 us in a node and 2.7 / 4.0 / 14 us between nodes for the protocols LL,
LL128 and Simple, whose shares of the bandwidth are 0.22, 0.92 and 1; the cheapest is taken. More than 32 ranks scan
instead of gathering: log2 steps, each a message of LL128 over a link of 45 GB/s. Nothing of the exchange is counted as
hidden. Of the gradients' reduction what --exposed says is not, nor what takes longer than 60 % of a step.
"""
import argparse
import math

US, GB = 1e-6, 1e9
PROTOCOLS = ((6.6, 0.6, 2.7, 0.22), (14, 1.9, 4.0, 0.92), (8.4, 3.4, 14, 1.0))     # us, us, us, share of the bandwidth


def ring(ranks, hops, share):
    """Seconds of `hops` rounds over all ranks but one, each of `share` bytes."""
    nodes, bandwidth = ranks // 8, 350 * GB
    return min((base + hops * ((ranks - nodes) * near + (nodes - 1) * far)) * US +
               hops * (ranks - 1) * share / (bandwidth * part) for base, near, far, part in PROTOCOLS)


def copies(ranks, rounds, share, rate):
    """Seconds of `rounds` in which each rank copies `share` bytes to every other one and meets them."""
    return rounds * (7 * US + (ranks - 1) * share / (rate * GB))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rate", type=float, required=True, help="tokens a second on one GPU")
    parser.add_argument("--exposed", type=float, default=0.15, help="share of the reduction that is not hidden")
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--dk", type=int, default=128)
    parser.add_argument("--dv", type=int, default=256)
    parser.add_argument("--parameters", type=float, default=407e6)
    args = parser.parse_args()
    pair = args.heads * (args.dk * args.dv + args.dk + 2) * 4
    print(f"pairs of {pair / 1e6:.3f} MB; one sequence of {args.tokens} tokens")
    print("| GPUs | compute, ms | an exchange, us | exchanges, ms | gradients, ms | step, ms | efficiency |")
    print("|---|---|---|---|---|---|---|")
    for ranks in (2, 8, 16, 32, 64, 256, 1024):
        compute = args.tokens / ranks / args.rate
        exchange = (copies(ranks, 1, pair, 157) if ranks <= 8 else ring(ranks, 1, pair) if ranks <= 32 else
                    math.ceil(math.log2(ranks)) * ((14 + 4) * US + pair / (45 * GB)))
        share = args.parameters * 2 / ranks
        reduction = copies(ranks, 2, share, 363) if ranks <= 8 else ring(ranks, 2, share)
        step = compute + 2 * args.layers * exchange + max(args.exposed * reduction, reduction - 0.6 * compute)
        print(f"| {ranks} | {1e3 * compute:,.1f} | {1e6 * exchange:,.0f} | {2e3 * args.layers * exchange:.1f} | "
              f"{1e3 * reduction:.1f} | {1e3 * step:,.1f} | {compute / step:.2f} |")


if __name__ == "__main__":
    main()

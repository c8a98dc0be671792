#!/usr/bin/env python3
"""How far bf16 is from float64: the authors' PyTorch code under autocast, and train_xlstmcu, on the models of
dev/test/fixtures. Says what of a distance in bf16 comes from the format and not from an implementation.

    make train_xlstmcu && python3 dev/reference/bf16_distance.py
    python3 dev/reference/bf16_distance.py --program "" --device cpu          the authors' code alone, without a GPU

Needs what make_fixtures.py needs; the authors' cells run in float32 there (native kernels), all else as autocast does
it. Relative L2 distances of loss, logits and of the gradients tensor by tensor to the expected values of the fixtures,
which come from float64. "over": gradients further off than 3e-2.
"""
import argparse
import os
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import load_file

sys.dont_write_bytecode = True                  # no __pycache__ beside the sources
import make_fixtures as fixtures

ROOT = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
FIXTURES = os.path.join(ROOT, "dev", "test", "fixtures")
LIMIT = 3e-2


def theirs(name, device):
    """{loss, logits, grad.<our name>} under autocast"""
    spec, directory = fixtures.FIXTURES[name], os.path.join(FIXTURES, name)
    torch.manual_seed(spec["seed"])
    model = fixtures.BUILDERS[spec["code"]](spec, fixtures.CELL_EPS)
    fixtures.fill_weights(model, spec)
    saved = load_file(os.path.join(directory, "model.safetensors"))
    with torch.no_grad():                       # some begin with PyTorch's own random numbers
        for n, parameter in model.named_parameters():
            if not n.endswith(("_recurrent_kernel_", "_bias_")):
                parameter.copy_(saved[fixtures.our_name(n)])
    layout = spec.get("slstm_layout", "cuda")
    for ours, weight in fixtures.our_tensors(dict(model.named_parameters()), spec, layout).items():
        assert torch.equal(weight, saved[ours]), f"{name}: {ours} is not the fixture's"
    with open(os.path.join(directory, "tokens.bin"), "rb") as f:
        tokens = torch.frombuffer(bytearray(f.read()[1024:]), dtype=torch.int16).long().to(device)
    inputs, targets = (tokens[at:at + spec["B"] * spec["T"]].view(spec["B"], spec["T"]) for at in (0, 1))
    model.to(device).train()
    with torch.autocast(device, torch.bfloat16):
        logits = model(inputs, use_cache=False).logits if spec["code"] == "hf" else model(inputs)
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten())
    loss.backward()
    gradients = fixtures.our_tensors({n: p.grad.cpu() for n, p in model.named_parameters()}, spec)
    return {"loss": loss.detach().cpu().reshape(1), "logits": logits.detach().cpu(),
            **{"grad." + n: g for n, g in gradients.items()}}


def ours(name, program, work):
    directory, dump = os.path.join(FIXTURES, name), os.path.join(work, "dump")
    with open(os.path.join(directory, "args.txt")) as f:
        flags = f.read().split()
    subprocess.run([program, *flags, "--load", directory, "--train", os.path.join(directory, "tokens.bin"), "--dump",
                    dump, "--precision", "bf16"], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return load_file(dump)


def summary(got, expected):
    far = {n: ((got[n].double().flatten() - e.double().flatten()).norm() / e.double().norm()).item()
           for n, e in expected.items()}
    gradients = {n[len("grad."):]: d for n, d in far.items() if n.startswith("grad.")}
    worst = max(gradients, key=gradients.get)
    over = sum(d > LIMIT for d in gradients.values())
    return f"{far['loss']:.1e} | {far['logits']:.1e} | {gradients[worst]:.1e} ({worst}) | {over} of {len(gradients)}"


def main():
    parser = argparse.ArgumentParser(description="distance of bf16 from float64, the authors' code and ours")
    parser.add_argument("--program", default=os.path.join(ROOT, "train_xlstmcu"), help='"": the authors\' code alone')
    parser.add_argument("--device", default="cuda", help="of PyTorch")
    options = parser.parse_args()
    print(f"PyTorch {torch.__version__}, {options.device}\n\n| fixture | | loss | logits | worst gradient | over |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as work:
        for name in fixtures.FIXTURES:
            expected = load_file(os.path.join(FIXTURES, name, "expected.safetensors"))
            print(f"| {name} | PyTorch | {summary(theirs(name, options.device), expected)} |", flush=True)
            if options.program:
                print(f"| | train_xlstmcu | {summary(ours(name, options.program, work), expected)} |", flush=True)


if __name__ == "__main__":
    main()

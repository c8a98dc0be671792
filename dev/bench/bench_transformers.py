#!/usr/bin/env python3
"""Hugging Face transformers and train_xlstmcu exchange models: both must compute the same, in both directions.

Forward way: a checkpoint directory of train_xlstmcu (all blocks `mlstm`, exponential gates) is loaded by
AutoModelForCausalLM. No key may be missing or left over; loss, logits and gradients of one batch must be those of
`--dump`; a greedy continuation must be that of `--generate`. Without --load a small model is trained for that first,
and saved with weights in float32 and in bf16, which transformers loads as float32.
Backward way: a small random xLSTM of transformers is saved by save_pretrained and must give the same in `--dump`.

transformers runs in float32, with the code in transformers itself also where the package `xlstm` is installed. What is
compared is a relative L2 distance, of all gradients together. Greedy continuations may part only where the two
likeliest tokens are as good as equal.

    pip install torch "transformers>=5" safetensors
    make train_xlstmcu && python3 dev/bench/bench_transformers.py
    python3 dev/bench/bench_transformers.py --load out/book/step_00001000 --train book.txt
    python3 dev/bench/bench_transformers.py --program ./train_xlstm --device cpu       without a GPU

One line a check, `N passed, N failed` last; exit code 1 if one failed.
"""
import argparse
import glob
import os
import subprocess
import sys
import tempfile

import torch
from safetensors.torch import load_file

# transformers uses the blocks of the package `xlstm` where that is installed; this has to happen before its import
import transformers.utils
transformers.utils.is_xlstm_available = lambda: False
transformers.utils.logging.disable_progress_bar()
transformers.utils.logging.set_verbosity_error()
from transformers import AutoModelForCausalLM
from transformers.models.xlstm.configuration_xlstm import xLSTMConfig
from transformers.models.xlstm.modeling_xlstm import xLSTMForCausalLM

ROOT = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
LIMITS = {"fp32": {"loss": 1e-5, "logits": 1e-4, "gradients": 1e-4},        # relative L2, by --precision
          "bf16": {"loss": 5e-3, "logits": 3e-2, "gradients": 1e-1}}
TIES = {"fp32": 1e-3, "bf16": 1e-1}                                         # logits this close count as equal

passed = failed = 0


def check(ok, what):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    print(f"{'ok  ' if ok else 'FAIL'} {what}", flush=True)


def run(options, *flags):
    """stdout of the program, as bytes; ends this script if it fails"""
    command = [options.program, *flags, "--precision", options.precision]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout


def distance(a, b):
    """Relative L2 of two lists of tensors, the second being the reference."""
    difference = sum((x.double() - y.double()).square().sum() for x, y in zip(a, b))
    return (difference / sum(y.double().square().sum() for y in b)).sqrt().item()


# ----------------------------------------------------------------------------------------------------------------------
# One batch
# ----------------------------------------------------------------------------------------------------------------------
def text_batch(path, batch, length):
    """(inputs, targets) [batch, length]: what --no-shuffle reads first of a text file."""
    with open(path, "rb") as f:
        tokens = torch.tensor(list(f.read(batch * length + 1)))
    if len(tokens) < batch * length + 1:
        sys.exit(f"{path} is shorter than {batch} x {length} + 1 bytes; name a longer file with --train")
    return tokens[:-1].view(batch, length), tokens[1:].view(batch, length)


def compare_batch(options, model, directory, text, title):
    """Loss, logits and gradients of `model` against --dump of the same weights on the same bytes."""
    inputs, targets = (x.to(options.device) for x in text_batch(text, options.batch, options.seq_len))
    with tempfile.TemporaryDirectory() as work:
        path = os.path.join(work, "dump.safetensors")
        run(options, "--load", directory, "--train", text, "--batch", str(options.batch), "--seq-len",
            str(options.seq_len), "--no-shuffle", "--dump", path)
        dump = load_file(path, device=options.device)
    model.zero_grad(set_to_none=True)
    logits = model(inputs, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss.backward()
    names = [n for n, _ in model.named_parameters()]
    absent = sorted({"grad." + n for n in names} ^ {n for n in dump if n.startswith("grad.")})
    check(not absent, f"{title}: the dump has one gradient a tensor, {len(names)} in all"
          + (f"; not in both: {' '.join(absent[:6])}" if absent else ""))
    values = {"loss": ([dump["loss"]], [loss.detach().reshape(1)]), "logits": ([dump["logits"]], [logits.detach()])}
    if not absent:
        values["gradients"] = ([dump["grad." + n] for n in names], [p.grad for _, p in model.named_parameters()])
    for what, (ours, theirs) in values.items():
        limit = LIMITS[options.precision][what]
        found = distance(ours, theirs) if all(a.shape == b.shape for a, b in zip(ours, theirs)) else float("inf")
        check(found <= limit, f"{title}: {what} differ by {found:.2e} (limit {limit:.0e})"
              + (f", loss {loss.item():.4f}" if what == "loss" else ""))
    model.zero_grad(set_to_none=True)


# ----------------------------------------------------------------------------------------------------------------------
# Greedy continuation
# ----------------------------------------------------------------------------------------------------------------------
def as_printed(tokens):
    """A byte model's tokens as the program prints them: escaped where they are no text."""
    out, data, at = b"", bytes(tokens), 0
    while at < len(data):
        for length in (1, 2, 3, 4):
            try:
                character = data[at:at + length].decode("utf-8")
            except UnicodeDecodeError:
                continue
            if len(character) == 1:
                break
        else:
            character, length = "", 1
        control = character and (ord(character) < 32 and character not in "\n\t" or 127 <= ord(character) < 160)
        if not character or control:
            out, length = out + b"\\x%02x" % data[at], 1
        else:
            out += data[at:at + length]
        at += length
    return out


def compare_continuation(options, model, directory, title):
    """Greedy tokens of model.generate against --generate --temperature 0."""
    config, count = model.config, options.tokens
    if config.vocab_size != 256:
        print(f"     {title}: no continuation, prompts are for byte models (vocabulary 256)")
        return
    prompt = list(options.prompt.encode())
    printed = run(options, "--load", directory, "--generate", str(count), "--temperature", "0", "--prompt",
                  options.prompt)[:-1]                  # less the line's end
    # transformers rounds the sizes of its cache up to 64, which fails for widths that are no multiple of 128
    cache = config.hidden_size % 128 == 0
    ids = torch.tensor([prompt], device=options.device)
    model.eval()
    with torch.no_grad():
        tokens = model.generate(ids, max_new_tokens=count, do_sample=False, use_cache=cache, eos_token_id=None,
                                pad_token_id=0, attention_mask=torch.ones_like(ids))[0].tolist()
        logits = model(torch.tensor([tokens], device=options.device), use_cache=False).logits[0].float()
    same = max((k for k in range(count + 1) if printed.startswith(as_printed(tokens[:len(prompt) + k]))), default=0)
    what = f"{title}: greedy continuation of {count} tokens"
    if printed == as_printed(tokens):
        check(True, f"{what} is the same: {as_printed(tokens[len(prompt):])[:60]!r}")
        return
    # a character of several bytes is printed whole, so the tokens may part a little before the text does
    best = logits[len(prompt) - 1 + max(same - 3, 0):len(prompt) + same].topk(2, dim=-1).values
    gap = (best[:, 0] - best[:, 1]).min().item() if len(best) else float("inf")
    check(gap <= TIES[options.precision], f"{what}: the first {same} are the same, then the likeliest two logits are "
          f"{gap:.1e} apart (a tie up to {TIES[options.precision]:.0e})")
    if gap > TIES[options.precision]:
        print(f"     ours   {printed!r}\n     theirs {as_printed(tokens)!r}")


# ----------------------------------------------------------------------------------------------------------------------
# The two directions
# ----------------------------------------------------------------------------------------------------------------------
def train_small(options, text, out, dtype):
    """A checkpoint of a small model, trained until its greedy text has clear favourites."""
    run(options, "--blocks", "mlstm*3", "--dim", "256", "--heads", "4", "--vocab", "256", "--train", text, "--batch",
        "8", "--seq-len", "128", "--steps", str(options.steps), "--lr", "3e-3", "--warmup", "10", "--save-every", "0",
        "--save-dtype", dtype, "--out", out)
    return sorted(glob.glob(os.path.join(out, "step_*")))[-1]


def ours_to_theirs(options, directory, text, what):
    model, info = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, output_loading_info=True)
    problems = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    for kind, names in problems.items():
        check(not names, f"{what}: {len(names)} {kind.replace('_', ' ')}"
              + (f": {' '.join(names[:6])}" if names else ""))
    model.to(options.device)
    size = sum(p.numel() for p in model.parameters())
    title = f"{what} ({size:,} parameters)"
    compare_batch(options, model, directory, text, title)
    compare_continuation(options, model, directory, title)


def theirs_to_ours(options, text, work):
    torch.manual_seed(7)
    config = xLSTMConfig(vocab_size=256, hidden_size=256, num_hidden_layers=3, num_heads=4)
    model = xLSTMForCausalLM(config)
    with torch.no_grad():                               # no tensor stays at a trivial value, as zero biases would
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    directory = os.path.join(work, "theirs")
    model.save_pretrained(directory)
    model.to(options.device)
    compare_batch(options, model, directory, text, "from transformers")


def main():
    parser = argparse.ArgumentParser(description="models between Hugging Face transformers and train_xlstmcu")
    parser.add_argument("--program", default=os.path.join(ROOT, "train_xlstmcu"))
    parser.add_argument("--load", metavar="DIR", help="checkpoint directory (default: train a small model)")
    parser.add_argument("--train", metavar="FILE", default=os.path.join(ROOT, "doc", "math.md"),
                        help="text whose first bytes are the batch (default: doc/math.md)")
    parser.add_argument("--device", default="cuda", help="of transformers")
    parser.add_argument("--precision", choices=LIMITS, default="fp32", help="of the program")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=200, help="no multiple of a chunk by default")
    parser.add_argument("--steps", type=int, default=150, help="of training, without --load")
    parser.add_argument("--tokens", type=int, default=64, help="of the continuation")
    parser.add_argument("--prompt", default="The state of the ")
    options = parser.parse_args()
    if not os.access(options.program, os.X_OK):
        sys.exit(f"{options.program} is not there: run make train_xlstmcu, or name one with --program")
    options.program = os.path.abspath(options.program)
    print(f"transformers {transformers.__version__}, PyTorch {torch.__version__}, {options.device}, float32; "
          f"{os.path.basename(options.program)} in {options.precision}")
    with tempfile.TemporaryDirectory() as work:
        text = os.path.join(work, "batch.txt")          # the name decides how the program reads a file
        with open(options.train, "rb") as source, open(text, "wb") as copy:
            copy.write(source.read(1 << 20))
        if options.load:
            ours_to_theirs(options, options.load, text, "into transformers")
        for dtype in () if options.load else ("fp32", "bf16"):
            directory = train_small(options, text, os.path.join(work, dtype), dtype)
            ours_to_theirs(options, directory, text, f"{dtype} weights into transformers")
        theirs_to_ours(options, text, work)
    print(f"{passed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""Writes the parity fixtures of dev/test/fixtures from the authors' PyTorch code (CPU only).

Every fixture is a tiny model with random weights: a checkpoint directory in the project's format, a shard of tokens,
and what the official code computes from them (loss, logits, the gradient of every tensor). README.md in this directory
says what each fixture covers and how well conditioned it is.

    python3 -m venv venv && venv/bin/pip install torch xlstm "transformers>=5" safetensors numpy
    venv/bin/python dev/reference/make_fixtures.py [--out DIR] [--only NAME]

The expected values come from a float64 run of the official code, rounded to float32 once at the end. The script also
runs the same code in float32 and prints how far the two are apart: a fixture on which the official code itself is
inexact could not tell a wrong implementation from a right one, so more than 2e-5 on any tensor is an error here.
"""
import argparse
import contextlib
import functools
import json
import os
import sys

import numpy as np
import torch
from safetensors.torch import load_file, save_file

# With the package `xlstm` installed, transformers silently uses its blocks. The Hugging Face fixtures are to come from
# the code in transformers itself, so it must believe that the package is missing; this has to happen before the import.
import transformers.utils
transformers.utils.is_xlstm_available = lambda: False
transformers.utils.logging.disable_progress_bar()
from transformers.models.xlstm import modeling_xlstm
from transformers.models.xlstm.configuration_xlstm import xLSTMConfig

from mlstm_kernels.torch.chunkwise.native import mlstm_chunkwise__native_autograd
from mlstm_kernels.torch.parallel.native_siging import mlstm_siging_parallel__native_autograd
from xlstm import (FeedForwardConfig, mLSTMBlock, mLSTMBlockConfig, mLSTMLayerConfig, sLSTMBlock, sLSTMBlockConfig,
                   sLSTMLayerConfig, xLSTMLMModel, xLSTMLMModelConfig)
from xlstm.blocks.mlstm.backends import parallel_stabilized_simple
from xlstm.blocks.slstm.cell import sLSTMCell_cuda, sLSTMCell_vanilla, sLSTMCellConfig
from xlstm.xlstm_large import xLSTMLarge, xLSTMLargeConfig

AGREEMENT_LIMIT = 2e-5      # float32 against float64 of the official code: relative L2 of the worst tensor
CELL_EPS = 1e-6


# ----------------------------------------------------------------------------------------------------------------------
# Building the official models
# ----------------------------------------------------------------------------------------------------------------------
class Stateless(torch.nn.Module):
    """An original-family block in the place of an xlstm_large block, which takes and returns a state."""

    def __init__(self, block):
        super().__init__()
        self.inner = block

    def forward(self, x, state=None):
        return self.inner(x), None


class BackendWithoutState(torch.nn.Module):
    """The parallel kernels return no state, but the layer that calls the backend unpacks (h, state)."""

    def __init__(self, backend):
        super().__init__()
        self.inner = backend

    def forward(self, c_initial, n_initial, m_initial, **kw):
        return self.inner(**kw), None


def v1_config(spec):
    return mLSTMBlockConfig(mlstm=mLSTMLayerConfig(embedding_dim=spec["D"], num_heads=spec["NH"],
                                                   context_length=spec["T"]),
                            _num_blocks=len(spec["blocks"]), _block_idx=0)


def slstm_config(spec):
    return sLSTMBlockConfig(slstm=sLSTMLayerConfig(embedding_dim=spec["D"], num_heads=spec["NH"], backend="vanilla"),
                            feedforward=FeedForwardConfig(embedding_dim=spec["D"], proj_factor=1.3, act_fn="gelu"),
                            _num_blocks=len(spec["blocks"]), _block_idx=0)


def siging_v1(queries, keys, values, igate_preact, fgate_preact, **unused):
    """The official sigmoid-gate kernel behind the calling convention of the original block's cell."""
    return mlstm_siging_parallel__native_autograd(queries, keys, values, igate_preact.squeeze(-1),
                                                  fgate_preact.squeeze(-1), normalize=False)


def chunkwise_v1(queries, keys, values, igate_preact, fgate_preact, eps, **unused):
    """xlstm_large's kernel in the original block: its stabiliser starts at m_0 = 0, the original's does not."""
    return mlstm_chunkwise__native_autograd(queries, keys, values, igate_preact.squeeze(-1), fgate_preact.squeeze(-1),
                                            eps=eps, chunk_size=queries.shape[2])


def set_v1_cells(model, function):
    for module in model.modules():
        if hasattr(module, "backend_fn"):
            module.backend_fn = function


def build_large(spec, eps):
    """xlstm_large; blocks other than `mlstm` are put into its shell."""
    sigmoid = spec.get("gate") == "sigmoid"
    config = xLSTMLargeConfig(
        embedding_dim=spec["D"], num_heads=spec["NH"], num_blocks=len(spec["blocks"]), vocab_size=spec["V"],
        qk_dim_factor=spec.get("qk", 0.5), v_dim_factor=spec.get("v", 1.0), norm_eps=spec.get("norm_eps", 1e-6),
        gate_soft_cap=spec.get("gate_cap", 15.0), output_logit_soft_cap=spec.get("logit_cap", 30.0), eps=eps,
        ffn_proj_factor=spec["ffn_proj_factor"], ffn_round_up_to_multiple_of=spec["ffn_multiple"],
        # "inference" is the only mode of the layer for a T that is no multiple of the chunk (it pads); autograd works
        # through it. The quadratic siging kernel takes any T.
        chunkwise_kernel="parallel--native_siging_autograd" if sigmoid else "chunkwise--native_autograd",
        mode="train" if sigmoid else "inference", chunk_size=16, return_last_states=False,
        sequence_kernel="native_sequence__native", step_kernel="native", autocast_kernel_dtype="float32")
    model = xLSTMLarge(config)
    for b, kind in enumerate(spec["blocks"]):
        if kind == "slstm":
            model.backbone.blocks[b] = Stateless(sLSTMBlock(slstm_config(spec)))
        elif kind == "mlstm_v1":
            model.backbone.blocks[b] = Stateless(mLSTMBlock(v1_config(spec)))
        elif sigmoid:   # xLSTMLargeConfig has no key for the normaliser
            layer = model.backbone.blocks[b].mlstm_layer
            layer.mlstm_backend.config.normalize_siging = False
            layer.mlstm_backend = BackendWithoutState(layer.mlstm_backend)
    set_v1_cells(model, functools.partial(parallel_stabilized_simple, eps=eps))
    return model


def build_lm(spec, eps):
    """xLSTMLMModel: the original family (LayerNorm, no logit cap) of mlstm_v1 and slstm blocks."""
    kinds = spec["blocks"]
    config = xLSTMLMModelConfig(
        vocab_size=spec["V"], embedding_dim=spec["D"], num_blocks=len(kinds), context_length=spec["T"],
        mlstm_block=v1_config(spec) if "mlstm_v1" in kinds else None,
        slstm_block=slstm_config(spec) if "slstm" in kinds else None,
        slstm_at=[b for b, kind in enumerate(kinds) if kind == "slstm"])
    model = xLSTMLMModel(config)
    set_v1_cells(model, siging_v1 if spec.get("gate") == "sigmoid"
                 else functools.partial(parallel_stabilized_simple, eps=eps))
    return model


def build_hf(spec, eps):
    """xLSTMForCausalLM of transformers, on its own native code, with the defaults a user of it gets."""
    assert not modeling_xlstm.external_xlstm, "transformers picked up the xlstm package: import order changed"
    config = xLSTMConfig(vocab_size=spec["V"], hidden_size=spec["D"], num_hidden_layers=len(spec["blocks"]),
                         num_heads=spec["NH"], chunk_size=spec["chunk"], eps=eps)
    return modeling_xlstm.xLSTMForCausalLM(config)


BUILDERS = {"large": build_large, "lm": build_lm, "hf": build_hf}


# ----------------------------------------------------------------------------------------------------------------------
# Random weights
# ----------------------------------------------------------------------------------------------------------------------
def random_values(name, shape, spec, rng):
    """float64 array for one tensor of an official model: no tensor stays at a trivial value."""
    normal = rng.standard_normal(shape)
    leaf = name.rsplit(".", 1)[-1]
    original_family = ".xlstm" in name or spec["code"] == "lm"
    if "norm" in name:                                      # scale 1+w in the original family, w elsewhere
        in_shell = name.endswith("out_norm.weight") or ".norm_" in name or "multihead_norm" in name
        return 0.2 * normal + (1.0 if in_shell or not original_family else 0.0)
    if leaf == "learnable_skip":
        return 1.0 + 0.3 * normal
    if leaf == "_recurrent_kernel_":                        # vanilla layout [NH, 4d, d]
        return 0.7 * normal / np.sqrt(shape[-1])
    if leaf == "_bias_":                                    # vanilla layout, flat [4, NH, d]; forget gates lean open
        bias = 0.5 * normal
        bias.reshape(4, -1)[1] += 1.0
        return bias
    if leaf == "bias":
        if "fgate" in name:
            return np.linspace(1.0, 4.0, shape[0]) + 0.3 * normal
        return (spec.get("igate_bias", -0.5) if "igate" in name else 0.0) + 0.3 * normal
    if "embedding" in name:
        return normal
    if "conv" in name:
        return 0.5 * normal
    # A norm follows each mLSTM head and removes the scale of every row of h but for its eps, so the gradient of the
    # input gate's bias is what a near-perfect cancellation leaves over. Small values v keep the eps visible and that
    # gradient computable in float32; they also make the gradient through the denominator count.
    gain = {"igate": 0.8, "fgate": 0.8, "proj_down": 0.7, "out_proj": 0.7, ".v.": 0.01, "v_proj": 0.02}
    gain[".v."] = spec.get("v_gain", gain[".v."])
    factor = next((g for key, g in gain.items() if key in name), 1.0)
    return factor * normal / np.sqrt(shape[-1])


def fill_weights(model, spec):
    """Seeded weights. `init: own` keeps the official initialisation and only moves every tensor off it."""
    rng = np.random.default_rng(spec["seed"])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if spec.get("init") == "own":
                values = parameter.double().numpy() + 0.1 * rng.standard_normal(tuple(parameter.shape))
            else:
                values = random_values(name, tuple(parameter.shape), spec, rng)
            parameter.copy_(torch.from_numpy(values))


# ----------------------------------------------------------------------------------------------------------------------
# From the official names and layouts to the project's
# ----------------------------------------------------------------------------------------------------------------------
def our_name(name):
    name = name.replace(".inner.", ".")
    for theirs, ours in (("xlstm_block_stack.post_blocks_norm.", "backbone.out_norm."),
                         ("xlstm_block_stack.blocks.", "backbone.blocks."),
                         ("token_embedding.", "backbone.embeddings."), ("embedding.", "backbone.embeddings.")):
        if name.startswith(theirs):
            return ours + name[len(theirs):]
    return name


def cuda_layout(name, tensor, spec):
    """Recurrent weights and biases of slstm from the vanilla to the cuda layout; all other tensors are alike."""
    if not name.endswith(("_recurrent_kernel_", "_bias_")):
        return tensor
    config = sLSTMCellConfig(hidden_size=spec["D"], num_heads=spec["NH"], backend="vanilla")
    vanilla, cuda = sLSTMCell_vanilla(config), sLSTMCell_cuda(config, skip_backend_init=True)
    if name.endswith("_bias_"):
        return cuda._bias_ext2int(vanilla._bias_int2ext(tensor))
    return cuda._recurrent_kernel_ext2int(vanilla._recurrent_kernel_int2ext(tensor))


def our_tensors(tensors, spec, slstm_layout="cuda"):
    if slstm_layout == "cuda":
        tensors = {n: cuda_layout(n, t, spec) for n, t in tensors.items()}
    return {our_name(n): t.detach().float().contiguous() for n, t in tensors.items()}


def our_config(spec):
    """config.json as the project writes it: Hugging Face's keys and its own."""
    kinds = spec["blocks"]
    config = {
        "model_type": "xlstm", "architectures": ["xLSTMForCausalLM"], "vocab_size": spec["V"],
        "hidden_size": spec["D"], "embedding_dim": spec["D"], "num_hidden_layers": len(kinds),
        "num_blocks": len(kinds), "num_heads": spec["NH"], "use_bias": False, "tie_word_embeddings": False,
        "add_out_norm": True, "weight_mode": "single", "norm_eps": spec.get("norm_eps", 1e-6), "eps": CELL_EPS,
        "norm_reduction_force_float32": True, "qk_dim_factor": spec.get("qk", 0.5), "v_dim_factor": spec.get("v", 1.0),
        "ffn_proj_factor": spec.get("ffn_proj_factor", 2.667),
        "ffn_round_up_to_multiple_of": spec.get("ffn_multiple", 64), "gate_soft_cap": spec.get("gate_cap", 15.0),
        "output_logit_soft_cap": 0.0 if spec["code"] == "lm" else spec.get("logit_cap", 30.0),
        "chunkwise_kernel": "chunkwise--native_autograd", "sequence_kernel": "native_sequence__native",
        "step_kernel": "native", "mode": "inference", "return_last_states": True, "chunk_size": 64,
        "autocast_kernel_dtype": "float32", "inference_state_dtype": "float32", "max_inference_chunksize": 16384,
        "use_cache": True, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "dtype": "float32",
        "block_types": kinds, "mlstm_input_gate": spec.get("gate", "exp"),
        "out_norm_type": "layernorm" if spec["code"] == "lm" else "rmsnorm"}
    return config


# ----------------------------------------------------------------------------------------------------------------------
# One evaluation of an official model
# ----------------------------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def all_float64(model):
    """float64 through and through: the official code forces float32 in norms, in states and before the logit cap."""
    model.double()
    for module in model.modules():
        if hasattr(module, "force_float32_reductions"):
            module.force_float32_reductions = False
        inference = getattr(module, "_inference_fn", None)
        if inference is not None:
            for keywords in (inference.keywords, inference.keywords["mlstm_sequence_kernel"].keywords):
                if "dtype_state" in keywords:
                    keywords["dtype_state"] = torch.float64
    to_float = torch.Tensor.float
    torch.Tensor.float = lambda tensor: tensor
    try:
        yield
    finally:
        torch.Tensor.float = to_float


class CellInputs:
    """Records q, k, i, f of every exponential mLSTM cell, to see which branch of the denominator each row takes."""

    def __init__(self, model):
        self.rows = []
        for module in model.modules():
            if type(module).__name__ in ("mLSTMBackend", "xLSTMBackend"):
                module.register_forward_pre_hook(self.from_backend, with_kwargs=True)
            elif hasattr(module, "backend_fn"):
                module.backend_fn = functools.partial(self.from_v1, module.backend_fn)

    def from_backend(self, module, args, kw):
        self.rows.append([kw.get(a, kw.get(b)).detach() for a, b in
                          (("q", "query"), ("k", "key"), ("i", "igate"), ("f", "fgate"))])

    def from_v1(self, function, **kw):
        self.rows.append([kw["queries"].detach(), kw["keys"].detach(), kw["igate_preact"].detach().squeeze(-1),
                          kw["fgate_preact"].detach().squeeze(-1)])
        return function(**kw)

    def log_ratios(self):
        """log(|s q.n| / e^-m) of all rows of all cells: its sign is the branch, its size the distance to the kink."""
        ratios = []
        for q, k, i, f in self.rows:
            F = torch.nn.functional.logsigmoid(f).cumsum(-1)
            log_d = F[..., :, None] - F[..., None, :] + i[..., None, :]
            log_d = log_d.masked_fill(torch.ones(log_d.shape[-2:], dtype=torch.bool).triu(1), -torch.inf)
            m = torch.maximum(log_d.amax(-1), F)
            sig = ((q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5 * (log_d - m[..., None]).exp()).sum(-1)
            ratios.append((sig.abs().log() + m).flatten())
        return torch.cat(ratios) if ratios else torch.empty(0)


def evaluate(spec, weights, tokens, double, eps=CELL_EPS, record=None, v1_cell=None):
    """{loss, logits, grad.<official name>} of one forward and backward pass."""
    model = BUILDERS[spec["code"]](spec, eps)
    model.load_state_dict(weights)
    model.train()
    if v1_cell is not None:
        set_v1_cells(model, functools.partial(v1_cell, eps=eps))
    if record is not None:
        record.append(CellInputs(model))
    inputs = torch.stack([tokens[j * spec["T"]:(j + 1) * spec["T"]] for j in range(spec["B"])])
    targets = torch.stack([tokens[j * spec["T"] + 1:(j + 1) * spec["T"] + 1] for j in range(spec["B"])])
    with all_float64(model) if double else contextlib.nullcontext():
        logits = model(inputs, use_cache=False).logits if spec["code"] == "hf" else model(inputs)
        assert logits.dtype == (torch.float64 if double else torch.float32)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
    results = {"loss": loss.detach().reshape(1), "logits": logits.detach()}
    results.update({"grad." + name: p.grad for name, p in model.named_parameters()})
    return results


def difference(a, b):
    """(relative L2 of the worst tensor, its name)"""
    errors = {n: ((a[n].double() - b[n].double()).norm() / b[n].double().norm()).item() for n in b}
    worst = max(errors, key=errors.get)
    return errors[worst], worst


# ----------------------------------------------------------------------------------------------------------------------
# The fixtures
# ----------------------------------------------------------------------------------------------------------------------
def ffn(width, multiple, dim):
    """ffn_proj_factor that both rounding rules in use (floor of x+m-1, and ceil) turn into `width`."""
    return {"ffn_proj_factor": (width - multiple / 2) / dim, "ffn_multiple": multiple}


FIXTURES = {
    "mlstm": dict(code="large", blocks=["mlstm"] * 2, D=16, NH=2, V=32, B=2, T=70, seed=5, **ffn(48, 16, 16)),
    # every config key that changes the numbers is away from its default; head widths 5 and 10
    "mlstm_keys": dict(code="large", blocks=["mlstm"], D=24, NH=3, V=37, B=2, T=33, seed=11, qk=0.625, v=1.25,
                       norm_eps=1e-4, gate_cap=4.0, logit_cap=3.0, v_gain=0.2, args="--chunk 7", **ffn(40, 8, 24)),
    "mlstm_sig": dict(code="large", blocks=["mlstm"], D=16, NH=2, V=32, B=2, T=40, seed=6, gate="sigmoid",
                      args="--chunk 16", **ffn(48, 16, 16)),
    # D = 24 and HF's default factor 2.667: its floor rule gives 64 hidden units, a ceil rule would give 128
    "hf_random": dict(code="hf", blocks=["mlstm"], D=24, NH=3, V=32, B=2, T=37, chunk=16, seed=11),
    # HF's own initialisation (input gates near exp(-8.7), cell output far below the norm's eps), moved by 0.1 N(0,1)
    "hf_init": dict(code="hf", blocks=["mlstm"], D=16, NH=2, V=32, B=2, T=21, chunk=64, seed=2, init="own"),
    "v1": dict(code="lm", blocks=["mlstm_v1"], D=32, NH=4, V=32, B=2, T=35, seed=7, args="--chunk 16"),
    "v1_sig": dict(code="lm", blocks=["mlstm_v1"], D=16, NH=1, V=32, B=3, T=3, seed=10, gate="sigmoid"),
    "slstm": dict(code="lm", blocks=["slstm"] * 2, D=16, NH=4, V=32, B=2, T=24, seed=12),
    "slstm_vanilla": dict(code="lm", blocks=["slstm"], D=24, NH=3, V=32, B=3, T=13, seed=8, slstm_layout="vanilla"),
    "v1_slstm_v1": dict(code="lm", blocks=["mlstm_v1", "slstm", "mlstm_v1"], D=16, NH=2, V=32, B=2, T=40, seed=11),
    # all three types in the shell of the mlstm family
    "hybrid": dict(code="large", blocks=["mlstm", "slstm", "mlstm_v1"], D=16, NH=2, V=32, B=2, T=67, seed=9,
                   args="--chunk 16", **ffn(32, 16, 16)),
}


def write_shard(path, tokens, vocab):
    header = np.zeros(256, dtype="<i4")
    header[:4] = 20240520, 1, len(tokens), vocab
    with open(path, "wb") as f:
        f.write(header.tobytes() + tokens.numpy().astype("<u2").tobytes())


def write_fixture(directory, spec, model, tokens, expected):
    os.makedirs(directory, exist_ok=True)
    if spec["code"] == "hf":
        model.save_pretrained(directory)
    else:
        parameters = our_tensors(dict(model.named_parameters()), spec, spec.get("slstm_layout", "cuda"))
        save_file(parameters, directory + "/model.safetensors", metadata={"format": "pt"})
        with open(directory + "/config.json", "w") as f:
            json.dump(our_config(spec), f, indent=2)
            f.write("\n")
    values = {n: expected[n].float() for n in ("loss", "logits")}
    gradients = {n[len("grad."):]: t for n, t in expected.items() if n.startswith("grad.")}
    values.update({"grad." + n: t for n, t in our_tensors(gradients, spec).items()})
    save_file(values, directory + "/expected.safetensors", metadata={"format": "pt"})
    sizes = {n: t.numel() for n, t in load_file(directory + "/model.safetensors").items()}
    assert {n[len("grad."):]: t.numel() for n, t in values.items() if n.startswith("grad.")} == sizes, directory
    for name in ("model", "expected"):                      # safetensors writes files that only their owner can read
        os.chmod(f"{directory}/{name}.safetensors", 0o644)
    write_shard(directory + "/tokens.bin", tokens, spec["V"])
    with open(directory + "/args.txt", "w") as f:
        f.write(f"--batch {spec['B']} --seq-len {spec['T']} --no-shuffle {spec.get('args', '')}".strip() + "\n")


def print_row(*cells):
    print("| " + " | ".join(str(c) for c in cells) + " |")


def make(name, spec, out):
    """Write one fixture and print its row of the table. Returns (worst agreement, bytes)."""
    torch.manual_seed(spec["seed"])
    model = BUILDERS[spec["code"]](spec, CELL_EPS)
    fill_weights(model, spec)
    weights = {n: t.detach().clone() for n, t in model.state_dict().items()}
    rng = np.random.default_rng(1000 + spec["seed"])
    tokens = torch.from_numpy(rng.integers(0, spec["V"], spec["B"] * spec["T"] + 1))

    record = []
    exact = evaluate(spec, weights, tokens, double=True, record=record)
    ratios = record[0].log_ratios() if spec.get("gate") != "sigmoid" else torch.empty(0)
    single = evaluate(spec, weights, tokens, double=False)
    agreement, worst = difference(single, exact)
    no_eps, _ = difference(evaluate(spec, weights, tokens, double=True, eps=0.0), exact)
    m0 = None
    if "mlstm_v1" in spec["blocks"] and spec.get("gate") != "sigmoid":
        m0, _ = difference(evaluate(spec, weights, tokens, double=True, v1_cell=chunkwise_v1), exact)
    write_fixture(os.path.join(out, name), spec, model, tokens, exact)

    size = sum(e.stat().st_size for e in os.scandir(os.path.join(out, name)))
    logits, _ = difference({"logits": single["logits"]}, {"logits": exact["logits"]})
    print_row(name, ", ".join(spec["blocks"]), spec["D"], spec["NH"], f"{spec['B']} x {spec['T']}",
              f"{exact['loss'].item():.3f}", f"{logits:.1e}", f"{agreement:.1e}", our_name(worst[len("grad."):]),
              "-" if len(ratios) == 0 else f"{100 * (ratios > 0).double().mean():.0f} %",
              "-" if len(ratios) == 0 else f"{ratios.abs().min():.0e}",
              f"{no_eps:.0e}", "-" if m0 is None else f"{m0:.0e}", f"{size / 1024:.0f}")
    return agreement, size


def main():
    here = os.path.dirname(os.path.abspath(__file__))
    parser = argparse.ArgumentParser(description="write the parity fixtures")
    parser.add_argument("--out", default=os.path.join(here, "..", "test", "fixtures"))
    parser.add_argument("--only", choices=FIXTURES, help="write this fixture only")
    options = parser.parse_args()
    torch.set_num_threads(1)        # one order of summation: the same files on every machine
    print_row("fixture", "blocks", "D", "heads", "B x T", "loss", "logits", "worst", "of tensor", "q.n wins", "to kink",
              "eps 0", "m_0", "KiB")
    print_row(*["---"] * 14)
    rows = [make(name, spec, options.out) for name, spec in FIXTURES.items() if options.only in (None, name)]
    print(f"\n{sum(size for _, size in rows) / 1e6:.2f} MB in all")
    if max(agreement for agreement, _ in rows) > AGREEMENT_LIMIT:
        sys.exit(f"float32 and float64 of the official code differ by over {AGREEMENT_LIMIT:.0e}: choose other seeds")


if __name__ == "__main__":
    main()

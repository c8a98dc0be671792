#!/usr/bin/env python3
"""The C interface of build/libxlstm_kernels.so, called by ctypes on PyTorch tensors, against fp64 in PyTorch: both
cells, both formats, gradients, states in and out, documents, errors. Needs a GPU and torch.

    make build/libxlstm_kernels.so && python3 dev/test/cuda/test_kernels.py

The last line is "N passed, N failed"; exit code 1 if one failed.
"""
import ctypes
import os
import sys

import torch

ROOT = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", ".."))
sys.path.insert(0, os.path.join(ROOT, "dev", "bench"))
from bench_mlstm import EPS, Inputs, Library, MlstmProblem, MlstmTensors, reference  # noqa: E402
from bench_slstm import SlstmProblem, SlstmTensors  # noqa: E402

FORMATS = {torch.float32: (0, 1e-4), torch.bfloat16: (1, 3e-2)}             # code, largest relative L2 distance
NO_RESET = -1 << 30
counts = [0, 0]


def check(good, text):
    counts[not good] += 1
    if not good:
        print("FAIL", text)


def close(name, got, expected, dtype, scale=None):
    distance = float((got.double() - expected).norm() / (expected if scale is None else scale).norm())
    check(distance <= FORMATS[dtype][1], f"{name}: relative L2 distance {distance:.1e}")


def empty(*size, dtype=torch.float32):
    return torch.full(size, float("nan"), dtype=dtype, device="cuda")       # what is not written shows


def tensors_of(structure, tensors):
    return structure(**{name: tensor.data_ptr() for name, tensor in tensors.items() if tensor is not None})


def run(library, name, problem, tensors, saved, scratch):
    library.call(name, ctypes.addressof(problem), ctypes.addressof(tensors), saved.data_ptr(), scratch.data_ptr(),
                 torch.cuda.current_stream().cuda_stream)


# ---------------------------------------------------------------------------------------------------------------------
# mLSTM

def mlstm(library, dtype, sigmoid, x, rows, gates, dh, doc_start, initial=None, backward=True):
    """h, gradients of rows, gates and bias, final states; rows [B, T, NH (dk + dk + dv)]"""
    B, T, width = rows.shape
    problem = MlstmProblem(FORMATS[dtype][0], B, T, x.NH, x.dk, x.dv, sigmoid, EPS, 0, width, 2 * x.NH, width, 2 * x.NH)
    saved, scratch = [torch.empty(size, dtype=torch.uint8, device="cuda") for size in library.workspace(problem)]
    h, grad_rows = empty(B, T, x.NH, x.dv, dtype=dtype), empty(*rows.shape, dtype=dtype)
    grad_gates, grad_bias = empty(B, T, 2 * x.NH), torch.ones(2 * x.NH, device="cuda")
    final = empty(B, x.NH * (x.dk * x.dv + x.dk + 1))
    named = dict(gates=gates, bias=torch.zeros(2 * x.NH, device="cuda"), doc_start=doc_start, initial=initial,
                 final=final, h=h, grad_h=dh, grad_gates=grad_gates, grad_bias=grad_bias)
    parts = [0, x.NH * x.dk, 2 * x.NH * x.dk]
    for name, at in zip("qkv", parts):
        named[name], named["grad_" + name] = rows[..., at:], grad_rows[..., at:]
    pointers = tensors_of(MlstmTensors, named)
    run(library, "mlstm_forward", problem, pointers, saved, scratch)
    if backward:
        run(library, "mlstm_backward", problem, pointers, saved, scratch)
    return h, grad_rows, grad_gates, grad_bias - 1, final


def test_mlstm(library, dtype, sigmoid, shape):
    label = f"mlstm {shape} {dtype} {'sigmoid' if sigmoid else 'exponential'}"
    x = Inputs(shape, mean=1)
    rows, dh = x.rows.to(dtype), x.dh_rows.to(dtype)
    none = torch.full((x.B, x.T), NO_RESET, dtype=torch.int32, device="cuda")
    h, grad_rows, grad_gates, grad_bias, final = mlstm(library, dtype, sigmoid, x, rows, x.gates, dh, none)
    expected = reference(x, sigmoid, False)
    by_rows = [y.transpose(1, 2).reshape(x.B, x.T, -1) for y in expected]
    close(label + " h", h.flatten(2), by_rows[0], dtype)
    close(label + " dq, dk, dv", grad_rows, torch.cat(by_rows[1:4], -1), dtype)
    grads = torch.cat(by_rows[4:], -1)
    close(label + " gates", grad_gates, grads, dtype)
    # what is left of a sum that cancels, as that over the input gates does, is the rounding of its terms: their norm
    close(label + " bias", grad_bias, grads.sum((0, 1)), dtype, scale=grads)

    half = x.T // 2
    first, second = [[y[:, part].contiguous() for y in (rows, x.gates, dh, none)]
                     for part in (slice(0, half), slice(half, x.T))]
    h_first, *_, between = mlstm(library, dtype, sigmoid, x, *first, backward=False)
    h_second, *_, end = mlstm(library, dtype, sigmoid, x, *second, between, backward=False)
    close(label + " h in halves", torch.cat([h_first, h_second], 1).double(), h.double(), dtype)
    # C and n in units of e^m, which differ
    split = [x.NH * x.dk * x.dv, x.NH * x.dk, x.NH]
    (C, _, m), (C_end, _, m_end) = final.double().split(split, 1), end.double().split(split, 1)
    scale = [(y - torch.maximum(m, m_end)).exp().repeat_interleave(x.dk * x.dv, 1) for y in (m, m_end)]
    close(label + " final C in halves", C_end * scale[1], C * scale[0], dtype)

    fresh = none.clone()
    fresh[:, half:] = half                                                  # a document begins
    h_documents = mlstm(library, dtype, sigmoid, x, rows, x.gates, dh, fresh)[0][:, half:]
    h_alone = mlstm(library, dtype, sigmoid, x, *second, backward=False)[0]
    close(label + " document", h_documents, h_alone.double(), dtype)


def test_errors(library):
    good = dict(format=1, B=1, T=64, NH=1, dk=64, dv=64, sigmoid_gate=0, eps=EPS, gate_cap=0, ld=192, ld_gates=2,
                ld_grad=192, ld_grad_gates=2)
    sizes = ctypes.c_size_t(), ctypes.c_size_t()
    wrong = [({}, 0), ({"format": 2}, 2), ({"T": 0}, 3), ({"dv": 1025}, 3), ({"eps": -1}, 3), ({"ld": 63}, 4),
             ({"ld_gates": 1}, 4)]
    for change, error in wrong:
        problem = MlstmProblem(**{**good, **change})
        got = library.functions.mlstm_workspace(ctypes.byref(problem), *map(ctypes.byref, sizes))
        check(got == error, f"mlstm_workspace with {change}: {got}, not {error}")
    problem, memory = MlstmProblem(**good), torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
    at, pointers = memory.data_ptr(), MlstmTensors()
    call = library.functions.mlstm_forward
    check(call(ctypes.addressof(problem), ctypes.addressof(pointers), at, at, None) == 1, "tensors NULL")
    for name in ("q", "k", "v", "gates", "bias", "doc_start", "h"):
        setattr(pointers, name, at)
    check(call(ctypes.addressof(problem), ctypes.addressof(pointers), at + 16, at, None) == 5, "saved not aligned")
    pointers.k = at + 1
    check(call(ctypes.addressof(problem), ctypes.addressof(pointers), at, at, None) == 5, "k not aligned")


# ---------------------------------------------------------------------------------------------------------------------
# sLSTM

def slstm_reference(x, R, bias, doc_start):
    """y, y_prev [B, T, NH, d] in fp64; x [B, T, NH, 4, d], R [NH, d, 4, d]"""
    B, T, NH, _, d = x.shape
    zeros = x.new_zeros(B, NH, d)
    y, c, n, m = zeros, zeros, zeros, zeros
    outputs, entered = [], []
    for t in range(T):
        goes_on = (doc_start[:, t] != t).to(x)[:, None, None]
        y, c, n, m = y * goes_on, c * goes_on, n * goes_on, m * goes_on
        entered.append(y)
        i, f, z, o = (x[:, t] + bias + torch.einsum("bhk,hkgd->bhgd", y, R)).unbind(2)
        log_f = torch.nn.functional.logsigmoid(f)
        m_next = torch.where(n == 0, i, torch.maximum(i, log_f + m)).detach()
        input_gate, forget = (i - m_next).exp(), torch.where(n == 0, zeros, (log_f + m - m_next).exp())
        c, n, m = forget * c + input_gate * z.tanh(), forget * n + input_gate, m_next
        y = o.sigmoid() * c / n
        outputs.append(y)
    return torch.stack(outputs, 1), torch.stack(entered, 1)


def test_slstm(library, dtype, shape):
    B, T, NH, d = shape
    label = f"slstm {shape} {dtype}"
    generator = torch.Generator("cuda").manual_seed(1)

    def normal(*size, scale=1.0):
        return (scale * torch.randn(size, generator=generator, device="cuda")).to(dtype)
    x, R, grad_y = normal(B, T, NH, 4, d), normal(NH, d, 4, d, scale=0.5 * d ** -0.5), normal(B, T, NH, d)
    bias = torch.randn(NH, 4, d, generator=generator, device="cuda")
    doc_start = torch.zeros(B, T, dtype=torch.int32, device="cuda")
    doc_start[0, T // 3:] = T // 3
    problem = SlstmProblem(FORMATS[dtype][0], B, T, NH, d)
    sizes = [ctypes.c_size_t() for _ in range(3)]
    library.call("slstm_workspace", ctypes.byref(problem), *map(ctypes.byref, sizes))
    saved, scratch = (torch.empty(size.value, dtype=torch.uint8, device="cuda") for size in sizes[:2])
    y, grad_x, final = empty(B, T, NH, d, dtype=dtype), empty(*x.shape, dtype=dtype), empty(B, 4, NH, d)
    grad_bias = torch.ones(NH, 4, d, device="cuda")
    pointers = tensors_of(SlstmTensors, dict(x=x, R=R, bias=bias, doc_start=doc_start, final=final, y=y, grad_y=grad_y,
                                             grad_x=grad_x, grad_bias=grad_bias))
    run(library, "slstm_forward", problem, pointers, saved, scratch)
    run(library, "slstm_backward", problem, pointers, saved, scratch)
    at = sizes[2].value
    y_prev = saved[at:at + y.numel() * y.element_size()].view(dtype).view(y.shape)

    inputs = [z.double().requires_grad_() for z in (x, R, bias)]
    expected, entered = slstm_reference(*inputs, doc_start)
    grads = torch.autograd.grad(expected, inputs, grad_y.double(), retain_graph=True)
    close(label + " y", y, expected.detach(), dtype)
    close(label + " y_prev", y_prev, entered.detach(), dtype)
    close(label + " final y", final[:, 0], expected[:, -1].detach(), dtype)
    close(label + " dx", grad_x, grads[0], dtype)
    close(label + " dR", torch.einsum("bthk,bthgd->hkgd", y_prev.double(), grad_x.double()), grads[1], dtype)
    close(label + " dbias", grad_bias - 1, grads[2], dtype)

    # two halves: the second goes on from the states after the first, and the first gets their gradient
    half = T // 2
    problem.T, dstates, parts = half, empty(B, 4, NH, d), []
    for k in range(2):
        x_half, start, dy_half = [z[:, k * half:(k + 1) * half].contiguous() for z in (x, doc_start, grad_y)]
        tensors = dict(x=x_half, R=R, bias=bias, doc_start=start - k * half, y=empty(B, half, NH, d, dtype=dtype),
                       final=empty(B, 4, NH, d), grad_y=dy_half, grad_x=torch.empty_like(x_half), grad_bias=grad_bias)
        tensors["grad_initial" if k else "grad_final"] = dstates
        if k:
            tensors["initial"] = parts[0][0]["final"]
        parts.append((tensors, torch.empty_like(saved)))
    for name, order in ("slstm_forward", parts), ("slstm_backward", parts[::-1]):
        for tensors, part_saved in order:
            run(library, name, problem, tensors_of(SlstmTensors, tensors), part_saved, scratch)
    grad_y[:, 2 * half:] = 0
    grad_halves = torch.autograd.grad(expected, inputs[0], grad_y.double())[0][:, :2 * half]
    close(label + " y from states", parts[1][0]["y"], expected[:, half:2 * half].detach(), dtype)
    close(label + " dx through states", torch.cat([p["grad_x"] for p, _ in parts], 1), grad_halves, dtype)


def main():
    library = Library(os.path.join(ROOT, "build", "libxlstm_kernels.so"))
    for dtype in FORMATS:
        for sigmoid in (False, True):
            for shape in ((2, 3, 130, 64, 128), (2, 2, 77, 20, 36), (1, 2, 1100, 128, 256)):
                test_mlstm(library, dtype, sigmoid, shape)
        for shape in ((3, 40, 2, 24), (9, 33, 2, 192)):
            test_slstm(library, dtype, shape)
    test_errors(library)
    print(f"{counts[0]} passed, {counts[1]} failed")
    sys.exit(1 if counts[1] else 0)


if __name__ == "__main__":
    main()

#!/usr/bin/env python3
"""The sLSTM cell alone on one GPU: build/libxlstm_kernels.so against FlashRNN's fused CUDA kernels, and cuDNN's LSTM.

All in bf16, in one process, in turns. First, on the first tokens of every shape, the relative L2 distance to an fp64
recurrence of y and the gradients of the pre-activations, R and the bias, of both; and whether a second run gives the
same bits. Then milliseconds forward and forward + backward, medians of so many runs, each on one of three sets of
random inputs, with an empty L2 cache before every run. Backward includes the gradient of R: FlashRNN makes it itself,
beside ours runs torch.bmm. Both get their tensors in the layout that they want, and buffers that are there.

cuDNN's LSTM is a yardstick, not the same function: one head of the same width, so R is dense, without normaliser, and
with the product of the input.

    pip install torch flashrnn                        (or PYTHONPATH=FOLDER with the sources of flashrnn)
    make build/libxlstm_kernels.so && python3 dev/bench/bench_slstm.py --out out/bench_slstm
    python3 dev/bench/bench_slstm.py --shapes 16,1024,4,256 --no-check

FlashRNN builds its kernels with nvcc for every shape when it is first used, a minute or two each (TORCH_CUDA_ARCH_LIST
names the chip, or they are built by the driver as PTX). flashrnn 1.0.8 does not build with CUDA 13, which has lost
fields of cudaDeviceProp: in flashrnn/gpu_info/gpu_info.cc the lines with clockRate, deviceOverlap,
kernelExecTimeoutEnabled, computeMode, maxTexture1DLinear, memoryClockRate, singleToDoublePrecisionPerfRatio and
cooperativeMultiDeviceLaunch have to go; they are only reported. Without flashrnn, its columns stay empty.

Writes bench_slstm.md to the folder --out. Exit code 1 if an error of ours is larger than theirs, a second run of ours
differs, or a call of ours failed.
"""
import argparse
import ctypes
import os
import statistics
import sys

ROOT = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
sys.path.insert(0, os.path.join(ROOT, "dev", "bench"))
from bench_mlstm import BF16, DEVICE, L2_BYTES, Library  # noqa: E402

SHAPES = ["16,1024,4,192", "16,1024,4,256", "16,1024,1,768", "64,2048,4,256"]
OURS, PEER, CUDNN = "xlstm.c", "FlashRNN cuda_fused", "cuDNN LSTM"
SETS, RUNS = 3, 15
CHECKED_T = 256                                                             # tokens of the fp64 recurrence
WORSE = 1.05                                                                # an error so many times theirs is worse
RESULTS = ("y", "dx", "dR", "dbias")


class SlstmProblem(ctypes.Structure):                                       # as in xlstmc/xlstm_kernels.h
    _fields_ = [(name, ctypes.c_int) for name in ("format", "B", "T", "NH", "d")]


class SlstmTensors(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in
                ("x", "R", "bias", "doc_start", "initial", "final", "y", "grad_y", "grad_x", "grad_bias", "grad_final",
                 "grad_initial")]


class Inputs:
    """x [B, T, NH, 4, d], R [NH, d from, 4, d to], bias [NH, 4, d], dy [B, T, NH, d]; all representable in bf16."""

    def __init__(self, shape, seed):
        import torch
        self.B, self.T, self.NH, self.d = self.shape = shape
        generator = torch.Generator(DEVICE).manual_seed(seed)

        def normal(*size):
            return torch.randn(*size, generator=generator, device=DEVICE)
        self.x, self.dy = normal(self.B, self.T, self.NH, 4, self.d).bfloat16(), normal(*shape).bfloat16()
        self.R = (0.7 / self.d ** 0.5 * normal(self.NH, self.d, 4, self.d)).bfloat16()
        self.bias = 0.5 * normal(self.NH, 4, self.d)
        self.bias[:, 1] += 2                                                # forget gates lean open
        self.bias = self.bias.bfloat16()


# ---------------------------------------------------------------------------------------------------------------------
# Contenders: forward() and backward() work on `inputs`, results() gives RESULTS in our layout.

class Ours:
    def __init__(self, inputs, library):
        import torch
        self.inputs, self.library = inputs, library
        B, T, NH, d = inputs.shape
        self.problem = SlstmProblem(BF16, B, T, NH, d)
        sizes = [ctypes.c_size_t() for _ in range(3)]
        library.call("slstm_workspace", ctypes.byref(self.problem), *[ctypes.byref(size) for size in sizes])
        self.saved, self.scratch = [torch.empty(s.value, dtype=torch.uint8, device=DEVICE) for s in sizes[:2]]
        self.y_prev = self.saved[sizes[2].value:][:2 * B * T * NH * d].view(torch.bfloat16).view(B * T, NH, d)
        self.doc_start = torch.zeros(B, T, dtype=torch.int32, device=DEVICE)
        self.bias, self.dbias = inputs.bias.float(), torch.zeros(NH, 4, d, device=DEVICE)
        self.y, self.dx = torch.empty_like(inputs.dy), torch.empty_like(inputs.x)
        self.dR = torch.empty(NH, d, 4 * d, dtype=torch.bfloat16, device=DEVICE)
        tensors = {"x": inputs.x, "R": inputs.R, "bias": self.bias, "doc_start": self.doc_start, "y": self.y,
                   "grad_y": inputs.dy, "grad_x": self.dx, "grad_bias": self.dbias}
        self.tensors = SlstmTensors(**{name: tensor.data_ptr() for name, tensor in tensors.items()})

    def run(self, name):
        import torch
        self.library.call(name, ctypes.addressof(self.problem), ctypes.addressof(self.tensors), self.saved.data_ptr(),
                          self.scratch.data_ptr(), torch.cuda.current_stream().cuda_stream)

    def forward(self):
        self.run("slstm_forward")

    def backward(self):
        import torch
        self.dbias.zero_()
        self.run("slstm_backward")
        torch.bmm(self.y_prev.permute(1, 2, 0), self.dx.view(len(self.y_prev), *self.dR.shape[::2]).transpose(0, 1),
                  out=self.dR)

    def results(self):
        return self.y, self.dx, self.dR.view_as(self.inputs.R), self.dbias


class FlashRNN:
    def __init__(self, inputs, library):
        import torch
        from flashrnn.flashrnn.flashrnn import FlashRNNConfig, FlashRNNFuncGeneratorFused
        B, T, NH, d = inputs.shape
        config = FlashRNNConfig(backend="cuda_fused", function="slstm", batch_size=B, num_heads=NH, head_dim=d,
                                hidden_dim=NH * d, dtype="bfloat16")
        self.function = FlashRNNFuncGeneratorFused(True, config)
        self.x = inputs.x.permute(1, 0, 2, 4, 3).contiguous()               # [T, B, NH, d, gate]
        self.R = inputs.R.permute(0, 3, 2, 1).contiguous()                  # [NH, d to, gate, d from]
        self.bias = inputs.bias.permute(0, 2, 1).contiguous()               # [NH, d, gate]
        self.initial = torch.zeros(4, B, NH, d, dtype=torch.bfloat16, device=DEVICE)
        self.wanted = [tensor.requires_grad_() for tensor in (self.x, self.R, self.bias)]
        self.dstates = torch.zeros(4, T + 1, B, NH, d, dtype=torch.bfloat16, device=DEVICE)
        self.dstates[0, 1:] = inputs.dy.transpose(0, 1)

    def forward(self):
        self.states = self.function.apply(True, self.x, self.initial, self.R, self.bias)

    def backward(self):
        import torch
        self.gradients = torch.autograd.grad(self.states, self.wanted, self.dstates)

    def results(self):
        dx, dR, dbias = self.gradients
        return (self.states[0, 1:].transpose(0, 1), dx.permute(1, 0, 2, 4, 3), dR.permute(0, 3, 2, 1),
                dbias.permute(0, 2, 1))


class Cudnn:
    def __init__(self, inputs, library):
        import torch
        B, T, NH, d = inputs.shape
        self.lstm = torch.nn.LSTM(NH * d, NH * d).to(DEVICE, torch.bfloat16)
        self.x = inputs.x[:, :, :, 0].reshape(B, T, NH * d).transpose(0, 1).contiguous().requires_grad_()
        self.dy = inputs.dy.reshape(B, T, NH * d).transpose(0, 1).contiguous()
        self.wanted = [self.x, *self.lstm.parameters()]

    def forward(self):
        self.y = self.lstm(self.x)[0]

    def backward(self):
        import torch
        torch.autograd.grad(self.y, self.wanted, self.dy)


CONTENDERS = {OURS: Ours, PEER: FlashRNN, CUDNN: Cudnn}


# ---------------------------------------------------------------------------------------------------------------------
# Errors

def reference(inputs):
    """RESULTS in fp64, by autograd through the recurrence of the first paper, stabilised."""
    import torch
    import torch.nn.functional as F
    x, R, bias = [tensor.double().requires_grad_() for tensor in (inputs.x, inputs.R, inputs.bias)]
    c, n, m, y = [torch.zeros_like(inputs.dy[:, 0], dtype=torch.float64) for _ in range(4)]
    m = m - float("inf")
    outputs = []
    for t in range(inputs.T):
        i, f, z, o = (x[:, t] + bias + torch.einsum("bhk,hkgj->bhgj", y, R)).unbind(2)
        stored = F.logsigmoid(f) + m
        m = torch.maximum(i, stored).detach()                               # cancels in c / n
        I, kept = torch.exp(i - m), torch.exp(stored - m)
        c, n = kept * c + I * torch.tanh(z), kept * n + I
        y = torch.sigmoid(o) * c / n
        outputs.append(y)
    y = torch.stack(outputs, 1)
    return [y.detach(), *torch.autograd.grad(y, (x, R, bias), inputs.dy.double())]


def check_shape(shape, names, library):
    """{name: ([errors], same bits)}"""
    import torch
    B, T, NH, d = shape
    inputs = Inputs((B, min(T, CHECKED_T), NH, d), 100)
    expected, rows = reference(inputs), {}
    for name in names:
        contender, runs = CONTENDERS[name](inputs, library), []
        for _ in range(2):
            contender.forward()
            contender.backward()
            runs.append([tensor.clone() for tensor in contender.results()])
        errors = [float((got.double() - want).norm() / want.norm()) for got, want in zip(runs[0], expected)]
        rows[name] = errors, all(torch.equal(a, b) for a, b in zip(*runs))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# Times

def milliseconds(call, flush):
    import torch
    begin, end = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    flush.zero_()
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def time_shape(shape, names, library):
    """{name: (forward, forward and backward)} in ms, medians"""
    import torch
    flush = torch.empty(L2_BYTES, dtype=torch.uint8, device=DEVICE)
    contenders = {name: [CONTENDERS[name](Inputs(shape, seed), library) for seed in range(SETS)] for name in names}
    times = {name: ([], []) for name in names}
    for run in range(-SETS, RUNS):
        for name in names:
            contender = contenders[name][run % SETS]

            def both():
                contender.forward()
                contender.backward()
            measured = milliseconds(contender.forward, flush), milliseconds(both, flush)
            for k in range(2 * (run >= 0)):
                times[name][k].append(measured[k])
    return {name: [statistics.median(values) for values in times[name]] for name in names}


def usable(name, shape, library):
    """Whether the contender runs; FlashRNN builds here."""
    import torch
    try:
        contender = CONTENDERS[name](Inputs((shape[0], 8, *shape[2:]), 1), library)
        contender.forward()
        contender.backward()
        torch.cuda.synchronize()
        return True
    except Exception as error:                                              # of a build, an import, a launch
        print(f"{name} is left out at {shape}: {type(error).__name__}: {str(error)[:300]}", file=sys.stderr)
        return False


def parse():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="B,T,NH,d")
    parser.add_argument("--library", default=os.path.join(ROOT, "build", "libxlstm_kernels.so"))
    parser.add_argument("--out", default=os.path.join(ROOT, "out", "bench_slstm"))
    parser.add_argument("--no-check", action="store_true", help="times only")
    return parser.parse_args()


def main():
    options = parse()
    import torch
    library, bad = Library(options.library), False
    os.makedirs(options.out, exist_ok=True)
    times = ["| B, T, NH, d | " + " | ".join(CONTENDERS) + f" | {PEER} / {OURS} |", "|---|---|---|---|---|"]
    errors = ["| B, T, NH, d | | " + " | ".join(RESULTS) + " | second run |", "|---|---|---|---|---|---|---|"]
    for text in options.shapes:
        shape = tuple(int(size) for size in text.split(","))
        names = [name for name in CONTENDERS if usable(name, shape, library)]
        bad |= OURS not in names
        if not options.no_check:
            rows = check_shape(shape, [name for name in names if name != CUDNN], library)
            for name, (values, same) in rows.items():
                errors.append(f"| {text} | {name} | " + " | ".join(f"{value:.1e}" for value in values) +
                              f" | {'same bits' if same else 'differs'} |")
            if OURS in rows and PEER in rows:
                bad |= any(ours > WORSE * theirs for ours, theirs in zip(rows[OURS][0], rows[PEER][0]))
            bad |= OURS in rows and not rows[OURS][1]
        medians = time_shape(shape, names, library)
        cells = ["{:.3f} / {:.3f}".format(*medians[name]) if name in medians else "-" for name in CONTENDERS]
        ratio = "-"
        if OURS in medians and PEER in medians:
            ratio = " / ".join(f"{theirs / ours:.2f}" for ours, theirs in zip(medians[OURS], medians[PEER]))
        times.append(f"| {text} | " + " | ".join(cells) + f" | {ratio} |")
        print(times[-1], flush=True)
        torch.cuda.empty_cache()
    title = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bf16"
    report = "\n".join([title, "", "ms forward / forward + backward", "", *times, ""] +
                       ([] if options.no_check else [f"Relative L2 distance to fp64, {CHECKED_T} tokens", "", *errors]))
    with open(os.path.join(options.out, "bench_slstm.md"), "w") as file:
        file.write(report + "\n")
    print(report)
    return bad


if __name__ == "__main__":
    sys.exit(main())

#!/usr/bin/env python3
"""The mLSTM cell alone on one GPU: build/libxlstm_kernels.so against the authors' Triton kernels and attention.

Contenders, all bf16 (gates fp32), all in one process a shape and in turns: this library with exponential and sigmoid
input gate; mlstm_kernels' "xl_chunk", chunk 128 (the largest whose gradients are right), exponential and sigmoid gate;
causal attention of the same model width NH * dv with heads of 128: PyTorch's FlashAttention-2 and cuDNN.

Times: an empty L2 cache before every run, medians and the 10-90 % range, the clock of the multiprocessors beside them,
by two protocols:
  kernels   all buffers preallocated, explicit gradient of h, no autograd in the forward pass; a CUDA graph of the calls
            is replayed, so no side waits for Python ("eager" where a graph could not be captured). The forward pass
            alone keeps nothing for a backward one, as neither do the authors' kernels. Our backward pass makes the row
            sums <dh, h> itself; "dh.h given" is handed them, as by the head norm in the trainer
  theirs    (--theirs) as mlstm_kernels' benchmarks measure: autograd, loss = sum of h, gradients accumulated, memory
            given back to the driver after every run, so that it is allocated anew. Their gates are bf16; here they stay
            fp32: with bf16 ones Triton 3.6 aborts while it compiles xl_chunk's forward kernel (an assertion of LLVM's
            SLPVectorizer). That also ends the authors' model, whose autocast hands these kernels bf16 gates

Errors (--errors, instead of times): on small shapes, for random, saturated (+-15) and long-memory (forget gates around
6) gates, the relative L2 distance of h and of the gradients of q, k, v and both gates to an fp64 reference, ours and
the authors'. Their kernels take the normaliser for a constant, which is the gradient of another function; so their
distance to a reference that does the same stands behind, in brackets. On every shape that is timed, the distance of our
h and dv to theirs.

Every shape is a process of its own, and all of them compile at once; then one after another measures. A contender that
fails or aborts is left out on that shape.

    pip install torch mlstm_kernels einops              (or PYTHONPATH=FOLDER with the sources of mlstm_kernels, einops)
    make build/libxlstm_kernels.so && python3 dev/bench/bench_mlstm.py --out out/bench_mlstm
    python3 dev/bench/bench_mlstm.py --rows 1 4 32,8,2048,256,512 --quick
    python3 dev/bench/bench_mlstm.py --rows length      # 65,536 tokens in sequences of 2,048 to 65,536
    python3 dev/bench/bench_mlstm.py --errors

Writes bench_mlstm.md and bench_mlstm.svg (time a token against T, a curve a kernel), or bench_mlstm_errors.md, to the
folder --out. Exit code 1 if an error of ours is larger than theirs, or one of our calls failed.
"""
import argparse
import ctypes
import gc
import json
import math
import os
import re
import statistics
import subprocess
import sys
import threading
import time

ROOT = os.path.normpath(os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", ".."))
SHAPES = ["1,8,65536,256,512", "2,8,8192,256,512", "8,8,2048,256,512", "32,4,2048,128,256", "4,4,16384,128,256",
          "16,4,2048,192,384", "16,12,2048,64,128", "16,6,4096,64,128"]
LENGTH = ["32,8,2048,256,512", "8,8,8192,256,512", "2,8,32768,256,512", "1,8,65536,256,512", "32,4,2048,128,256",
          "8,4,8192,128,256", "4,4,16384,128,256", "1,4,65536,128,256"]                             # --rows length
CHECKED = ["2,2,512,64,128", "1,36,8192,64,128", "1,2,65536,64,128", "1,2,2048,192,384", "1,2,2048,256,512",
           "1,1,8192,256,512", "1,1,65536,128,256"]
GATES = ["random", "saturated", "long memory"]
OURS, OURS_SIG, OURS_DOT = "xlstm.c exp", "xlstm.c sig", "xlstm.c exp, dh.h given"
PEER, PEER_SIG = "xl_chunk exp", "xl_chunk sig"
FA2, CUDNN = "FlashAttention-2", "cuDNN attention"
CONTENDERS = [OURS, PEER, OURS_SIG, PEER_SIG, OURS_DOT, FA2, CUDNN]
QUICK = [OURS, PEER]
ATTENTION_WIDTH = 128                                                       # of a head
EPS = 1e-6
DEVICE = "cuda"
L2_BYTES = 256 << 20                                                        # cleared before every run, and so many
AHEAD = 10                                                                  # times before every turn
KERNEL_RUNS, KERNEL_MS = 50, 200                                            # runs of a call: so many, in so much time,
QUICK_RUNS, THEIR_RUNS, THEIR_MS, LEAST_RUNS = 15, 15, 200, 3               # but at least three
BANDWIDTH = 3.0e12                                                          # of a device copy: bytes read and written
GPU_GIB = 70                                                                # of memory while shapes are prepared
SILENCE = 240                                                               # seconds; then a child hangs
WORSE = 1.05                                                                # an error so many times theirs is worse
MESSAGE = "@ "                                                              # begins a line from child to parent


# ---------------------------------------------------------------------------------------------------------------------
# The library

class MlstmProblem(ctypes.Structure):                                       # as in xlstmc/xlstm_kernels.h
    _fields_ = [(name, ctypes.c_int) for name in ("format", "B", "T", "NH", "dk", "dv", "sigmoid_gate")] + \
               [(name, ctypes.c_float) for name in ("eps", "gate_cap")] + \
               [(name, ctypes.c_size_t) for name in ("ld", "ld_gates", "ld_grad", "ld_grad_gates")]


class MlstmTensors(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in
                ("q", "k", "v", "gates", "bias", "doc_start", "initial", "final", "h", "grad_h", "dh_dot_h", "grad_q",
                 "grad_k", "grad_v", "grad_gates", "grad_bias")]


BF16 = 1


class Library:
    def __init__(self, path):
        self.functions = ctypes.CDLL(path)
        self.functions.xlstm_error.restype = ctypes.c_char_p
        for name in ("mlstm_forward", "mlstm_backward", "slstm_forward", "slstm_backward"):
            getattr(self.functions, name).argtypes = [ctypes.c_void_p] * 5

    def call(self, name, *arguments):
        error = getattr(self.functions, name)(*arguments)
        if error:
            raise RuntimeError(f"{name}: {self.functions.xlstm_error(error).decode()}")

    def workspace(self, problem):
        """Bytes of saved and of scratch"""
        sizes = ctypes.c_size_t(), ctypes.c_size_t()
        self.call("mlstm_workspace", ctypes.byref(problem), ctypes.byref(sizes[0]), ctypes.byref(sizes[1]))
        return [size.value for size in sizes]


# ---------------------------------------------------------------------------------------------------------------------
# Inputs

class Inputs:
    """q, k, v, dh in bf16 and the gates i, f in fp32, [B, NH, T, ...]; the same for the library as
    rows [B, T, NH (dk + dk + dv)], gates [B, T, 2 NH], dh_rows [B, T, NH, dv].

    mean is that of the elements of q and k. With 0 the normaliser is a sum of both signs that now and then comes out
    near zero, and such rows, where any rounding is the whole result, are most of any distance. Errors are compared
    with 1 where there is a normaliser."""

    def __init__(self, shape, gates="random", mean=0):
        import torch
        self.B, self.NH, self.T, self.dk, self.dv = self.shape = shape
        generator = torch.Generator(DEVICE).manual_seed(1)

        def normal(*size):
            return torch.randn(self.B, self.NH, self.T, *size, generator=generator, device=DEVICE)
        self.q, self.k = [(normal(self.dk) + mean).bfloat16() for _ in range(2)]
        self.v, self.dh = normal(self.dv).bfloat16(), normal(self.dv).bfloat16()
        i, f = normal(), normal()
        if gates == "saturated":
            self.i, self.f = 15 * i.sign(), 15 * f.sign()
        else:                                   # forget gates lean open, as in a trained model
            self.i, self.f = (i, f + 6) if gates == "long memory" else (i - 1, f + 3)
        self.rows = [x.transpose(1, 2).reshape(self.B, self.T, -1) for x in (self.q, self.k, self.v)]
        self.rows = torch.cat(self.rows, dim=-1)
        self.gates = torch.cat([x.transpose(1, 2) for x in (self.i, self.f)], dim=-1).contiguous()
        self.dh_rows = self.dh.transpose(1, 2).contiguous()
        self.buffers = {}

    def buffer(self, name, size):
        """Memory for what the library writes. Its variants take turns in it: the same kernels in other places of the
        memory can take 2 % longer."""
        import torch
        if name not in self.buffers:
            self.buffers[name] = torch.empty(size, dtype=torch.uint8, device=DEVICE)
        return self.buffers[name]


class Ours:
    """The library on preallocated buffers, those of the inputs."""
    GRADIENTS = ("grad_q", "grad_k", "grad_v")

    def __init__(self, x, library, sigmoid, dot_given=False):
        import torch
        self.x, self.library = x, library
        width = x.rows.shape[-1]

        def problem(sigmoid, ld_grad=width):
            shape = BF16, x.B, x.T, x.NH, x.dk, x.dv, sigmoid, EPS, 0, width, 2 * x.NH
            return MlstmProblem(*shape, ld_grad, 2 * x.NH)
        self.problem = problem(sigmoid)
        self.inference = problem(sigmoid, 0)                    # no backward pass follows: nothing is kept for it
        self.bias = torch.zeros(2 * x.NH, device=DEVICE)
        self.grad_bias = torch.zeros(2 * x.NH, device=DEVICE)
        self.doc_start = torch.full((x.B, x.T), -1 << 30, dtype=torch.int32, device=DEVICE)
        self.h, self.grad_rows, self.grad_gates = [
            x.buffer(name, like.nbytes).view(like.dtype).view(like.shape)
            for name, like in (("h", x.dh_rows), ("grad_rows", x.rows), ("grad_gates", x.gates))]
        sizes = [library.workspace(problem(gate)) for gate in (False, True)]
        self.saved, self.scratch = [x.buffer(name, max(both)) for name, both in zip(("saved", "scratch"), zip(*sizes))]
        self.dot = None
        self.tensors = self.pointers(x.rows, x.gates, self.h, x.dh_rows, self.grad_rows, self.grad_gates)
        if dot_given:
            self.forward()
            self.dot = (self.h.float() * x.dh_rows.float()).sum(-1)
            self.tensors.dh_dot_h = self.dot.data_ptr()

    def pointers(self, rows, gates, h, dh, grad_rows, grad_gates):
        t = MlstmTensors()
        at = [0, self.x.NH * self.x.dk * 2, self.x.NH * self.x.dk * 4]      # bytes: q, k, v side by side
        t.q, t.k, t.v = [rows.data_ptr() + offset for offset in at]
        t.gates, t.bias, t.doc_start = gates.data_ptr(), self.bias.data_ptr(), self.doc_start.data_ptr()
        t.h, t.grad_bias = h.data_ptr(), self.grad_bias.data_ptr()
        if grad_rows is not None:
            t.grad_q, t.grad_k, t.grad_v = [grad_rows.data_ptr() + offset for offset in at]
            t.grad_h, t.grad_gates = dh.data_ptr(), grad_gates.data_ptr()
        return t

    def run(self, name, tensors, saved, scratch, problem=None):
        import torch
        self.library.call(name, ctypes.addressof(problem or self.problem), ctypes.addressof(tensors),
                          saved.data_ptr(), scratch.data_ptr(), torch.cuda.current_stream().cuda_stream)

    def forward(self):
        self.run("mlstm_forward", self.tensors, self.saved, self.scratch, self.inference)

    def both(self):
        self.run("mlstm_forward", self.tensors, self.saved, self.scratch)
        self.run("mlstm_backward", self.tensors, self.saved, self.scratch)

    def results(self):
        """h, dq, dk, dv, di, df, each [B, NH, T, ...]"""
        x = self.x
        self.both()
        dq, dk, dv = self.grad_rows.split([x.NH * x.dk, x.NH * x.dk, x.NH * x.dv], dim=-1)
        heads = [y.unflatten(-1, (x.NH, -1)).transpose(1, 2) for y in (dq, dk, dv)]
        return [self.h.transpose(1, 2), *heads, *(g.transpose(1, 2) for g in self.grad_gates.split(x.NH, dim=-1))]

    def autograd(self):
        """(function, its inputs): allocates what it needs at every call, as the other contenders do"""
        import torch
        ours = self

        class Cell(torch.autograd.Function):
            @staticmethod
            def forward(ctx, rows, gates):
                h = torch.empty_like(ours.x.dh_rows)
                saved, scratch = (torch.empty_like(y) for y in (ours.saved, ours.scratch))
                problem = ours.problem if any(ctx.needs_input_grad) else ours.inference
                ours.run("mlstm_forward", ours.pointers(rows, gates, h, None, None, None), saved, scratch, problem)
                ctx.save_for_backward(rows, gates, h, saved)
                return h

            @staticmethod
            def backward(ctx, dh):
                rows, gates, h, saved = ctx.saved_tensors
                dh = dh.contiguous()                                        # lives until the call is queued
                grad_rows, grad_gates = torch.empty_like(rows), torch.empty_like(ours.grad_gates)
                tensors = ours.pointers(rows, gates, h, dh, grad_rows, grad_gates)
                ours.run("mlstm_backward", tensors, saved, torch.empty_like(ours.scratch))
                return grad_rows, grad_gates
        return Cell.apply, [self.x.rows, self.x.gates]


class Torch:
    """A contender that is a function of PyTorch tensors."""

    def __init__(self, function, inputs, dh):
        self.function, self.dh = function, dh
        self.inputs = [y.detach().requires_grad_() for y in inputs]

    def forward(self):
        import torch
        with torch.no_grad():
            return self.function(*self.inputs)

    def both(self):
        import torch
        h = self.function(*self.inputs)
        return [h.detach(), *torch.autograd.grad(h, self.inputs, self.dh)]

    results = both

    def autograd(self):
        return self.function, self.inputs


def official(x, sigmoid):
    import torch
    from mlstm_kernels.torch.chunkwise.triton_xl_chunk import mlstm_chunkwise__xl_chunk
    from mlstm_kernels.torch.chunkwise.triton_xl_chunk_siging import mlstm_siging_chunkwise__xl_chunk
    kernel = mlstm_siging_chunkwise__xl_chunk if sigmoid else mlstm_chunkwise__xl_chunk
    options = {"normalize": False} if sigmoid else {}

    def function(q, k, v, i, f):
        return kernel(q, k, v, i, f, chunk_size=128, eps=EPS, autocast_kernel_dtype=torch.bfloat16, **options)
    return Torch(function, [x.q, x.k, x.v, x.i, x.f], x.dh)


def attention(x, backend):
    import torch
    from torch.nn.attention import sdpa_kernel
    width = x.NH * x.dv
    if width % ATTENTION_WIDTH:
        raise ValueError(f"width {width} is no multiple of {ATTENTION_WIDTH}")

    def function(q, k, v):
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    shape = (x.B, width // ATTENTION_WIDTH, x.T, ATTENTION_WIDTH)
    generator = torch.Generator(DEVICE).manual_seed(2)
    tensors = [torch.randn(shape, generator=generator, device=DEVICE).bfloat16() for _ in range(4)]
    return Torch(function, tensors[:3], tensors[3])


def make_contender(name, x, library):
    from torch.nn.attention import SDPBackend
    if name in (PEER, PEER_SIG):
        return official(x, name == PEER_SIG)
    if name in (FA2, CUDNN):
        return attention(x, SDPBackend.FLASH_ATTENTION if name == FA2 else SDPBackend.CUDNN_ATTENTION)
    return Ours(x, library, name == OURS_SIG, name == OURS_DOT)


# ---------------------------------------------------------------------------------------------------------------------
# Errors against fp64

def reference(x, sigmoid, constant_normaliser, chunk=256):
    """h, dq, dk, dv, di, df in fp64, chunk by chunk, the gradients by autograd (formulas: doc/math.md 3.4)."""
    import torch
    inputs = [y.detach().double().flatten(0, 1).requires_grad_() for y in (x.q, x.k, x.v, x.i, x.f)]
    scale, outputs = x.dk ** -0.5, []
    C = inputs[1].new_zeros(x.B * x.NH, x.dk, x.dv)
    n, m = C.new_zeros(x.B * x.NH, x.dk), C.new_zeros(x.B * x.NH, 1)
    for t in range(0, x.T, chunk):
        q, k, v, i, f = (y[:, t:t + chunk] for y in inputs)
        i = torch.nn.functional.logsigmoid(i) if sigmoid else i
        b = torch.nn.functional.logsigmoid(f).cumsum(1)
        # the scale M of each row: any will do (but for eps), so it is a constant
        M = torch.zeros_like(b) if sigmoid else (b + torch.maximum(m, (i - b).cummax(1).values)).detach()
        future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool, device=DEVICE).triu(1)
        log_D = (b - M)[:, :, None] + (i - b)[:, None, :]
        S = scale * log_D.masked_fill(future, -math.inf).exp() * (q @ k.transpose(1, 2))
        from_state = scale * (b + m - M).exp()[:, :, None] * q
        sums = S.sum(2) + (from_state @ n[:, :, None])[:, :, 0]
        den = torch.maximum(sums.abs(), (-M).exp()) + EPS
        den = torch.ones_like(den) if sigmoid else den.detach() if constant_normaliser else den
        outputs.append((S @ v + from_state @ C) / den[:, :, None])
        end, m_next = b[:, -1:], M[:, -1:]
        keys = (end + i - b - m_next).exp()[:, :, None] * k
        keep = (end + m - m_next).exp()
        C, n, m = keep[:, :, None] * C + keys.transpose(1, 2) @ v, keep * n + keys.sum(1), m_next
    h = torch.cat(outputs, 1)
    gradients = torch.autograd.grad(h, inputs, x.dh.double().flatten(0, 1))
    return [y.detach().unflatten(0, (x.B, x.NH)) for y in (h, *gradients)]


def distances(results, expected):
    return [float((y.double() - z).norm() / z.norm()) for y, z in zip(results, expected)]


def check_shape(shape, library, names, sibling, say):
    """[(gates, sigmoid, {contender: errors or None}, {contender: what failed})]; a contender's errors are six, and six
    more, to a reference with a constant normaliser, where that is what its gradients are of."""
    rows = []
    for gates in GATES:
        for ours, peer, sigmoid in ((OURS, PEER, False), (OURS_SIG, PEER_SIG, True)):
            x = Inputs(shape, gates, mean=0 if sigmoid else 1)
            errors, failed = {ours: None, peer: None}, {}
            true = reference(x, sigmoid, False)
            for name in (ours, peer):
                if name not in names:
                    failed[name] = "aborted"
                    continue
                say("doing", name)
                wait_for(sibling, name)
                try:
                    results = make_contender(name, x, library).results()
                    errors[name] = distances(results, true)
                    if name == peer and not sigmoid:
                        errors[name] += distances(results, reference(x, sigmoid, True))
                except Exception as error:                  # whatever a peer raises concerns only that peer
                    failed[name] = describe(error)
            rows.append((gates, sigmoid, errors, failed))
    return rows


def describe(error):
    return (f"{type(error).__name__}: {error}".strip().splitlines() or [""])[0][:160]


# ---------------------------------------------------------------------------------------------------------------------
# Times of a shape

def capture(work):
    """(a CUDA graph's replay, True), or (work itself, False) if it cannot be captured"""
    import torch
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        work()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            kept = work()                                   # lives in the graph's memory as long as the graph
    except Exception:
        torch.cuda.synchronize()
        return work, False
    return lambda: (graph.replay(), kept)[0], True


class Stopwatch:
    def __init__(self):
        import torch
        self.torch = torch
        self.l2 = torch.empty(L2_BYTES, dtype=torch.int8, device=DEVICE)

    def record(self, work):
        """Queues a run behind one that empties L2; its two events."""
        events = [self.torch.cuda.Event(enable_timing=True) for _ in range(2)]
        self.l2.zero_()
        events[0].record()
        work()
        events[1].record()
        return events

    def measure(self, works, runs, total_ms, say, after=lambda: None):
        """{(name, pass): sorted ms} of {(name, pass): work}, in turns; at most `runs` each, or what takes total_ms."""
        counts, pending, times = {}, {key: [] for key in works}, {}
        for key, work in works.items():
            say("doing", key[0])
            begin, end = self.record(work)
            self.torch.cuda.synchronize()
            counts[key] = max(LEAST_RUNS, min(runs, int(total_ms / max(begin.elapsed_time(end), 1e-3))))
        say("doing", "turns")
        for run in range(max(counts.values(), default=0)):
            for _ in range(AHEAD):                          # else the first one's time holds the wait for its launch
                self.l2.zero_()
            for key, work in works.items():
                if run < counts[key]:
                    pending[key].append(self.record(work))
                    after()
            self.torch.cuda.synchronize()
        for key, events in pending.items():
            times[key] = sorted(begin.elapsed_time(end) for begin, end in events)
        return times


def their_work(contender, backward):
    """What mlstm_kernels' benchmarks run"""
    function, inputs = contender.autograd()
    inputs = [y.detach().requires_grad_(backward) for y in inputs]

    def work():
        h = function(*inputs)
        if backward:
            h.sum().backward()
    return work


def summary(times):
    n = len(times)
    return [statistics.median(times), times[int(0.1 * (n - 1) + 0.5)], times[int(0.9 * (n - 1) + 0.5)], n]


def start_sibling(options, names):
    """A process that compiles PEER_SIG for this shape meanwhile, into the caches of Triton and torch.compile."""
    if PEER_SIG not in names:
        return None
    command = [sys.executable, os.path.abspath(__file__), "--library", options.library, "--shape", options.shape]
    return subprocess.Popen(command + ["--compile"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def wait_for(sibling, name):
    if sibling and name == PEER_SIG:
        sibling.wait()


def prepare_shape(x, library, names, sibling, failures, say):
    """Runs everything once, which compiles it, and compares ours with the official kernels on the way."""
    import torch
    compared = {}
    for name in sorted(names, key=lambda name: name == PEER_SIG):           # that one last
        say("doing", name)
        wait_for(sibling, name)
        try:
            results = make_contender(name, x, library).results()
            if not all(torch.isfinite(y).all() for y in results):
                raise ValueError("a result is not finite")
            if name in (OURS, PEER, OURS_SIG, PEER_SIG):
                compared[name] = results[0].clone(), results[3].clone()     # h and dv do not depend on the
            torch.cuda.synchronize()                                        # normaliser's gradient
        except Exception as error:
            failures[name] = describe(error)
    differences = {}
    for ours, peer in ((OURS, PEER), (OURS_SIG, PEER_SIG)):
        if ours in compared and peer in compared:
            differences[ours] = [float((a.float() - b.float()).norm() / b.float().norm())
                                 for a, b in zip(compared[ours], compared[peer])]
    return differences


def time_shape(x, library, names, options, failures, say):
    """{protocol: {contender: {"fwd" | "fwd+bwd": summary}}}, and the contenders that ran without a graph"""
    watch, eager, contenders, works = Stopwatch(), set(), {}, {}
    for name in names:
        say("doing", name)
        try:
            contender = make_contender(name, x, library)
            graphs = {(name, key): capture(work) for key, work in
                      (("fwd", contender.forward), ("fwd+bwd", contender.both))}
        except Exception as error:
            failures[name] = describe(error)
            continue
        contenders[name] = contender
        works.update({key: work for key, (work, _) in graphs.items()})
        if not all(captured for _, captured in graphs.values()):
            eager.add(name)
    runs = QUICK_RUNS if options.quick else KERNEL_RUNS
    times = {"kernels": watch.measure(works, runs, KERNEL_MS, say)}
    works.clear()                                                           # and the graphs' memory
    if options.theirs:
        contenders.pop(OURS_DOT, None)
        times["theirs"] = time_their_way(contenders, watch, failures, say)
    table = {protocol: {} for protocol in times}
    for protocol, measured in times.items():
        for (name, key), values in measured.items():
            table[protocol].setdefault(name, {})[key] = summary(values)
    return table, sorted(eager)


def time_their_way(contenders, watch, failures, say):
    """The second protocol"""
    import torch

    def give_back():
        gc.collect()
        torch.cuda.empty_cache()
    give_back()
    gc.freeze()                                                             # so that gc.collect() takes no time
    works = {}
    for name, contender in contenders.items():
        say("doing", name)
        try:
            pair = {(name, key): their_work(contender, key == "fwd+bwd") for key in ("fwd", "fwd+bwd")}
            for work in pair.values():
                work()
            works.update(pair)
        except Exception as error:
            failures[name + ", their protocol"] = describe(error)
    return watch.measure(works, THEIR_RUNS, THEIR_MS, say, give_back)


def child(options):
    """One shape: prepares, says so, waits for its turn on the GPU, measures. Or: one shape's errors."""
    def say(kind, value):
        print(MESSAGE + json.dumps([kind, value]), flush=True)
    say("doing", "PyTorch")
    names = [name for name in (QUICK if options.quick else CONTENDERS) if name not in options.without]
    sibling = None if options.compile else start_sibling(options, names)
    import torch
    shape = tuple(map(int, options.shape.split(",")))
    torch.zeros(1, device=DEVICE)
    if options.compile:
        return official(Inputs(shape), True).results()
    failures = {name: "aborted" for name in options.without}
    library = None
    try:
        library = Library(os.path.abspath(options.library))
    except OSError as error:
        failures.update({name: describe(error) for name in (OURS, OURS_SIG, OURS_DOT)})
        names = [name for name in names if name not in failures]
    if options.errors:
        return say("result", check_shape(shape, library, names, sibling, say))
    differences = prepare_shape(Inputs(shape, mean=1), library, names, sibling, failures, say)
    gc.collect()
    torch.cuda.empty_cache()
    say("ready", None)
    sys.stdin.readline()
    names = [name for name in names if name not in failures]
    table, eager = time_shape(Inputs(shape), library, names, options, failures, say)
    say("result", {"times": table, "eager": eager, "failures": failures, "differences": differences})


# ---------------------------------------------------------------------------------------------------------------------
# The parent

class Child:
    """A process for one shape. If it aborts or hangs, what it was doing is to blame; a new one starts without that."""

    def __init__(self, options, shape):
        self.shape, self.without = shape, []
        self.command = [sys.executable, os.path.abspath(__file__), "--library", options.library, "--shape", shape]
        self.command += [f"--{flag}" for flag in ("errors", "quick", "theirs") if getattr(options, flag)]
        B, NH, T, dk, dv = map(int, shape.split(","))
        # of GPU memory at most, roughly: the states of the authors' kernels in fp32, and the tensors of one contender,
        # here and in the sibling that compiles
        self.gib = 2 * B * NH * T * (dk * dv // 13 + 24 * (dk + dv)) / 2 ** 30

    def start(self):
        environment = dict(os.environ, TORCHINDUCTOR_COMPILE_THREADS="1")   # the children are parallel enough
        without = [word for name in self.without for word in ("--without", name)]
        self.doing, self.result, self.heard = "", None, time.monotonic()
        self.ready, self.ended = threading.Event(), threading.Event()
        self.process = subprocess.Popen(self.command + without, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, env=environment)
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            if not line.startswith(MESSAGE):
                print(line, end="", file=sys.stderr)
                continue
            self.heard = time.monotonic()
            kind, value = json.loads(line[len(MESSAGE):])
            if kind == "doing":
                self.doing = value
            elif kind == "ready":
                self.ready.set()
            else:
                self.result = value
        self.process.wait()
        self.ended.set()
        self.ready.set()

    def happened(self, event, seconds=0):
        if time.monotonic() - self.heard > SILENCE:
            self.process.kill()
        return event.wait(seconds)

    def wait(self, event):
        while not self.happened(event, 1):
            pass

    def revive(self):
        """False if the child has died of something else than a contender."""
        if self.doing not in CONTENDERS:
            return False
        print(f"{self.shape}: ended in {self.doing}; again without it", file=sys.stderr)
        self.without.append(self.doing)
        self.start()
        return True

    def prepare(self):
        self.wait(self.ready)
        while self.ended.is_set() and self.result is None and self.revive():
            self.wait(self.ready)

    def measure(self):
        """The result, or None"""
        while True:
            self.prepare()
            self.heard = time.monotonic()
            try:
                self.process.stdin.write("go\n")
                self.process.stdin.flush()
            except OSError:
                pass
            self.wait(self.ended)
            if self.result is not None or not self.revive():
                return self.result


def prepare_all(children):
    """Starts the children, as many at once as fit into the GPU's memory, until each is ready."""
    waiting, running = list(children), []
    while waiting or running:
        while waiting and (not running or sum(c.gib for c in running) + waiting[0].gib <= GPU_GIB):
            running.append(waiting.pop(0))
            running[-1].start()
        for c in [c for c in running if c.happened(c.ready)]:
            c.prepare()
            running.remove(c)
        time.sleep(0.1)


class Clocks:
    """The clock of the multiprocessors in MHz, as nvidia-smi reads it ten times a second."""

    def __init__(self):
        self.readings = []
        device = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
        try:
            self.process = subprocess.Popen(["nvidia-smi", "-i", device, "--query-gpu=clocks.sm",
                                             "--format=csv,noheader,nounits", "-lms", "100"], stdout=subprocess.PIPE,
                                            text=True)
        except OSError:
            self.process = None
            return
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        for line in self.process.stdout:
            if line.strip().isdigit():
                self.readings.append((time.monotonic(), int(line)))

    def since(self, begin):
        values = [clock for at, clock in self.readings if at >= begin]
        return f"{statistics.median(values):.0f} ({min(values)} - {max(values)})" if values else "not known"

    def end(self):
        if self.process:
            self.process.terminate()
            self.process.wait()


def error_table(results):
    """(lines of Markdown, whether ours is worse anywhere). The last column: in what ours is worse than theirs, both to
    the true gradients; then in what worse than theirs to their own reference."""
    lines = ["| B,NH,T,dk,dv | input gate | gates | h | dq | dk | dv | di | df | worse; than theirs to their own |",
             "|" + "---|" * 10]
    bad = False
    for shape, rows in results:
        if rows is None:
            lines.append(f"| {shape} | failed |" + " |" * 8)
            bad = True
            continue
        for gates, sigmoid, errors, failed in rows:
            ours, peer = (OURS_SIG, PEER_SIG) if sigmoid else (OURS, PEER)
            mine, theirs = errors[ours], errors[peer]

            def worse_than(other):
                names = ("h", "dq", "dk", "dv", "di", "df")
                return ", ".join(name for name, a, b in zip(names, mine, other) if not a <= WORSE * b)  # also if NaN
            if mine is None:
                cells, verdict = [failed[ours]] + [""] * 5, "failed"
                bad = True
            elif theirs is None:
                cells, verdict = [f"{a:.1e} / -" for a in mine], f"theirs: {failed[peer]}"
                bad |= not all(map(math.isfinite, mine))
            else:
                cells, own = [f"{a:.1e} / {b:.1e}" for a, b in zip(mine, theirs)], theirs[6:]
                cells = [f"{cell} ({c:.1e})" for cell, c in zip(cells, own)] if own else cells
                verdict = (worse_than(theirs) or "no") + (f"; {worse_than(own) or 'no'}" if own else "")
                bad |= worse_than(theirs) != ""
            lines.append("| " + " | ".join([shape, "sigmoid" if sigmoid else "exponential", gates, *cells, verdict]) +
                         " |")
    return lines, bad


def floor_ms(shape):
    """(forward, forward + backward): every input and output moved once"""
    B, NH, T, dk, dv = map(int, shape.split(","))
    bytes_of_qkvh = 2 * B * NH * T * (2 * dk + 2 * dv)
    backward = bytes_of_qkvh + 2 * B * NH * T * (2 * dk + dv)               # q, k, v, dh; dq, dk, dv
    return [1e3 * b / BANDWIDTH for b in (bytes_of_qkvh, bytes_of_qkvh + backward)]


def summary_table(results, protocol, names):
    """A row a shape: medians of all, and how many times faster we are than the authors' exponential gate"""
    lines = ["| B, NH, T, dk/dv | floor | " + " | ".join([PEER, OURS, "**ratio**"] + names) + " |",
             "|---|" + "---|" * (4 + len(names))]
    for shape, result, _ in results:
        B, NH, T, dk, dv = shape.split(",")
        times = result["times"].get(protocol, {}) if result else {}

        def pair(name):
            values = [times.get(name, {}).get(key) for key in ("fwd", "fwd+bwd")]
            return " / ".join(f"{v[0]:.3f}" if v else "-" for v in values)
        ratios = []
        for key in ("fwd", "fwd+bwd"):
            a, b = times.get(OURS, {}).get(key), times.get(PEER, {}).get(key)
            ratios.append(f"{b[0] / a[0]:.2f}" if a and b else "-")
        floor = " / ".join(f"{ms:.3f}" for ms in floor_ms(shape))
        cells = [f"{B}, {NH}, {T}, {dk}/{dv}", floor, pair(PEER), pair(OURS), f"**{' / '.join(ratios)}**"]
        cells += [pair(name) for name in names]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def time_table(results, names):
    lines = ["| B,NH,T,dk,dv | contender | fwd | fwd+bwd |", "|" + "---|" * 4]
    for shape, result, _ in results:
        if not result:
            lines.append(f"| {shape} | failed |" + " |" * 2)
            continue
        for name in names:
            cells = []
            for key in ("fwd", "fwd+bwd"):
                values = result["times"]["kernels"].get(name, {}).get(key)
                cells.append("{0:.3f} ({1:.3f} - {2:.3f}, {3})".format(*values) if values else "-")
            why = result["failures"].get(name) or result["failures"].get(name + ", their protocol")
            label = name + (", eager" if name in result["eager"] else "") + (f": {why}" if why else "")
            lines.append("| " + " | ".join([shape, label, *cells]) + " |")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# The plot: a panel for every head shape and pass; T and the time a token on logarithmic axes

COLORS = dict(zip(CONTENDERS, ["#d62728", "#1f77b4", "#ff7f0e", "#17becf", "#e377c2", "#2ca02c", "#9467bd"]))
PANEL, MARGIN = (380, 260), 60


def panel(at, title, curves):
    """SVG of {contender: [(T, ns a token)]}"""
    points = [point for curve in curves.values() for point in curve]
    low_T, high_T = (f(math.log2(T) for T, _ in points) for f in (min, max))
    low, high = (f(math.log10(y) for _, y in points) for f in (min, max))
    low_T, high_T = (low_T - 0.5, high_T + 0.5) if high_T - low_T < 1 else (low_T, high_T)
    low, high = low - 0.05, high + 0.05
    left, top, width, height = at[0] + MARGIN, at[1] + 30, PANEL[0] - MARGIN - 25, PANEL[1] - 70

    def X(T):
        return left + (math.log2(T) - low_T) / (high_T - low_T) * width

    def Y(y):
        return top + (high - math.log10(y)) / (high - low) * height
    svg = [f'<text x="{left}" y="{top - 10}">{title}</text>',
           f'<path fill="none" stroke="black" d="M{left} {top}v{height}h{width}"/>']
    for T in sorted({T for T, _ in points}):
        svg.append(f'<text x="{X(T):.1f}" y="{top + height + 16}" text-anchor="middle">{T}</text>')
    for power in range(math.floor(low), math.ceil(high) + 1):
        for digit in (1, 2, 5):
            y = digit * 10.0 ** power
            if low <= math.log10(y) <= high:
                svg.append(f'<path stroke="#ddd" d="M{left} {Y(y):.1f}h{width}"/>')
                svg.append(f'<text x="{left - 6}" y="{Y(y):.1f}" dy="4" text-anchor="end">{y:g}</text>')
    for name, curve in curves.items():
        path = " ".join(f"{X(T):.1f},{Y(y):.1f}" for T, y in curve)
        svg.append(f'<polyline fill="none" stroke="{COLORS[name]}" stroke-width="2" points="{path}"/>')
        svg += [f'<circle cx="{X(T):.1f}" cy="{Y(y):.1f}" r="3" fill="{COLORS[name]}"/>' for T, y in curve]
    return svg


def plot(results):
    groups = {}
    for shape, result, _ in results:
        B, NH, T, dk, dv = map(int, shape.split(","))
        for name, times in (result["times"]["kernels"] if result else {}).items():
            for key, values in times.items() if name != OURS_DOT else ():
                curve = groups.setdefault((NH, dk, dv), {}).setdefault(key, {}).setdefault(name, [])
                curve.append((T, values[0] * 1e6 / (B * T)))
    rows = [(heads, passes) for heads, passes in groups.items()             # curves rather than points, if there are
            if max(len({T for T, _ in curve}) for curves in passes.values() for curve in curves.values()) > 1]
    rows = rows or list(groups.items())
    names = [name for name in CONTENDERS if any(name in curves for _, passes in rows for curves in passes.values())]
    height = PANEL[1] * len(rows) + 20 + 20 * ((len(names) + 1) // 2)
    svg = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {2 * PANEL[0]} {height}" font-family="sans-serif" '
           'font-size="12">', '<rect width="100%" height="100%" fill="white"/>']
    for row, ((NH, dk, dv), passes) in enumerate(rows):
        for column, key in enumerate(("fwd", "fwd+bwd")):
            if key in passes:
                curves = {name: sorted(curve) for name, curve in passes[key].items()}
                title = f"{NH} heads of {dk}/{dv}, {key}: ns a token against T"
                svg += panel((column * PANEL[0], row * PANEL[1]), title, curves)
    for k, name in enumerate(names):
        x, y = MARGIN + k % 2 * PANEL[0], PANEL[1] * len(rows) + 20 + 20 * (k // 2)
        svg.append(f'<rect x="{x}" y="{y - 5}" width="24" height="3" fill="{COLORS[name]}"/>')
        svg.append(f'<text x="{x + 32}" y="{y}">{name}</text>')
    return "\n".join(svg + ["</svg>"]) + "\n"


def parse():
    parser = argparse.ArgumentParser(description="the mLSTM cell on one GPU against the authors' kernels and attention")
    parser.add_argument("--rows", nargs="+", metavar="ROW", default=[f"1-{len(SHAPES)}"],
                        help=f"B,NH,T,dk,dv, or 1 to {len(SHAPES)} or a range of them: {' '.join(SHAPES)}; or length: "
                             f"{' '.join(LENGTH)}. Default: 1-{len(SHAPES)}")
    parser.add_argument("--quick", action="store_true",
                        help=f"exponential gates alone, ours and the authors', at most {QUICK_RUNS} runs")
    parser.add_argument("--theirs", action="store_true", help="the protocol of mlstm_kernels, too")
    parser.add_argument("--errors", action="store_true", help="no times: errors against fp64, on shapes of their own")
    parser.add_argument("--out", metavar="DIR", default=os.path.join(ROOT, "build"),
                        help="folder for what is written, default build")
    parser.add_argument("--library", metavar="PATH", default=os.path.join(ROOT, "build", "libxlstm_kernels.so"))
    parser.add_argument("--shape", help=argparse.SUPPRESS)                  # these three: of a child
    parser.add_argument("--without", action="append", default=[], help=argparse.SUPPRESS)
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.shapes = []
    for row in options.rows:
        numbers = re.fullmatch(r"([1-9]\d*)(?:-(\d+))?", row)
        if numbers and int(numbers[1]) <= int(numbers[2] or numbers[1]) <= len(SHAPES):
            options.shapes += SHAPES[int(numbers[1]) - 1:int(numbers[2] or numbers[1])]
        elif row == "length":
            options.shapes += LENGTH
        elif re.fullmatch(r"[1-9]\d*(,[1-9]\d*){4}", row):
            options.shapes.append(row)
        else:
            parser.error(f"--rows: {row} is none of 1 to {len(SHAPES)}, a range of them, length, B,NH,T,dk,dv")
    options.shapes = list(dict.fromkeys(options.shapes))
    if not os.path.exists(options.library):
        sys.exit(f"{options.library} is not there: run make build/libxlstm_kernels.so")
    return options


def write(folder, name, text):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        file.write(text)


def report_errors(options):
    begin = time.monotonic()
    children = [Child(options, shape) for shape in CHECKED]
    for c in children:
        c.start()
    table, bad = error_table([(c.shape, c.measure()) for c in children])
    lines = ["Relative L2 distance to fp64: ours / xl_chunk (xl_chunk to a reference with a constant normaliser)", ""]
    lines += [*table, "", f"{time.monotonic() - begin:.0f} s"]
    print("\n".join(lines))
    write(options.out, "bench_mlstm_errors.md", "\n".join(lines) + "\n")
    return bad


def report_times(options):
    begin, clocks = time.monotonic(), Clocks()
    children = [Child(options, shape) for shape in options.shapes]
    prepare_all(children)                                   # nobody compiles any more when the first measures
    prepared, results = time.monotonic() - begin, []
    for c in children:
        at = time.monotonic()
        results.append((c.shape, c.measure(), clocks.since(at)))
    clocks.end()
    names = QUICK if options.quick else CONTENDERS
    others = [name for name in names if name not in QUICK]
    lines = ["ms, forward / forward and backward, medians; floor: every input and output once at 3.0 TB/s", ""]
    lines += summary_table(results, "kernels", others) + [""]
    if options.theirs:
        lines += ["The same by the protocol of mlstm_kernels (gates fp32):", ""]
        lines += summary_table(results, "theirs", [name for name in others if name != OURS_DOT]) + [""]
    bad = False
    for shape, result, clock in results:
        differences = {name: " / ".join(f"{d:.1e}" for d in values)
                       for name, values in (result["differences"] if result else {}).items()}
        lines.append(f"{shape}: clock {clock} MHz; distance to xl_chunk, h / dv: " +
                     (", ".join(f"{name} {text}" for name, text in differences.items()) or "not known") + "  ")
        for name, why in sorted(result["failures"].items()) if result else []:
            lines.append(f"{shape}: {name} failed: {why}  ")
        bad |= not result or any(name in result["failures"] for name in (OURS, OURS_SIG, OURS_DOT))
    lines += ["", f"{time.monotonic() - begin:.0f} s, of which {prepared:.0f} s to compile and check"]
    print("\n".join(lines))
    spread = ["", "ms, median (10 % - 90 %, runs):", "", *time_table(results, names)]
    write(options.out, "bench_mlstm.md", "\n".join(lines + spread) + "\n")
    if any(result for _, result, _ in results):
        write(options.out, "bench_mlstm.svg", plot(results))
    return bad


def main():
    options = parse()
    if options.shape:
        return child(options)
    os.makedirs(options.out, exist_ok=True)
    sys.exit(1 if (report_errors if options.errors else report_times)(options) else 0)


if __name__ == "__main__":
    main()

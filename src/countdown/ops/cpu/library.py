"""The library of CPU kernels: where it is, its C interface (see `csrc/countdown.h`), and the threads it runs on."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from countdown.ops import cpu
from countdown.ops.base import MOST_TOKENS

ABI = 14
NAMES = ("countdown_cpu.so", "countdown_cpu.dll")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
INT64 = 3
# A linear has none, and nothing is activated.
ACTIVATIONS = {"silu": 0, "gelu_tanh": 1, "gelu": 2, "relu": 3, "": 0}
# Of weights, by the name of the format and the dtype of its first part.
FORMATS = {
    **{("plain", dtype): place for dtype, place in DTYPES.items()},
    ("int4", torch.uint8): 3,
    ("int4-by-column", torch.uint8): 3,
}
# Selectors, and None for who gives the active sets.
DECIDERS = {"up": 0, "gate": 1, "coefficient": 2, "proxy-4": 3, "input": 4, None: 5}
# Weights of one matrix that are worth another thread.
_GRAIN = 65536

_Int, _Pointer = ctypes.c_int64, ctypes.c_void_p
_Tokens = _Pointer * MOST_TOKENS


def of_tokens(tensor: Tensor, tokens: int) -> ctypes.Array[ctypes.c_void_p]:
    """Return where each token of a contiguous tensor `[tokens, ...]` lies."""
    first = tensor.data_ptr()
    if tokens == 1:
        return _Tokens(first)
    step = tensor.nbytes // tokens
    return _Tokens(*(first + t * step for t in range(tokens)))


class MatrixView(ctypes.Structure):
    """`countdown_weight`."""

    _fields_ = (("format", _Int), ("data", _Pointer), ("stride", _Int), ("bias_dtype", _Int), ("bias", _Pointer))


class CopyView(ctypes.Structure):
    """`countdown_copy`."""

    _fields_ = (("levels", _Pointer), ("scales", _Pointer))


class Decision(ctypes.Structure):
    """`countdown_decision`."""

    _fields_ = (
        ("by", _Int),
        *((name, _Pointer) for name in ("per_term", "second", "active", "phases")),
        *((name, _Int) for name in ("looks", "words", "groups")),
        *((name, CopyView) for name in ("gate", "up")),
    )


class CompensationView(ctypes.Structure):
    """`countdown_compensation`."""

    _fields_ = (("rank", _Int), ("inner", MatrixView), ("outer", MatrixView))


class AffineView(ctypes.Structure):
    """`countdown_affine`."""

    _fields_ = (
        *((name, _Int) for name in ("words", "groups")),
        ("matrix", CopyView),
        *((name, _Pointer) for name in ("channels", "bias")),
    )


class SumCall(ctypes.Structure):
    """`countdown_sum_call`."""

    _fields_ = (
        *((name, _Int) for name in ("dtype", "tokens", "d", "h", "outputs", "activation")),
        ("x", _Tokens),
        *((name, MatrixView) for name in ("gate", "up", "down")),
        ("decision", Decision),
        ("added", CompensationView),
        ("affine", AffineView),
        *((name, _Pointer) for name in ("selected", "counters")),
        ("y", _Tokens),
        ("workspace", _Pointer),
    )


class ProjectCall(ctypes.Structure):
    """`countdown_project_call`."""

    _fields_ = (
        *((name, _Int) for name in ("dtype", "tokens", "d", "count", "format")),
        ("x", _Tokens),
        ("weights", _Pointer * 3),
        ("rows", _Int * 3),
        ("strides", _Int * 3),
        ("biases", _Pointer * 3),
        ("y", _Tokens),
        ("workspace", _Pointer),
    )


class AttendCall(ctypes.Structure):
    """`countdown_attend_call`."""

    _fields_ = (
        *((name, _Int) for name in ("dtype", "heads", "groups", "length", "size")),
        *((name, _Pointer) for name in ("q", "keys", "values")),
        *((name, _Int) for name in ("q_stride", "keys_group_stride", "keys_stride")),
        *((name, _Int) for name in ("values_group_stride", "values_stride")),
        ("mask", _Pointer),
        ("scale", ctypes.c_float),
        *((name, _Pointer) for name in ("y", "workspace")),
    )


class TensorView(ctypes.Structure):
    """`countdown_tensor`."""

    _fields_ = (("data", _Pointer), ("dtype", _Int), ("strides", _Int * 4))


class SmallCall(ctypes.Structure):
    """`countdown_small_call`."""

    _fields_ = (
        ("operation", _Int),
        ("activation", _Int),
        ("sizes", _Int * 4),
        *((name, TensorView) for name in ("result", "first", "second")),
        ("value", ctypes.c_double),
        ("at", _Pointer),
        ("at_stride", _Int),
        ("at_limit", _Int),
    )


class Step(ctypes.Structure):
    """`countdown_step`."""

    _fields_ = (("kind", _Int), ("parts", _Int), ("call", _Pointer))


Call = SumCall | ProjectCall | AttendCall | SmallCall
_KINDS: dict[type, int] = {SumCall: 0, ProjectCall: 1, AttendCall: 2, SmallCall: 3}


@dataclass(frozen=True)
class Ran:
    """A call that was run, with the memory that it has the addresses of.

    Args:
        call: What was done.
        parts: In so many, which decides the order of its sums.
        tensors: What it reads and writes, and what it works in.
    """

    call: Call
    parts: int
    tensors: list[Tensor]

    @classmethod
    def of(cls, call: Call, parts: int, tensors: Sequence[Tensor | None]) -> Ran:
        """Return what was run, keeping the memory that the tensors have now, whatever they are given later."""
        return cls(call, parts, [tensor.detach() for tensor in tensors if tensor is not None])

    def with_others(self, others: Sequence[Ran], *, sparse_up_to: int) -> Ran | None:
        """Return one call that does this and others, which differ from it in their tokens alone; None if they do not.

        A product is to the same bits. A sparse sum reads once what several tokens need, and adds in another order; of
        more tokens than `sparse_up_to` it is dense: all terms are active, and counted as that.
        """
        alike = isinstance(self.call, ProjectCall | SumCall) and self.call.tokens == 1
        calls = [one.call for one in (self, *others)]
        if not alike or any(
            one.parts != self.parts or _but_tokens(one.call) != _but_tokens(self.call) for one in others
        ):
            return None
        call = type(self.call).from_buffer_copy(self.call)
        call.tokens = len(calls)
        call.x, call.y = (_Tokens(*(getattr(one, name)[0] for one in calls)) for name in ("x", "y"))
        tensors = [tensor for one in (self, *others) for tensor in one.tensors]
        if isinstance(call, SumCall) and len(calls) > sparse_up_to:
            tensors.append(_all_active(call))
        return replace(self, call=call, tensors=tensors)

    @property
    def step(self) -> Step:
        """What runs it again, which holds addresses alone."""
        return Step(_KINDS[type(self.call)], self.parts, ctypes.addressof(self.call))


def _all_active(call: SumCall) -> Tensor:
    """Let all terms of a call be active; return the sets, which the call has the address of."""
    every = torch.ones(call.tokens * call.h, dtype=torch.uint8, device="cpu")
    call.decision.active, call.decision.second = every.data_ptr(), None
    call.affine.words = 0  # nothing is left to be predicted
    if call.gate.data:  # of an input channel its input is the coefficient all the same
        call.decision.by, call.decision.words = DECIDERS[None], 0
    return every


def _but_tokens(call: Call) -> bytes | None:
    """Return what a call is besides where its token lies and where it works."""
    if not isinstance(call, ProjectCall | SumCall):
        return None
    other = type(call).from_buffer_copy(call)
    other.x, other.y, other.workspace = _Tokens(), _Tokens(), None
    return bytes(other)


class _Scratch(threading.local):
    """What each thread that calls has for itself.

    That is the calls seen while it watches, and memory to work in: making some for every call takes longer than a small
    call.
    """

    def __init__(self) -> None:
        self.seen: list[Ran] | None = None
        self._memory = torch.empty(0, dtype=torch.uint8, device="cpu")

    def of(self, size: int) -> Tensor:
        """Return at least so many bytes, which the next call of this thread gets too."""
        if self._memory.nbytes < size:
            self._memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        return self._memory


class Library:
    """The loaded library.

    Args:
        path: Its file.

    Raises:
        OSError: It cannot be loaded, or belongs to another version of this package.
    """

    def __init__(self, path: Path) -> None:
        functions = ctypes.CDLL(str(path))
        if functions.countdown_abi() != ABI:
            raise OSError(f"{path} belongs to another version of this package")
        self._functions = functions
        self._scratch = _Scratch()
        self._workspace = functions.countdown_workspace
        self._workspace.argtypes, self._workspace.restype = (_Pointer,), _Int
        # Of an array of steps and its length.
        self._run, self._run_apart = functions.countdown_run, functions.countdown_run_apart
        for run in (self._run, self._run_apart):
            run.argtypes, run.restype = (_Pointer, _Int), None
        functions.countdown_variant.restype = ctypes.c_char_p
        runtime = _openmp()
        if runtime is not None:
            functions.countdown_use_openmp(*runtime)

    @property
    def variants(self) -> list[str]:
        """The variants that this CPU runs, the best first; it is taken at the start."""
        names: list[str] = []
        while (name := self._functions.countdown_variant(len(names))) is not None:
            names.append(name.decode())
        return names

    def take_variant(self, name: str) -> None:
        """Use this one of `variants` from now on."""
        self._functions.countdown_take_variant(self.variants.index(name))

    def run(self, call: SumCall | ProjectCall | AttendCall, tensors: Sequence[Tensor | None], weights: int) -> None:
        """Run a call, whose workspace is filled in here, on torch's threads.

        Args:
            call: What to do.
            tensors: Those whose addresses it holds.
            weights: Entries of a matrix that it reads: few are not worth several threads.
        """
        parts = min(torch.get_num_threads(), 1 + weights // _GRAIN)
        step = Step(_KINDS[type(call)], parts, ctypes.addressof(call))
        address = ctypes.byref(step)
        size = self._workspace(address)
        seen = self._scratch.seen
        memory = self._scratch.of(size) if seen is None else torch.empty(size, dtype=torch.uint8, device="cpu")
        call.workspace = memory.data_ptr()
        self._run(address, 1)
        if seen is not None:
            seen.append(Ran.of(call, parts, [*tensors, memory]))

    def again(self, row: Sequence[Ran], *, apart: bool = True) -> Callable[[], None]:
        """Return a call that runs these again, one after the other, to the same bits.

        Whoever holds it keeps their memory alive.

        Args:
            row: What to run.
            apart: On threads of the library's own, which do not spin for long where cores are taken; if torch computes
                in parallel before or after, its own threads are the better ones, as both would fight for cores.
        """
        steps = (Step * len(row))(*(ran.step for ran in row))
        run = self._run_apart if apart else self._run

        def call() -> None:
            run(steps, len(row))  # the steps hold addresses alone, the row what lies there

        return call

    def in_one_workspace(self, row: Sequence[Ran]) -> list[Ran]:
        """Return calls that are run one after the other with one workspace for all of them."""
        sizes = [self._workspace(ctypes.byref(ran.step)) for ran in row]
        memory = torch.empty(max(sizes, default=0), dtype=torch.uint8, device="cpu")
        for ran in row:
            ran.call.workspace = memory.data_ptr()
        return [replace(ran, tensors=[*ran.tensors, memory]) for ran in row]

    @contextmanager
    def watched(self) -> Iterator[list[Ran]]:
        """Within the context, the calls that this thread runs are added to the list."""
        seen: list[Ran] = []
        self._scratch.seen = seen
        try:
            yield seen
        finally:
            self._scratch.seen = None


def _openmp() -> list[ctypes.c_void_p] | None:
    """Return the functions of torch's own OpenMP runtime, None where it has none that is known."""
    folder = Path(torch.__file__).parent / "lib"
    names = ("GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads")
    for file in ("libtorch_cpu.so", "libtorch_cpu.dylib"):
        try:
            # Looks up its dependencies too.
            torch_cpu = ctypes.CDLL(str(folder / file))
            return [ctypes.cast(torch_cpu[name], _Pointer) for name in names]
        except (OSError, AttributeError):
            continue
    return None


def missing() -> str | None:
    """Return why there is no library, None if it is loaded."""
    found = _load()
    return found if isinstance(found, str) else None


def library() -> Library:
    """Return the library, where it is not `missing`."""
    found = _load()
    assert isinstance(found, Library)
    return found


@cache
def _load() -> Library | str:
    # In an editable install the package has two folders: the sources, and what was built.
    files = [Path(folder, name) for folder in cpu.__path__ for name in NAMES]
    path = next((path for path in files if path.exists()), None)
    if path is None:
        return "its library was not built: that takes a C++ compiler when the package is installed"
    try:
        return Library(path)
    except OSError as error:
        return f"its library does not load: {error}"

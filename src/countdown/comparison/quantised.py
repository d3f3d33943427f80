"""Dense models in few bits, the competitor: torchao's weight-only quantisation, on each device by its quickest kernel.

The linears of the decoder's layers are quantised; head and embedding stay, as in transformers' own use of torchao and
as with sparse FFNs. torchao rounds. On CUDA devices its tensors also compute, in what the decode loop compiles. On a
CPU they would be dequantised at every call unless compiled, so the numbers go to the kernels of torch that torchao's
compiled code ends in.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from countdown.errors import UnsupportedModelError
from countdown.memory import ran_out
from countdown.sites.linear import find_linears

Linears = Mapping[str, Any]
# Weights that share a scale in int4: the smallest there is, which loses least. Larger groups cost small models much.
GROUP = 32
# What tensor cores of this compute capability and above multiply.
FP8_CAPABILITY = (8, 9)


def schemes(device: torch.device) -> list[str]:
    """Return what can be tried on a device: `int8`, `int4`, and `fp8` on GPUs that have it."""
    fp8 = device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY
    return ["int8", "int4", *(["fp8"] if fp8 else [])]


def missing() -> str | None:
    """Return why nothing can be quantised, None if it can."""
    if importlib.util.find_spec("torchao") is None:
        return "quantised models are not measured: torchao is missing (pip install 'countdown-llm[quantised]')."
    return None


def settings(scheme: str, device: torch.device) -> dict[str, Any]:
    """Return how a scheme quantises on a device, for the record; scales: of each row, or of so many weights."""
    return {"quantised": scheme, "by": "torchao", "weight_only": True, "linears": "layers", **_HOW[device.type, scheme]}


@dataclass(frozen=True)
class Quantised:
    """A quantised copy of a dense model.

    Args:
        model: The copy. All that is not quantised it shares with the dense model.
        saved: By linear, how many bytes fewer than the dense weight it reads, scales and zero points counted.
    """

    model: nn.Module
    saved: dict[str, int]


def quantise(model: nn.Module, scheme: str) -> Quantised:
    """Return a quantised copy of a dense model, which is left alone.

    Raises:
        UnsupportedModelError: The scheme, or its kernel, does not take the model's shapes, dtype or device.
    """
    device = next(model.parameters()).device
    # A copy of the modules alone.
    made = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    linears: dict[str, Any] = {site.name: site.module for site in find_linears(made)}
    dense = {name: linear.weight.nbytes for name, linear in linears.items()}
    if scheme == "int4":
        _check_rows(linears)
    try:
        stored = _MAKERS[device.type](made, linears, scheme)
    except (RuntimeError, ImportError, AssertionError, NotImplementedError) as error:
        if ran_out(error):
            raise
        raise UnsupportedModelError(f"torchao cannot compute {scheme} here: {str(error).splitlines()[0]}") from error
    return Quantised(made, {name: dense[name] - bytes_ for name, bytes_ in stored.items()})


class Int8Linear(nn.Module):
    """A linear of int8 weights with a scale a row, by torch's kernel for CPUs.

    Args:
        linear: One that torchao quantised.
    """

    def __init__(self, linear: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("levels", linear.weight.qdata.contiguous(), persistent=False)
        # The kernel takes scales in the dtype of its input.
        self.register_buffer("scales", linear.weight.scale.flatten().to(linear.weight.dtype), persistent=False)
        self.bias = linear.bias

    def product(self, x: Tensor) -> Tensor:
        """Return W x `[n, out]` for x `[n, in]`."""
        return torch.ops.aten._weight_int8pack_mm(x, self.levels, self.scales)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Return W x, plus the bias, `[..., out]`, for x `[..., in]`."""
        y = self.product(x.reshape(-1, self.in_features)).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


class Int4Linear(Int8Linear):
    """A linear of int4 weights with a scale and a zero point a group, by torch's kernel for CPUs.

    Args:
        linear: One that torchao quantised.
    """

    def __init__(self, linear: Any) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.group = linear.weight.block_size[-1]
        self.register_buffer("levels", linear.weight.qdata, persistent=False)
        self.register_buffer("scales", linear.weight.scale_and_zero, persistent=False)
        self.bias = linear.bias

    def product(self, x: Tensor) -> Tensor:
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(x, self.levels, self.group, self.scales)
        return y[:, : self.out_features]  # type: ignore[no-any-return]


def _on_cpu(model: nn.Module, linears: Linears, scheme: str) -> dict[str, int]:
    """Quantise and replace the linears of a model, and return the bytes that each reads."""
    _apply(model, linears, _cpu_config(scheme))
    packed = {name: _PACKED[scheme](linear) for name, linear in linears.items()}
    for name, module in packed.items():
        model.set_submodule(name, module)
    return {name: sum(buffer.nbytes for buffer in module.buffers()) for name, module in packed.items()}


def _on_cuda(model: nn.Module, linears: Linears, scheme: str) -> dict[str, int]:
    """Quantise the linears of a model in place, and return the bytes that each reads."""
    _apply(model, linears, _cuda_config(scheme))
    return {name: _stored(linear.weight) for name, linear in linears.items()}


def _apply(model: nn.Module, linears: Linears, config: Any) -> None:
    from torchao.quantization import quantize_

    quantize_(model, config, filter_fn=lambda _, name: name in linears)


def _cpu_config(scheme: str) -> Any:
    from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
    from torchao.quantization import Int8WeightOnlyConfig

    # Not torchao's settings of the compiler: all configurations are compiled alike.
    if scheme == "int8":
        return Int8WeightOnlyConfig(set_inductor_config=False)
    return PrototypeInt4WeightOnlyConfig(group_size=GROUP, set_inductor_config=False)


def _cuda_config(scheme: str) -> Any:
    from torchao.quantization import Float8WeightOnlyConfig, Int4WeightOnlyConfig, Int8WeightOnlyConfig
    from torchao.quantization.quantize_.workflows import Int4PackingFormat

    makers: dict[str, Callable[[], Any]] = {
        "int8": lambda: Int8WeightOnlyConfig(set_inductor_config=False),
        "fp8": lambda: Float8WeightOnlyConfig(set_inductor_config=False),
        # The packing whose kernel is torch's own.
        "int4": lambda: Int4WeightOnlyConfig(
            group_size=GROUP,
            int4_packing_format=Int4PackingFormat.TILE_PACKED_TO_4D,
            set_inductor_config=False,
        ),
    }
    return makers[scheme]()


def _check_rows(linears: Linears) -> None:
    """Raise UnsupportedModelError if some row is not made of whole groups, which torchao would leave as it is."""
    rows = {linear.in_features for linear in linears.values()}
    if any(row % GROUP for row in rows):
        raise UnsupportedModelError(
            f"int4 takes rows of a multiple of {GROUP} weights, and the model's linears have {sorted(rows)}."
        )


def _stored(weight: Tensor) -> int:
    """Return the bytes of all that a quantised tensor is made of."""
    if not hasattr(weight, "__tensor_flatten__"):
        return weight.nbytes
    parts, _ = weight.__tensor_flatten__()
    return sum(_stored(getattr(weight, part)) for part in parts)


_PACKED: dict[str, type[Int8Linear]] = {"int8": Int8Linear, "int4": Int4Linear}
_MAKERS = {"cpu": _on_cpu, "cuda": _on_cuda}
_HOW: dict[tuple[str, str], dict[str, Any]] = {
    ("cpu", "int8"): {"config": "Int8WeightOnlyConfig", "scales": "row", "kernel": "aten::_weight_int8pack_mm"},
    ("cpu", "int4"): {
        "config": "PrototypeInt4WeightOnlyConfig",
        "scales": GROUP,
        "kernel": "aten::_weight_int4pack_mm_for_cpu",
    },
    ("cuda", "int8"): {"config": "Int8WeightOnlyConfig", "scales": "row", "kernel": "compiled"},
    ("cuda", "fp8"): {"config": "Float8WeightOnlyConfig", "scales": "row", "kernel": "compiled"},
    ("cuda", "int4"): {
        "config": "Int4WeightOnlyConfig, TILE_PACKED_TO_4D",
        "scales": GROUP,
        "kernel": "aten::_weight_int4pack_mm",
    },
}

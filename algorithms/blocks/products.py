"""Matrix products on a CPU that the default library serves at half its speed.

PyTorch computes float32 products on x86 through MKL, which uses the 512-bit instructions of Intel's
processors only: on an AMD processor that has them it does 110 GFLOP/s a core where oneDNN, which
is in PyTorch as well, does 230 to 260. Wide products go through oneDNN there. The results are
float32 on both ways and differ by the order of their sums.

One product after the other, seed by seed, so that a seed's numbers do not depend on the stack.
Inside a compiled function the products are exchanged in the compiler's graph, gradients included
(`compiled`); an eager one goes this way where no gradient is asked for (`matmul`).
`HARNESS_CPU_PRODUCTS=mkl` or `onednn` overrides the choice.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.utils.flop_counter
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])
MIN_WORK = 2**20
"""Multiplications of a product from which oneDNN is worth its 10 to 15 microseconds a call."""
VARIABLE = "HARNESS_CPU_PRODUCTS"
LIBRARIES = ("mkl", "onednn")

_library = torch.library.Library("offline_rl_harness", "DEF")
_library.define("product(Tensor a, Tensor b) -> Tensor")


def _one(a: Tensor, b: Tensor) -> Tensor:
    if not (b.is_contiguous() or b.mT.is_contiguous()):
        b = b.contiguous()  # a part of a wider matrix, or an expanded row: a hundred times slower
    linear = torch.ops.mkldnn._linear_pointwise.default  # a times the transpose of its second
    product: Tensor = linear(a, b.mT, None, "none", [], "")
    return product


def _product(a: Tensor, b: Tensor) -> Tensor:
    if a.dim() == 2:
        return _one(a, b)
    if len(a) == 1:
        return _one(a[0], b[0]).unsqueeze(0)
    return torch.stack([_one(own, other) for own, other in zip(a, b, strict=True)])


_library.impl("product", _product, "CPU")


@torch.library.register_fake("offline_rl_harness::product", lib=_library)
def _shape_of_product(a: Tensor, b: Tensor) -> Tensor:
    return a.new_empty(*a.shape[:-1], b.shape[-1])


@torch.utils.flop_counter.register_flop_formula(torch.ops.offline_rl_harness.product)  # type: ignore[untyped-decorator]
def _operations(a: torch.Size, b: torch.Size, *_: Any, **__: Any) -> int:
    return 2 * math.prod(a) * b[-1]


def _exchanged(a: Tensor, b: Tensor) -> bool:
    """Whether a @ b, of matrices or of equally many of them, is one of those oneDNN computes."""
    sides = (*a.shape[-2:], b.shape[-1])
    return (
        a.device.type == "cpu"
        and a.dtype == b.dtype == torch.float32
        and all(isinstance(side, int) for side in sides)  # not symbols of a dynamic graph
        and sides[0] * sides[1] * sides[2] >= MIN_WORK
    )


@lru_cache(maxsize=1)
def library() -> str:
    """What computes wide float32 products on this CPU: `onednn` or `mkl` (PyTorch's default).

    Raises:
        ValueError: if `HARNESS_CPU_PRODUCTS` is neither, or oneDNN is asked for and absent.
    """
    wanted = os.environ.get(VARIABLE, "")
    present = torch.backends.mkldnn.is_available()
    if wanted not in ("", *LIBRARIES):
        raise ValueError(f"{VARIABLE} is {wanted!r}; expected {' or '.join(LIBRARIES)}, or unset")
    if wanted == "onednn" and not present:
        raise ValueError(f"{VARIABLE} is onednn, and this PyTorch has no oneDNN; unset it")
    if wanted:
        return wanted
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return "onednn" if present and wide and _vendor() not in ("", "GenuineIntel") else "mkl"


def _vendor() -> str:
    """The processor's maker as Linux names it; "" where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("vendor_id")]
    return named[0] if named else ""


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """torch.matmul(a, b) of tensors [*lead, rows, in] and [*lead, in, out] whose leads broadcast.

    By oneDNN where `library()` says so, the product is wide, and no gradient and no graph is being
    taken: `torch.func` has no way to give an operator of Python a gradient, and what is exported
    must not need one.
    """
    if (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or type(a) is not Tensor  # of a tracer
        or not _exchanged(a, b)
        or library() != "onednn"
    ):
        return torch.matmul(a, b)
    lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (x.expand(*lead, *x.shape[-2:]).reshape(-1, *x.shape[-2:]) for x in (a, b))
    product: Tensor = torch.ops.offline_rl_harness.product(a, b)
    return product.view(*lead, *product.shape[-2:])


def _exchange(graph: torch.fx.Graph) -> None:
    """Exchanges the wide float32 products of a compiler's graph."""
    aten = torch.ops.aten
    for node in graph.nodes:
        if node.target not in (aten.mm.default, aten.bmm.default):
            continue
        if _exchanged(*(operand.meta["val"] for operand in node.args)):
            node.target = torch.ops.offline_rl_harness.product.default


@lru_cache(maxsize=1)
def _compiler_options() -> dict[str, Any]:
    # The compiler takes longer to import than PyTorch itself: only where something is compiled.
    from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

    class Exchange(CustomGraphPass):
        def __call__(self, graph: torch.fx.Graph) -> None:
            _exchange(graph)

        def uuid(self) -> Any:
            return get_hash_for_files((__file__,))

    return {"post_grad_custom_post_pass": Exchange()}


def compiled(function: F, **settings: Any) -> F:
    """torch.compile(function, **settings), with the products of `library()`."""
    options = _compiler_options() if library() == "onednn" else None
    return torch.compile(function, options=options, **settings)  # type: ignore[return-value]

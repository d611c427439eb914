"""A CUDA device that is not there: tensors on it have no data, those on the host do, and every call is watched.

PyTorch's fake tensors take the device `cuda` on any machine, but a build without CUDA lacks three things: a guard of
the device, which autograd asks for (that of `meta`, which does nothing, stands in), autocast, and the choice among the
kernels of attention and RMSNorm (those that an H200 ran are named here). Its engine must take the tensors for those of
a CPU, because it would ask for their streams. `meta` tensors alone would not do: they have no autocast, and code that
asks for the kind of device takes other paths.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NoReturn, Protocol
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary
from transformers import PreTrainedModel, masking_utils

from gakernels.errors import BackendError
from gakernels.ops import gpus
from gakernels.ops.gpus import Gpu

aten = torch.ops.aten
GUARDS = "_ZN3c104impl26device_guard_impl_registryE"  # of C++: one pointer for each kind of device
CUDA, META = 1, 14  # their places in it
ONLY_IN_CUDA = ("_fused_rms_norm", "silu_backward")  # operators that a build without CUDA takes apart
WRAPPERS = ("torch/_compile.py", "torch/_dynamo/eval_frame.py")  # between an operator and a mode
FREE_COPY = 64 * 1024  # bytes that the driver copies from pageable memory without waiting, if it is not to wait


class Watcher(Protocol):
    """What is told of the calls on the device."""

    def called(self, gpu: "FakeGpu", operator: Any, arguments: tuple[Any, ...], options: Any, result: Any) -> None:
        """An operator ran."""

    def waits(self, reason: str) -> None:
        """The host waits for the device."""


class FakeGpu(TorchDispatchMode):
    """Runs operators on the device that is not there, and others as ever.

    What the host reads from the device is made up: true and ones for single values, zeros for tensors.

    Attributes:
        in_engine: how many calls of autograd's engine are under way.
    """

    def __init__(self, watcher: Watcher) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._watcher, self._pinned, self.in_engine = watcher, WeakIdKeyDictionary(), 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.prim.device.default:
            return torch.device("cpu") if self.in_engine and _asked_by_engine() else args[0].fake_device
        if _is_present(kwargs.get("device")) or (self.in_engine and "device" in kwargs and _asked_by_engine()):
            kwargs = {**kwargs, "device": torch.device("cuda", 0)}
        if not _on_device(args, kwargs):
            return self._on_host(func, args, kwargs)
        if _is_composite(func):
            with self:  # within a call, where autograd has not taken it apart
                return func.decompose(*args, **kwargs)
        if func in (aten._to_copy.default, aten.copy_.default):
            return self._copied(func, args, kwargs)
        result = self._read(func, args, kwargs)
        self._watcher.called(self, func, args, kwargs, result)
        return result

    @contextmanager
    def watched_by(self, watcher: Watcher) -> Iterator[None]:
        """Tell another watcher while the block runs, from within a call."""
        before, self._watcher = self._watcher, watcher
        try:
            with self:
                yield
        finally:
            self._watcher = before

    def _on_host(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if func is aten.is_pinned.default:
            return args[0] in self._pinned
        with unset_fake_temporarily():
            if func is aten._pin_memory.default:
                pinned = args[0].clone()
                self._pinned[pinned] = None
                return pinned
            return func(*args, **kwargs)

    def _copied(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A copy from, to or on the device."""
        to_copy = func is aten._to_copy.default
        source = args[0] if to_copy else args[1]
        there = torch.device(kwargs.get("device") or source.device) if to_copy else args[0].device
        if source.device.type == there.type:
            result = func(*args, **kwargs)
            self._watcher.called(self, func, args, kwargs, result)
            return result
        patient = not (kwargs.get("non_blocking") if to_copy else args[2:3] == (True,))
        if there.type == "cpu":
            self._watcher.waits("copy to the host")
            with unset_fake_temporarily():
                dtype = kwargs.get("dtype") or source.dtype
                return torch.zeros(source.shape, dtype=dtype) if to_copy else args[0].zero_()
        if patient or (source not in self._pinned and source.nbytes > FREE_COPY):
            self._watcher.waits(f"copy from {'pinned' if source in self._pinned else 'pageable'} memory")
        return (
            torch.empty(source.shape, device=there, dtype=kwargs.get("dtype") or source.dtype) if to_copy else args[0]
        )

    def _read(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result of an operator. Where it or its shape depends on data, the host waits for them."""
        name = func.overloadpacket.__name__
        if torch.Tag.data_dependent_output in func.tags:
            self._watcher.waits(name)
            return 1.0 if func is aten._local_scalar_dense.default and args[0].is_floating_point() else True
        if name.lstrip("_").startswith("index") and "select" not in name:
            return self._indexed(func, args, kwargs)
        if torch.Tag.dynamic_output_shape in func.tags:
            self._watcher.waits(name)
            shape = (args[0].numel(), args[0].dim()) if name == "nonzero" else (args[0].numel(),)
            return args[0].new_empty(shape, dtype=torch.int64 if name == "nonzero" else None)
        return func(*args, **kwargs)

    def _indexed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Reading or writing at indices: those on the host are copied, and a mask is counted first."""
        indices = _tensors(args[1])
        masks = [one for one in indices if one.dtype == torch.bool]
        if masks:
            self._watcher.waits("mask as index")
        elif any(one.device.type == "cpu" for one in indices):
            self._watcher.waits("copy from pageable memory")
        if not masks or func is not aten.index.Tensor:
            return func(*args, **kwargs)
        place, (mask,) = args[1].index(masks[0]), masks
        with unset_fake_temporarily():
            count = mask.numel() if isinstance(mask, FakeTensor) else int(mask.sum())
        return args[0].new_empty(*args[0].shape[:place], count, *args[0].shape[place + mask.dim() :])


def _is_present(device: Any) -> bool:
    """Whether it is the present device by the word of the guard, which is that of `meta`."""
    return device is not None and torch.device(device).type == "meta"


def _asked_by_engine() -> bool:
    """Whether a call comes from autograd's engine itself, not from a backward in Python.

    The engine takes the tensors for those of a CPU, and makes others like them.
    """
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_code.co_filename.endswith(WRAPPERS):
        frame = frame.f_back
    return frame.f_code.co_name == "_engine_run_backward"


def _is_composite(func: Any) -> bool:
    """Whether an operator has no kernel of its own on a GPU."""
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    return composite and func.overloadpacket.__name__ not in ONLY_IN_CUDA


def _on_device(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    device = kwargs.get("device")
    if device is not None and torch.device(device).type == "cuda":
        return True
    return any(isinstance(tensor, FakeTensor) for tensor in _tensors(args, kwargs))


def _tensors(*arguments: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)]


@contextmanager
def fake_gpu(watcher: Watcher, gpu: Gpu) -> Iterator[FakeGpu]:
    """A GPU of a kind, whether there is one or not, while the block runs.

    Raises:
        BackendError: this PyTorch was built for CUDA, but there is no GPU; a build for CPUs can pretend.
    """
    if torch.backends.cuda.is_built() and not torch.cuda.is_available():
        raise BackendError("a PyTorch for CUDA can't pretend to have a GPU: use a build for CPUs, or a GPU")
    mode = FakeGpu(watcher)
    with ExitStack() as stack:
        stack.enter_context(gpus.pretend(gpu))
        stack.enter_context(_guarded())
        stack.enter_context(_kernels_named())
        for module, name, stand_in in _stand_ins(mode):
            stack.enter_context(patch.object(module, name, stand_in))
        stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(mode)


@contextmanager
def _guarded() -> Iterator[None]:
    """A guard for the device type, where the build has none."""
    library = Path(torch.__file__).parent / "lib" / "libc10.so"
    guards = (ctypes.c_void_p * (META + 1)).in_dll(ctypes.CDLL(str(library)), GUARDS)
    before = guards[CUDA]
    guards[CUDA] = before or guards[META]
    try:
        yield
    finally:
        guards[CUDA] = before


@contextmanager
def _kernels_named() -> Iterator[None]:
    """Name the kernels that only a build for CUDA has, so that autograd does not take their operators apart."""
    if torch.backends.cuda.is_built():
        yield
        return
    library = torch.library.Library("aten", "IMPL")
    for name in ONLY_IN_CUDA:
        library.impl(name, _not_there, "CUDA")
    try:
        yield
    finally:
        library._destroy()


def _not_there(*_: Any) -> NoReturn:
    raise NotImplementedError("there is no GPU")


def _stand_ins(mode: FakeGpu) -> Iterator[tuple[Any, str, Any]]:
    run_engine = torch.autograd.graph._engine_run_backward

    def engine(*args: Any, **kwargs: Any) -> Any:
        mode.in_engine += 1
        try:
            return run_engine(*args, **kwargs)
        finally:
            mode.in_engine -= 1

    yield torch.autograd, "_engine_run_backward", engine
    yield torch.autograd.graph, "_engine_run_backward", engine
    yield torch.cuda.amp.common, "amp_definitely_not_available", lambda: False
    yield torch.cuda, "is_bf16_supported", lambda *_: True
    yield masking_utils, "is_tracing", lambda *_: False  # transformers takes other paths for fake tensors
    yield PreTrainedModel, "to", lambda model, *_: model  # fake parameters can't be exchanged; they are there already
    yield FakeTensor, "data_ptr", lambda _: 0
    yield _foreach_utils, "_foreach_supported_types", [*_foreach_utils._foreach_supported_types, FakeTensor]
    yield F, "scaled_dot_product_attention", _attention
    yield F, "rms_norm", _rms_norm


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """By cuDNN in 16 bits, as an H200 runs it; else by the memory-efficient kernel, which has no grouped heads."""
    gradient = torch.is_grad_enabled() and query.requires_grad
    if query.dtype in (torch.bfloat16, torch.float16):
        cudnn = aten._scaled_dot_product_cudnn_attention
        attended: Tensor = cudnn(query, key, value, attn_mask, gradient, dropout_p, is_causal, scale=scale)[0]
        return attended
    groups = query.shape[1] // key.shape[1]
    key, value = (one if groups == 1 else one.repeat_interleave(groups, 1) for one in (key, value))
    efficient = aten._scaled_dot_product_efficient_attention
    attended = efficient(query, key, value, attn_mask, gradient, dropout_p, is_causal, scale=scale)[0]
    return attended


def _rms_norm(x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """As one kernel."""
    y: Tensor = aten._fused_rms_norm(x, list(shape), weight, eps)[0]
    return y

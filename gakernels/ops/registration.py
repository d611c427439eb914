"""Custom operators of PyTorch for the forwards and backwards of the operations."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode

from gakernels.ops.dispatch import module, needs_backward

Autograd = Callable[..., tuple[Tensor | None, ...]]
_PLAIN = (Tensor, nn.Parameter)


def operator(
    operation: str, part: str = "forward", convert: Callable[..., Sequence[Any]] | None = None
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Turn a fake (a function that returns empty tensors of the right shapes and dtypes) into a custom operator.

    The operator has the signature of the fake, whose last argument names the implementation. It calls the
    implementation's `forward` or `backward` with the other arguments, and is opaque to tracing. A named tuple among the
    results is flattened; None becomes an empty tensor in the dtype of the first argument. A call that nothing observes
    goes straight to the implementation, because PyTorch's dispatcher takes longer than a small product.

    Args:
        operation: the operator is `gakernels::operation`, or `gakernels::operation_backward`.
        part: `forward` or `backward`.
        convert: turns the arguments into the implementation's, if a schema can't describe these.
    """

    def register(fake: Callable[..., Any]) -> Callable[..., Any]:
        name = operation if part == "forward" else f"{operation}_{part}"

        def run(*arguments: Any) -> tuple[Tensor, ...] | Tensor:
            *given, backend = arguments
            function = getattr(module(operation, backend), part)
            return _tensors(function(*(given if convert is None else convert(*given))), given[0])

        schema = torch.library.infer_schema(fake, mutates_args=())
        torch.library.define(f"gakernels::{name}", schema, tags=torch.Tag.pt2_compliant_tag)
        torch.library.impl(f"gakernels::{name}", "CompositeExplicitAutograd")(run)
        torch.library.register_fake(f"gakernels::{name}")(fake)
        made = getattr(torch.ops.gakernels, name).default

        def call(*arguments: Any) -> Any:
            if not torch.compiler.is_compiling() and _is_unobserved(arguments):
                return run(*arguments)
            return made(*arguments)

        return call

    return register


def _is_unobserved(arguments: tuple[Any, ...]) -> bool:
    """Whether a call is the same to everybody without the operator: no gradient, tracing, transform, mode or profiler,
    and plain tensors with data."""
    return (
        _get_current_dispatch_mode() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not torch._C._autograd._profiler_enabled()
        and not needs_backward(arguments)
        and all(type(one) in _PLAIN and not one.is_meta for one in arguments if isinstance(one, Tensor))
    )


def differentiate(operation: str, backward: Autograd, setup_context: Callable[..., None]) -> None:
    """Register the gradient of an operation's forward operator; its backward operator has none."""
    torch.library.register_autograd(f"gakernels::{operation}", backward, setup_context=setup_context)

    def refuse(*_: Any) -> tuple[Tensor | None, ...]:
        raise RuntimeError(
            f"{operation} has no second derivative with this backend; GAKERNELS_BACKEND=reference has one"
        )

    torch.library.register_autograd(f"gakernels::{operation}_backward", refuse)


def _tensors(results: Any, like: Tensor) -> tuple[Tensor, ...] | Tensor:
    if isinstance(results, Tensor):
        return results
    flat: list[Tensor] = []
    for result in results:
        flat += [like.new_empty(0) if result is None else result] if not isinstance(result, tuple) else result
    return tuple(flat)

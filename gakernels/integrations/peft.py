"""The LoRA linear layers of a PEFT model on `gakernels.ops.lowrank_linear`: one call switches to it, another one back.

Needs peft, which `import gakernels` does not. docs/lowrank_linear.md has the rule for what runs on the operation.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora import Linear, LoraLayer
from torch import nn

from gakernels.errors import InputError
from gakernels.integrations.lora_linear import LowRankLoraLinear, adapter_reason, dropout_reason, layer_reason

__all__ = ["LowRankLoraLinear", "Report", "restore", "use_lowrank_linear"]


@dataclass(frozen=True)
class Report:
    """Which LoRA layers of a model run on `lowrank_linear`. The names are those of `model.named_modules()`.

    Attributes:
        changed: the layers that run on the operation.
        except_when: those of them that keep PEFT's own forward in some cases, with the cases.
        left: the layers that keep PEFT's own forward, with the reasons.
    """

    changed: tuple[str, ...]
    except_when: Mapping[str, str]
    left: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"LoRA layers on lowrank_linear: {len(self.changed)}"]
        lines += _by_reason("of these on PEFT's own forward", self.except_when)
        lines += _by_reason("left on PEFT's own forward", self.left)
        return "\n".join(lines)


def use_lowrank_linear(model: nn.Module) -> Report:
    """Let the LoRA linear layers of a model run on `gakernels.ops.lowrank_linear`, wherever that gives the same result.

    Each such layer changes its class from `peft.tuners.lora.Linear` to `LowRankLoraLinear`; no parameter, buffer, name
    or hook is touched. Calling it again, for instance after adapters were added, updates the choice.

    Args:
        model: a `PeftModel`, or any model with LoRA layers of peft in it. Changed in place.

    Returns:
        What was changed and what was not, with reasons.

    Raises:
        InputError: the model has no LoRA layer, or none that can run on the operation.
    """
    layers: dict[str, Any] = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    if not layers:
        raise InputError("model must have LoRA layers of peft, but it has none")
    changed, except_when, left = [], {}, {}
    for name, layer in layers.items():
        reason, exceptions = _judge(layer)
        if reason is not None:
            left[name] = reason
            _restore(layer)
            continue
        layer.__class__ = LowRankLoraLinear
        changed.append(name)
        if exceptions:
            except_when[name] = "; ".join(exceptions)
    report = Report(tuple(changed), except_when, left)
    if not changed:
        raise InputError(f"model must have a LoRA layer that can run on lowrank_linear, but:\n{report}")
    return report


def restore(model: nn.Module) -> None:
    """Undo `use_lowrank_linear`: all LoRA layers of the model run PEFT's own forward again."""
    for module in model.modules():
        _restore(module)


def _restore(module: nn.Module) -> None:
    if type(module) is LowRankLoraLinear:
        module.__class__ = Linear  # type: ignore[assignment]


def _judge(layer: Any) -> tuple[str | None, list[str]]:
    """Why a layer must be left as it is, or None and the cases in which it runs PEFT's own forward."""
    reason = layer_reason(layer)
    if reason is not None:
        return reason, []
    reasons = [adapter_reason(layer, adapter) for adapter in layer.lora_A]
    exceptions = [why or dropout_reason(layer, name) for name, why in zip(layer.lora_A, reasons, strict=True)]
    described = [why for why in exceptions if why is not None]
    if all(reasons):
        return "; ".join(described) or "it has no adapter", []
    return None, described


def _by_reason(what: str, names: Mapping[str, str]) -> list[str]:
    """A line for each reason, with the number of layers and the name of the first."""
    groups: dict[str, list[str]] = {}
    for name, reason in names.items():
        groups.setdefault(reason, []).append(name)
    return [f"{what} ({reason}): {len(group)}, first {group[0]}" for reason, group in groups.items()]

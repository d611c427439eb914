"""Copies of a model, pickled or not, work on their own: adapters, streams, gradients, averages, other processes."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import accelerate
import pytest
import torch
import torch.multiprocessing
from tiny import logits_of, make_model, make_trained, random_context, random_ids, same_adapters
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import AutoModelForCausalLM

from gakernels import Adapter, GenerativeAdapter, InputError
from gakernels.model.compilation import compile_layers, uncompile_layers
from gakernels.model.quantized_base import quantize_base


def pickled(model: GenerativeAdapter) -> GenerativeAdapter:
    """By torch.save, since pickle alone does not know the numbers of an FP8 base."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def base_alone(model: GenerativeAdapter) -> GenerativeAdapter:
    """A copy of the base alone brings its generators along."""
    base = copy.deepcopy(model.base)
    (hook,) = base.model.layers[0]._forward_pre_hooks.values()
    assert hook._model.base is base
    return hook._model


COPIES = [copy.deepcopy, pickled, base_alone]


def losses_and_gradients(model: GenerativeAdapter, ids: Tensor) -> list[Tensor]:
    hidden, _ = model(ids, torch.ones_like(ids, dtype=torch.bool), 2, (0, 1, 1, 2))
    loss = hidden.square().mean()
    return [loss.detach(), *torch.autograd.grad(loss, list(model.generators.parameters()))]


@pytest.mark.parametrize("make", COPIES)
@pytest.mark.parametrize("kind", ["plain", "fp8", "overlapped"])
def test_a_copy_does_what_the_model_does_and_leaves_it_alone(
    make: Callable[[GenerativeAdapter], GenerativeAdapter], kind: str
) -> None:
    model, ids, context = make_model(), random_ids(1, 4, 5), random_context(20)
    if kind == "fp8":
        base = quantize_base(model.detach(), "fp8")
        model = make_trained(GenerativeAdapter(base, model.config))
    if kind == "overlapped":
        model.overlap_generators()
    wanted, adapter = losses_and_gradients(model, ids), model.adapt(context)
    plain = logits_of(model.base, ids[0])
    with model.adapted(adapter):  # also where one is in use
        twin = make(model)
    assert same_adapters(twin.stream().append(context).adapter(), adapter)
    assert all(torch.equal(a, b) for a, b in zip(losses_and_gradients(twin, ids), wanted, strict=True))
    assert torch.equal(logits_of(twin.base, ids[0]), plain)
    with twin.adapted(adapter):
        assert torch.equal(logits_of(model.base, ids[0]), plain)
        assert not torch.equal(logits_of(twin.base, ids[0]), plain)
    mine = {tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    assert not mine & {tensor.data_ptr() for tensor in [*twin.parameters(), *twin.buffers()]}
    with torch.no_grad():
        for parameter in twin.generators.parameters():
            parameter.add_(1)
    assert same_adapters(model.adapt(context), adapter)
    assert twin.adapt(context).generator_fingerprint != adapter.generator_fingerprint


def test_pickle_alone_will_do() -> None:
    model, context = make_model(), random_context(20)
    assert same_adapters(pickle.loads(pickle.dumps(model)).adapt(context), model.adapt(context))


def test_a_copy_can_be_merged_and_detached() -> None:
    model, ids = make_model(), random_ids(2, 6)
    adapter = model.adapt(random_context(9))
    with model.adapted(adapter):
        twin = copy.deepcopy(model)
        wanted = logits_of(model.base, ids)
        twin.merge(adapter)  # only the original is in use
    torch.testing.assert_close(logits_of(twin.base, ids), wanted, rtol=1e-4, atol=1e-4)
    again = copy.deepcopy(twin)
    again.unmerge()
    assert torch.equal(logits_of(again.detach(), ids), logits_of(model.base, ids))
    torch.testing.assert_close(logits_of(twin.base, ids), wanted, rtol=1e-4, atol=1e-4)


def test_a_stream_can_be_copied_and_pickled() -> None:
    model, context = make_model(), random_context(30)
    stream = model.stream().append(context[:20])
    for twin in (copy.deepcopy(stream), pickle.loads(pickle.dumps(stream))):
        assert same_adapters(twin.append(context[20:]).adapter(), copy.copy(stream).append(context[20:]).adapter())
    assert stream.tokens_seen == 20


def test_compiled_layers_are_not_copied_in_silence() -> None:
    """Their compiled forward belongs to the original: a copy would compute with its weights."""
    model = make_model()
    compile_layers(model.base, backend="aot_eager")
    for make in (copy.deepcopy, pickle.dumps):
        with pytest.raises(InputError, match="compiled layer can't be copied or pickled; call uncompile_layers"):
            make(model)
    uncompile_layers(model.base)
    assert copy.deepcopy(model).adapted_names


@pytest.mark.parametrize("average", ["mean", "ema"])
def test_an_averaged_model_is_a_model(average: str) -> None:
    model, context = make_model(), random_context(20)
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5) if average == "ema" else None)
    averaged.update_parameters(model)
    before = [parameter.clone() for parameter in model.generators.parameters()]
    with torch.no_grad():
        for parameter in model.generators.parameters():
            parameter.add_(torch.randn_like(parameter))
    averaged.update_parameters(model)
    now = list(model.generators.parameters())
    for mean, old, new in zip(averaged.module.generators.parameters(), before, now, strict=True):
        torch.testing.assert_close(mean, (old + new) / 2)
    adapter = averaged.module.adapt(context)
    assert adapter.generator_fingerprint != model.adapt(context).generator_fingerprint
    ids = random_ids(1, 4, 5)
    hidden, _ = averaged(ids, torch.ones_like(ids, dtype=torch.bool), 2, (0, 1, 1, 2))
    assert hidden.requires_grad


def test_prepared_by_accelerate_it_trains() -> None:
    model, ids = make_model(), random_ids(1, 4, 5)
    wanted = losses_and_gradients(model, ids)
    optimizer = torch.optim.SGD(model.generators.parameters(), lr=0.1)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    hidden, _ = prepared(ids, torch.ones_like(ids, dtype=torch.bool), 2, (0, 1, 1, 2))
    accelerator.backward(hidden.square().mean())
    found = [parameter.grad for parameter in model.generators.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(found, wanted[1:], strict=True))
    before = model.generator_fingerprint()
    optimizer.step()
    assert model.generator_fingerprint() != before


def test_state_dicts_and_moves() -> None:
    model, context = make_model(), random_context(20)
    adapter, state = model.adapt(context), {name: value.clone() for name, value in model.state_dict().items()}
    other = GenerativeAdapter(AutoModelForCausalLM.from_config(model.base.config).eval(), model.config)
    other.load_state_dict(state)  # by the same names
    assert all(torch.equal(other.adapt(context).lora_b[name], adapter.lora_b[name]) for name in adapter.lora_b)
    wide = copy.deepcopy(model).to(torch.float64).adapt(context)
    for name in adapter.lora_b:
        torch.testing.assert_close(wide.lora_b[name], adapter.lora_b[name].double(), rtol=1e-3, atol=1e-4)


def _adapter_elsewhere(model: GenerativeAdapter, context: list[int], path: Path) -> None:
    torch.set_num_threads(1)
    model.adapt(context).save(path)


@pytest.mark.slow
def test_another_process_gets_the_model(tmp_path: Path) -> None:
    model, context = make_model(), random_context(20)
    processes = torch.multiprocessing.get_context("spawn")
    process = processes.Process(target=_adapter_elsewhere, args=(model, context, tmp_path / "adapter"))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    found, wanted = Adapter.load(tmp_path / "adapter"), model.adapt(context)
    assert all(torch.equal(found.lora_b[name], wanted.lora_b[name]) for name in wanted.lora_b)

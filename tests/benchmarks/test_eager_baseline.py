"""The eager baseline computes what the released code does: against the library, torch.svd_lowrank and a slow oracle."""

import pytest
import torch
from torch import Generator, Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from benchmarks import eager_baseline
from benchmarks.eager_baseline import EagerBaseline, merge_states, randomized_svd_norm, window_states
from benchmarks.presets import PRESETS, check_preset, make_batch, make_model
from gakernels import GenerativeAdapter
from gakernels.model.window_losses import WindowBatch, window_losses

CPU = torch.device("cpu")
SMALL = check_preset(PRESETS["tiny"])


@pytest.fixture
def model(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> GenerativeAdapter:
    """Float64 throughout, with the sketch on the side of the released code and no damping."""

    def double_norm(self: LlamaRMSNorm, hidden: Tensor) -> Tensor:
        return nn.functional.rms_norm(hidden, self.weight.shape, self.weight, self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", double_norm)  # transformers' own rounds to float32
    model = make_model(SMALL, CPU, generator.initial_seed() % 2**31)
    with torch.no_grad():
        for name in model.adapted_names:
            module = model.generator(name)
            module.sketch_side, module.damping = "output", 0.0
            module.norm_weight.uniform_(0.5, 1.5, generator=generator)
            module.output_map.normal_(std=0.3, generator=generator)
    return model


@pytest.fixture
def batch(generator: Generator) -> WindowBatch:
    return make_batch(SMALL, generator.initial_seed() % 2**31)


def baseline_of(model: GenerativeAdapter, **options: bool) -> EagerBaseline:
    generators = {name: model.generator(name) for name in model.adapted_names}
    return EagerBaseline(model.base, generators, model.config.adapter_scale, **{"guard": False, **options})


def gradients(model: GenerativeAdapter, loss: Tensor) -> dict[str, Tensor]:
    named = dict(model.generators.named_parameters())
    return dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))


def baseline_loss(model: GenerativeAdapter, batch: WindowBatch, **options: bool) -> Tensor:
    return baseline_of(model, **options)(batch.input_ids, batch.mask, batch.seen)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_loss_and_gradients_equal_the_librarys(
    model: GenerativeAdapter, batch: WindowBatch, checkpointing: bool
) -> None:
    theirs = baseline_loss(model, batch, checkpointing=checkpointing)
    ours = window_losses(model, batch)["next_token"].mean
    assert theirs.item() == pytest.approx(ours.item(), rel=1e-6)
    wanted = gradients(model, ours)
    for name, gradient in gradients(model, theirs).items():
        assert gradient.norm() > 0, name
        assert (gradient - wanted[name]).norm() <= 1e-6 * wanted[name].norm(), name


def test_the_comparison_would_see_the_wrong_side_of_the_sketch(model: GenerativeAdapter, batch: WindowBatch) -> None:
    theirs = gradients(model, baseline_loss(model, batch))
    for name in model.adapted_names:
        model.generator(name).sketch_side = "input"
    ours = gradients(model, window_losses(model, batch)["next_token"].mean)
    assert all((ours[name] - theirs[name]).norm() > 0.05 * ours[name].norm() for name in ours)


def test_the_adapters_matter_and_the_base_is_left_as_it_was(model: GenerativeAdapter, batch: WindowBatch) -> None:
    before = model.base(input_ids=batch.input_ids[0]).logits
    adapted = baseline_loss(model, batch)
    after = model.base(input_ids=batch.input_ids[0]).logits
    assert torch.equal(before, after)
    labels = batch.input_ids[0][:, 1:]
    plain = nn.functional.cross_entropy(before[:, :-1].flatten(0, 1), labels.flatten())
    # The mean loss may move little by chance; without adapters it would differ by rounding alone, under 1e-12.
    assert adapted.item() != pytest.approx(plain.item(), rel=1e-9)
    assert all(parameter.grad is None for parameter in model.base.parameters())


def test_the_norm_is_svd_lowrank_with_the_sketch(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = torch.randn(3, 12, 12, generator=generator, dtype=torch.float64)
    sketch = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    upstream = torch.randn(3, 12, 12, generator=generator, dtype=torch.float64)

    def norm_and_gradient(norm: object) -> tuple[Tensor, Tensor]:
        leaf = matrices.clone().requires_grad_()
        value = norm(leaf)
        return value, torch.autograd.grad(value, leaf, upstream)[0]

    def lowrank(leaf: Tensor) -> Tensor:
        u, _, v = torch.svd_lowrank(leaf, q=4, niter=2)
        return u @ v.mT

    ours = norm_and_gradient(lambda leaf: randomized_svd_norm(leaf, sketch, 2, guard=False))
    monkeypatch.setattr(torch, "randn", lambda *_, **__: sketch)  # what svd_lowrank draws
    for value, wanted in zip(ours, norm_and_gradient(lowrank), strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-8, atol=1e-8)


def test_the_guard_drops_a_matrix_with_equal_singular_values(generator: Generator) -> None:
    # In float64: rounding in float32 may separate the values of an identity by more than the guard's 1e-7.
    sketch = torch.randn(8, 3, generator=generator, dtype=torch.float64)
    random = torch.randn(8, 8, generator=generator, dtype=torch.float64)
    matrices = torch.stack([torch.eye(8, dtype=torch.float64), random])
    guarded = randomized_svd_norm(matrices, sketch, 1, guard=True)
    assert (guarded[0] == 0).all()
    assert torch.equal(guarded[1], randomized_svd_norm(matrices, sketch, 1, guard=False)[1])
    assert torch.linalg.matrix_norm(guarded[1], ord=2).item() == pytest.approx(1, rel=1e-4)


def test_merged_states_are_sums_over_what_each_window_sees(generator: Generator) -> None:
    states = torch.randn(2, 4, 3, 3, generator=generator)
    merged = merge_states(states, (0, 1, 3, 2))
    for window, count in enumerate((0, 1, 3, 2)):
        torch.testing.assert_close(merged[:, window], states[:, :count].sum(1))


def test_a_window_state_is_the_transpose_of_the_librarys_without_padded_tokens(
    model: GenerativeAdapter, generator: Generator
) -> None:
    module = model.generator(model.adapted_names[0])
    hidden = torch.randn(1, 1, 6, SMALL.hidden, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[[True, True, True, True, False, False]]])
    torch.testing.assert_close(window_states(module, hidden, mask), module.states(hidden[:, :, :4]).mT)


def test_the_state_of_every_window_is_formed_and_checkpointing_forms_it_twice(
    model: GenerativeAdapter, batch: WindowBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    formed = []

    def spy(*arguments: object) -> Tensor:
        states = window_states(*arguments)
        formed.append(tuple(states.shape[:2]))
        return states

    monkeypatch.setattr(eager_baseline, "window_states", spy)
    for checkpointing, times in ((False, 1), (True, 2)):
        formed.clear()
        baseline_loss(model, batch, checkpointing=checkpointing).backward()
        assert formed == [(1, 2 * SMALL.chunks)] * (times * SMALL.layers)

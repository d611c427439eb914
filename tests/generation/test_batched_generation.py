"""Rows with adapters of their own in one batch, against each row alone and against transformers' own decoding."""

import warnings
from collections.abc import Callable

import pytest
import torch
from demo_users import User
from tiny import make_model, random_context
from torch import Tensor

from gakernels import CompactAdapter, FormatError, GenerativeAdapter, InputError
from gakernels.generation import DecodingBatch, Sampling, generate

FAMILIES = ["llama", "mistral", "qwen2", "gemma2", "gpt_neox", "granite"]


def plain_logits(model: GenerativeAdapter, prompt: list[int], adapter: CompactAdapter | None, steps: int) -> Tensor:
    """Greedy decoding by a whole forward pass per token with the expanded adapter: logits (steps, vocabulary)."""
    ids, logits = torch.tensor([prompt]), []
    with torch.no_grad(), model.adapted(model.expand(adapter)) if adapter else model.using({}):
        for _ in range(steps):
            logits.append(model.base(input_ids=ids, use_cache=False).logits[:, -1])
            ids = torch.cat([ids, logits[-1].argmax(-1, keepdim=True)], 1)
    return torch.cat(logits)


def decode(batch: DecodingBatch, logits: Tensor, steps: int) -> Tensor:
    """Greedy decoding of all rows from the logits behind their prompts: (rows, steps, vocabulary)."""
    found = [logits]
    for _ in range(steps - 1):
        found.append(batch.advance(found[-1].argmax(-1).tolist()))
    return torch.stack(found, 1)


def compact_adapters(model: GenerativeAdapter, count: int) -> list[CompactAdapter]:
    return [model.stream().append(random_context(10 + 3 * number)).compact() for number in range(count)]


def test_64_users_in_one_batch_agree_with_each_alone(
    demo: GenerativeAdapter, make_users: Callable[[int], list[User]]
) -> None:
    users, steps = make_users(64), 6
    prompts = [list(demo.tokenizer(user.question)["input_ids"]) for user in users]
    batch = DecodingBatch(demo)
    together = decode(batch, batch.exchange([], prompts, [user.adapter for user in users]), steps)
    for row, (prompt, user) in enumerate(zip(prompts, users, strict=True)):
        tokens = together[row].argmax(-1)
        with torch.no_grad(), demo.adapted(demo.expand(user.adapter)):
            ids = torch.tensor([prompt + tokens[:-1].tolist()])
            alone = demo.base(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :]
        assert (together[row] - alone).abs().max() < 1e-4
        assert torch.equal(tokens, alone.argmax(-1))  # each is the greedy one behind those before it
    texts = [generation.text for generation in generate(demo, prompts, [user.adapter for user in users])]
    right = [text.split(".")[0].strip() == user.answer for text, user in zip(texts, users, strict=True)]
    assert sum(right) >= 0.9 * len(users)  # 99.9% are, on average: every row has its own adapter, not another's


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_that_come_and_go_agree_with_each_alone(family: str) -> None:
    model, steps = make_model(family, scale=2.0), 14
    prompts = [random_context(length) for length in (7, 1, 12, 4)]
    adapters: list[CompactAdapter | None] = [*compact_adapters(model, 3), None]
    expected = [plain_logits(model, *row, steps) for row in zip(prompts, adapters, strict=True)]
    batch = DecodingBatch(model)

    def check(rows: list[int], logits: Tensor, step: list[int]) -> None:
        for place, (row, count) in enumerate(zip(rows, step, strict=True)):
            assert (logits[place] - expected[row][count]).abs().max() < 1e-4, (family, row, count)

    logits = batch.exchange([], prompts[:2], adapters[:2])
    check([0, 1], logits, [0, 0])
    for count in range(1, 4):
        logits = batch.advance(logits.argmax(-1).tolist())
        check([0, 1], logits, [count, count])
    # A longer and a shorter one join, in the middle of the others' texts.
    logits = torch.cat([logits, batch.exchange([0, 1], prompts[2:], adapters[2:])])
    check([2, 3], logits[2:], [0, 0])
    for count in range(1, 3):
        logits = batch.advance(logits.argmax(-1).tolist())
        check([0, 1, 2, 3], logits, [3 + count, 3 + count, count, count])
    # The longest leaves, the order changes, and one joins at the same time.
    logits = torch.cat([logits[[3, 0]], batch.exchange([3, 0], prompts[1:2], adapters[1:2])])
    check([1], logits[2:], [0])
    for count in range(1, 8):
        logits = batch.advance(logits.argmax(-1).tolist())
        check([3, 0, 1], logits, [2 + count, 5 + count, count])
    batch.exchange([1])
    logits = batch.advance(logits[[1]].argmax(-1).tolist())
    check([0], logits, [13])


def test_many_steps_need_more_room_than_was_set_aside() -> None:
    model, steps = make_model(scale=2.0), 90
    prompt, adapter = random_context(5), compact_adapters(model, 1)[0]
    batch = DecodingBatch(model)
    found = decode(batch, batch.exchange([], [prompt], [adapter]), steps)[0]
    assert (found - plain_logits(model, prompt, adapter, steps)).abs().max() < 1e-4


def test_a_row_without_an_adapter_is_the_base_model_whoever_is_beside_it() -> None:
    model, prompt = make_model(scale=2.0), random_context(6)
    plain = plain_logits(model, prompt, None, 1)[0]
    alone = DecodingBatch(model).exchange([], [prompt], [None])[0]
    beside = DecodingBatch(model).exchange([], [prompt, prompt], [compact_adapters(model, 1)[0], None])
    assert (alone - plain).abs().max() < 1e-5
    assert (beside[1] - plain).abs().max() < 1e-5
    assert (beside[0] - plain).abs().max() > 1e-2


def test_in_bfloat16_the_error_is_that_of_bfloat16() -> None:
    model = make_model(base_dtype=torch.bfloat16, scale=2.0)
    wide = make_model(scale=2.0)
    wide.base.load_state_dict(model.base.state_dict())
    wide.load_generator_tensors(model.generator_tensors(), "test")
    prompts = [random_context(length) for length in (3, 9)]
    stream = [wide.stream().append(random_context(20)) for _ in prompts]
    exact = [plain_logits(wide, prompt, one.compact(), 1)[0] for prompt, one in zip(prompts, stream, strict=True)]
    narrow = [model.compact_adapters(one.states(), [20], torch.bfloat16)[0] for one in stream]
    plain = [plain_logits(model, prompt, one, 1)[0] for prompt, one in zip(prompts, narrow, strict=True)]
    found = DecodingBatch(model).exchange([], prompts, narrow)
    for row, (right, other) in enumerate(zip(exact, plain, strict=True)):
        scale = right.norm()
        assert (found[row] - right).norm() / scale < 3 * (other - right).norm() / scale + 2e-2


def factor_bytes(batch: DecodingBatch) -> int:
    return sum(factor.nbytes for factor in [*batch.adapters.left.values(), *batch.adapters.right.values()])


def test_a_user_takes_the_memory_of_a_compact_adapter(
    demo: GenerativeAdapter, make_users: Callable[[int], list[User]]
) -> None:
    users, settings = make_users(5), demo.config
    compact = 2 * settings.state_size * settings.rank * len(demo.adapted_names) * 4
    assert all(user.adapter.nbytes == compact for user in users)
    stored = [tensor.untyped_storage().nbytes() for tensor in users[0].adapter.left.values()]
    assert sum(stored) * 2 == compact  # no view of something larger
    prompt = [1, 5, 9]
    batch = DecodingBatch(demo)
    batch.exchange([], [prompt] * 5, [user.adapter for user in users])
    assert factor_bytes(batch) == 5 * compact
    batch.exchange([2])
    assert factor_bytes(batch) == compact
    assert compact < 4 * demo.expand(users[0].adapter).numbers()  # it is the smaller form


def test_generate_stops_each_row_by_its_own_rule(
    demo: GenerativeAdapter, make_users: Callable[[int], list[User]]
) -> None:
    users = make_users(9)
    rules = [Sampling(max_new_tokens=1 + row, stop=(".",) if row % 2 else ()) for row in range(9)]
    prompts, adapters = [user.question for user in users], [user.adapter for user in users]
    found = generate(demo, prompts, adapters, rules, max_rows=4)
    for row, generation in enumerate(found):
        alone = generate(demo, prompts[row : row + 1], adapters[row : row + 1], rules[row])[0]
        assert (generation.tokens, generation.text, generation.finished) == (alone.tokens, alone.text, alone.finished)
        assert len(generation.tokens) <= rules[row].max_new_tokens
        assert "." not in generation.text or not rules[row].stop
    assert found[7].finished == "stop"  # answers have at most a few words
    assert found[0].finished == "length"


def test_the_end_token_ends_a_row_and_is_no_text(demo: GenerativeAdapter, make_users: Callable) -> None:
    user = make_users(1)[0]
    free = generate(demo, [user.question], [user.adapter], Sampling(3))[0]
    model = demo.base.generation_config
    before, model.eos_token_id = model.eos_token_id, [free.tokens[1]]
    try:
        found = generate(demo, [user.question], [user.adapter], Sampling(3))[0]
        through = generate(demo, [user.question], [user.adapter], Sampling(3, stop_at_end_token=False))[0]
    finally:
        model.eos_token_id = before
    assert (found.tokens, found.finished) == (free.tokens[:2], "stop")
    assert free.text.startswith(found.text)
    assert len(found.text) < len(free.text)
    assert through.tokens == free.tokens


def test_a_model_with_a_recurrent_state_is_refused() -> None:
    model = make_model()
    model.base.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    with pytest.raises(InputError, match="linear_attention"):
        DecodingBatch(model)


def test_wrong_arguments_are_refused() -> None:
    model, other = make_model(), make_model()
    adapter, foreign = compact_adapters(model, 1)[0], compact_adapters(other, 1)[0]
    batch = DecodingBatch(model)
    with pytest.raises(InputError, match="one for each adapter"):
        batch.exchange([], [[3]], [])
    with pytest.raises(InputError, match="at least 1 token"):
        batch.exchange([], [[]], [adapter])
    with pytest.raises(FormatError, match="fingerprints"):
        batch.exchange([], [[3]], [foreign])
    with pytest.raises(InputError, match="tokens must be one for each"):
        batch.advance([3])
    with pytest.raises(InputError, match="there must be one adapter"):
        generate(model, [[3]], [])
    with pytest.raises(InputError, match="tokenizer"):
        generate(model, ["w3"], [None])
    with pytest.raises(FormatError):
        generate(model, [[3], [4]], [adapter, foreign])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox"])
def test_transformers_has_nothing_to_remark(family: str) -> None:
    """Nor do those versions that call the cache by another name."""
    model = make_model(family)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(model, [random_context(5), random_context(3)], [None, None], Sampling(3))

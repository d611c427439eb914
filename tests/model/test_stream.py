"""ContextStream: a context read piece by piece, as text or tokens, saved and continued."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import make_model, make_trained, plain_copy, random_context, same_adapters
from transformers import PreTrainedTokenizerFast

from gakernels import ContextStream, FormatError, GenerativeAdapter, InputError


def same_states(left: ContextStream, right: ContextStream) -> bool:
    states, others = left.states(), right.states()
    return states.keys() == others.keys() and all(torch.equal(states[name], others[name]) for name in states)


def test_text_is_read_as_its_tokens_with_the_first_token_once(
    tokenizer: PreTrainedTokenizerFast, text: Callable[[int], str]
) -> None:
    model, (first, second) = make_model(tokenizer=tokenizer), (text(14), text(9))
    by_text = model.stream().append(first).append(second)
    ids = [[int(word[1:]) for word in part.split()] for part in (first, second)]
    by_ids = model.stream().append([tokenizer.bos_token_id, *ids[0]]).append(ids[1])
    assert by_text.tokens_seen == by_ids.tokens_seen == 24
    assert same_states(by_text, by_ids)
    assert same_adapters(by_text.adapter(), by_ids.adapter())


def test_tokens_may_come_as_a_tensor() -> None:
    model, tokens = make_model(), random_context(13)
    assert same_states(model.stream().append(tokens), model.stream().append(torch.tensor(tokens)))


def test_an_adapter_is_the_prefix_of_the_stream_at_that_time() -> None:
    model, first, second = make_model(), random_context(12), random_context(12)
    stream = model.stream().append(first)
    adapter = stream.adapter()
    stream.append(second)
    assert same_adapters(adapter, model.stream().append(first).adapter())
    assert not same_adapters(adapter, stream.adapter())
    assert (adapter.tokens_seen, stream.adapter().tokens_seen) == (12, 24)


def test_adapt_of_one_context_is_the_stream_of_it() -> None:
    model, context = make_model(), random_context(40)
    assert same_adapters(model.adapt([context])[0], model.stream().append(context).adapter())


def test_a_refused_piece_leaves_the_stream_as_it_was() -> None:
    model, context = make_model(), random_context(12)
    stream = model.stream().append(context)
    for wrong in ([], [1, 64], [-1], "no tokenizer"):
        with pytest.raises(InputError):
            stream.append(wrong)
    assert stream.tokens_seen == 12
    assert same_states(stream, model.stream().append(context))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_stream_goes_on_exactly_where_it_stopped(tmp_path: Path, dtype: torch.dtype) -> None:
    model, first, second = make_model(base_dtype=dtype), random_context(20), random_context(15)
    stream = model.stream().append(first)
    stream.save(tmp_path / "state.safetensors")
    loaded = ContextStream.load(model, tmp_path / "state.safetensors")
    assert loaded.tokens_seen == 20
    assert same_states(loaded, stream)
    assert same_adapters(loaded.append(second).adapter(), stream.append(second).adapter())


def test_a_saved_stream_goes_on_with_a_generator_from_its_files(tmp_path: Path) -> None:
    model, first, second = make_model(), random_context(20), random_context(15)
    stream = model.stream().append(first)
    stream.save(tmp_path / "state.safetensors")
    model.save_pretrained(tmp_path / "generator")
    other = GenerativeAdapter.from_pretrained(tmp_path / "generator", plain_copy(model))
    loaded = ContextStream.load(other, tmp_path / "state.safetensors")
    assert same_adapters(loaded.append(second).adapter(), stream.append(second).adapter())


@pytest.mark.parametrize("change", ["base", "generator", "damping", "scale"])
def test_a_state_of_another_base_or_generator_is_refused(tmp_path: Path, change: str) -> None:
    model, path = make_model(), tmp_path / "state.safetensors"
    model.stream().append(random_context(10)).save(path)
    if change == "base":
        other = make_model()
    elif change == "generator":
        other = make_trained(model)
    else:
        settings = {**model.config.to_dict(), change: 0.25}
        other = GenerativeAdapter(plain_copy(model), type(model.config)(**settings))
        other.load_generator_tensors(model.generator_tensors(), "the model")
    what = "base" if change == "base" else "generator"
    with pytest.raises(FormatError, match=rf"state\.safetensors was made with a {what}"):
        ContextStream.load(other, path)


def test_an_empty_stream_has_no_adapter_and_no_file(tmp_path: Path) -> None:
    stream = make_model().stream()
    for use in (stream.states, stream.adapter, lambda: stream.save(tmp_path / "state.safetensors")):
        with pytest.raises(InputError, match="append a context first"):
            use()
    assert not list(tmp_path.iterdir())

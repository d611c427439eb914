"""The cases of inference on a random model: reading contexts, decoding with an adapter, adapters for many users."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from benchmarks.cases import TOLERANCES, BenchmarkCase, Trial, UnavailableError, largest_error
from benchmarks.measure import Timing, dtype_name
from benchmarks.operations import SEED, sizes_of
from benchmarks.providers import with_backend
from benchmarks.rows import FLOOR, OK, OTHER
from gakernels import Adapter, GenerativeAdapter, GeneratorConfig
from gakernels.generation.row_adapters import RowAdapters, SharedMaps
from gakernels.model.attachment import cache_name

# Errors add up over the layers of a model, and the norm is sensitive to the small directions of a state.
MODEL_TOLERANCE = 10
# The plain definitions are measured up to this length; beyond it they would take minutes.
MOST_REFERENCE_TOKENS, MOST_REFERENCE_USERS = 4096, 8


@dataclass(frozen=True)
class InferenceSizes:
    """A Llama-like model with random weights, and the task. `of_layers`: layers of the model that it represents."""

    hidden: int
    feed_forward: int
    layers: int
    of_layers: int
    heads: int
    key_heads: int
    vocabulary: int
    state: int
    rank: int
    chunk: int
    lengths: tuple[int, ...]
    users: tuple[int, ...]
    prompt: int
    new_tokens: int

    @property
    def shape(self) -> str:
        whole = f" of {self.of_layers}" if self.layers < self.of_layers else ""
        return f"d_h={self.hidden} layers={self.layers}{whole} d_r={self.state} r={self.rank} M={self.chunk}"


FAST = ("auto", "base_chunks", "full_prompt", "base", "merged", "unmerged", "compact")  # all but the plain definitions
MISTRAL_LENGTHS = (2048, 8192, 1024, 32768, 131072, 4096, 16384, 65536)  # the most informative ones first
PRESETS = {
    "tiny": InferenceSizes(32, 48, 2, 2, 4, 2, 64, 16, 4, 16, (32, 64), (1, 2), 4, 2),
    "cpu": InferenceSizes(256, 704, 4, 4, 8, 4, 1024, 128, 16, 256, (1024, 2048, 4096), (1, 8), 64, 8),
    "mistral-7b": InferenceSizes(
        4096, 14336, 4, 32, 32, 8, 32000, 1024, 128, 1024, MISTRAL_LENGTHS, (1, 8, 64), 512, 32
    ),
}


def cases(
    preset: str,
    device: torch.device,
    dtype: torch.dtype,
    names: Sequence[str] | None = None,
    attention: str = "sdpa",
) -> list[BenchmarkCase]:
    """Every inference case of a preset. Raises: ValueError: there is no such preset."""
    sizes = sizes_of(PRESETS, preset)
    build = Builder(sizes, device, dtype, attention)
    made = [_contextualisation(build, length) for length in sizes.lengths]
    made += [_decoding(build, users) for users in (1, sizes.users[-1])]
    made += [_generation(build, users) for users in sizes.users]
    return [_only(case, names) for case in made]


def _only(case: BenchmarkCase, names: Sequence[str] | None) -> BenchmarkCase:
    chosen = {name: make for name, make in case.providers.items() if names is None or name in names}
    return replace(case, providers=chosen)


@dataclass(frozen=True)
class Builder:
    """Makes the model, and the same model in float64 for the oracle."""

    sizes: InferenceSizes
    device: torch.device
    dtype: torch.dtype
    attention: str = "sdpa"  # transformers' name; the oracle always uses sdpa

    def tokens(self, count: int, number: int = 0) -> list[int]:
        generator = torch.Generator().manual_seed(SEED + number)
        return torch.randint(3, self.sizes.vocabulary, (count,), generator=generator).tolist()

    def case(self, kernel: str, shape: str, providers: Mapping[str, Callable[[], Trial]]) -> BenchmarkCase:
        tolerance, shape = MODEL_TOLERANCE * TOLERANCES[self.dtype], f"{shape} {self.sizes.shape}"
        shape += "" if self.attention == "sdpa" else f" {self.attention}"
        return BenchmarkCase(kernel, "inference", shape, dtype_name(self.dtype), tolerance, None, providers)


@functools.lru_cache(maxsize=1)
def model(build: Builder) -> GenerativeAdapter:
    """A random base with generators whose output maps are nonzero."""
    sizes = build.sizes
    config = LlamaConfig(
        vocab_size=sizes.vocabulary,
        hidden_size=sizes.hidden,
        intermediate_size=sizes.feed_forward,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.key_heads,
        max_position_embeddings=max(*sizes.lengths, sizes.prompt + sizes.new_tokens),
    )
    settings = GeneratorConfig(state_size=sizes.state, rank=sizes.rank, chunk_size=sizes.chunk)
    with torch.random.fork_rng(devices=[build.device] if build.device.type == "cuda" else []), build.device:
        torch.manual_seed(SEED)
        base = AutoModelForCausalLM.from_config(config, dtype=build.dtype, attn_implementation=build.attention)
        made = GenerativeAdapter(base, settings, dtype=build.dtype).eval().requires_grad_(False)
        for name in made.adapted_names:
            made.generator(name).output_map.normal_(std=(3 * sizes.state) ** -0.5)
    return made


@functools.lru_cache(maxsize=1)
def _expected(build: Builder) -> tuple[dict[str, Tensor], Tensor]:
    """From the plain definitions in float64: the adapters (lora_B lora_A) of a short context, by layer, and the logits
    after the prompt with that adapter."""
    wide = model.__wrapped__(replace(build, attention="sdpa")).double()
    oracle = with_backend("reference", lambda: _answers(wide, build))
    return oracle()


def _answers(made: GenerativeAdapter, build: Builder) -> tuple[dict[str, Tensor], Tensor]:
    adapter = _adapters(made, build)[0]
    ids = torch.tensor([build.tokens(build.sizes.prompt, 1)], device=build.device)
    with torch.no_grad(), made.adapted(adapter):
        logits = made.base(input_ids=ids, use_cache=False).logits[:, -1]
    return {name: adapter.delta(name) for name in made.adapted_names}, logits


def _adapters(made: GenerativeAdapter, build: Builder, users: int = 1) -> list[Adapter]:
    """The adapters of contexts of two chunks."""
    contexts = [build.tokens(2 * build.sizes.chunk, 2 + user) for user in range(users)]
    return made.adapters(made.states(contexts), [len(tokens) for tokens in contexts])


def _row_adapters(made: GenerativeAdapter, build: Builder, users: int) -> RowAdapters:
    """The adapters in compact form: U and V for each row, A1 and B2 shared."""
    contexts = [build.tokens(2 * build.sizes.chunk, 2 + user) for user in range(users)]
    compact = made.compact_adapters(made.states(contexts), [len(tokens) for tokens in contexts], build.dtype)
    return RowAdapters.of(SharedMaps(made), compact)


def _delta_error(build: Builder, backend: str) -> float:
    expected = _expected(build)[0]
    values = with_backend(backend, lambda: _answers(model(build), build))()[0]
    return largest_error([values[name] for name in expected], expected.values())


# Reading a context


def _contextualisation(build: Builder, length: int) -> BenchmarkCase:
    def reading(backend: str) -> Trial:
        made = model(build)
        contexts = [build.tokens(length, 10 + number) for number in range(2)]
        run = with_backend(backend, lambda tokens: made.states([tokens]))
        check = functools.partial(_delta_error, build, backend)
        return Trial(lambda i: contexts[i % 2], run, check, _per_second("tokens_per_s", length))

    def prompt() -> Trial:
        """The base model reads the whole context as one prompt: the cost of having it in the key-value cache."""
        base = model(build).base
        contexts = [torch.tensor([build.tokens(length, 10 + i)], device=build.device) for i in range(2)]
        run = torch.no_grad()(lambda ids: base.get_decoder()(input_ids=ids, use_cache=True))
        metrics = _per_second("tokens_per_s", length)
        return Trial(lambda i: contexts[i % 2], run, None, metrics, status=OTHER)

    def chunks() -> Trial:
        """The base model reads the chunks side by side, without generators: the least cost of reading a context."""
        base, chunk = model(build).base, build.sizes.chunk
        contexts = [torch.tensor(build.tokens(length, 10 + i), device=build.device).view(-1, chunk) for i in range(2)]
        run = torch.no_grad()(lambda ids: base.get_decoder()(input_ids=ids, use_cache=True))
        return Trial(lambda i: contexts[i % 2], run, None, _per_second("tokens_per_s", length), status=FLOOR)

    names = ("reference", "auto") if length <= MOST_REFERENCE_TOKENS else ("auto",)
    providers: dict[str, Callable[[], Trial]] = {name: functools.partial(reading, name) for name in names}
    others = {"base_chunks": chunks, "full_prompt": prompt}
    return build.case("contextualisation", f"tokens={length}", {**providers, **others})


# Decoding


def _decoding(build: Builder, users: int) -> BenchmarkCase:
    """Greedy decoding with a key-value cache, the same prompt length for every user, each with their own adapter."""

    def trial(setting: str) -> Trial:
        made = model(build)
        ids = torch.tensor([build.tokens(build.sizes.prompt, 1)] * users, device=build.device)
        if setting == "merged" and users > 1:
            raise UnavailableError("one merged model serves one adapter")
        adapters = _adapters(made, build, users)
        contexts = {
            "merged": lambda: _merged(made, adapters[0]),
            "unmerged": lambda: made.adapted(adapters),
            "compact": lambda: made.using(_row_adapters(made, build, users).factors()),
        }
        return Trial(
            prepare=lambda _: ids,
            run=lambda prompt: _greedy(made.base, prompt, build.sizes.new_tokens),
            error=None if setting == "base" else functools.partial(_logit_error, build, setting),
            metrics=_per_second("tokens_per_s", users * build.sizes.new_tokens),
            status=FLOOR if setting == "base" else OK,
            context=contexts.get(setting, nullcontext),
        )

    shape = f"users={users} prompt={build.sizes.prompt} new={build.sizes.new_tokens}"
    providers = {name: functools.partial(trial, name) for name in ("base", "merged", "unmerged", "compact")}
    return build.case("decoding", shape, providers)


@contextmanager
def _merged(made: GenerativeAdapter, adapter: Adapter) -> Iterator[None]:
    made.merge(adapter)
    try:
        yield
    finally:
        made.unmerge()


@torch.no_grad()
def _greedy(base: PreTrainedModel, ids: Tensor, count: int) -> Tensor:
    tokens, cache, step, name = [], None, ids, cache_name(base)
    for _ in range(count):
        output: Any = base(input_ids=step, use_cache=True, logits_to_keep=1, **{name: cache})
        cache, step = output[name], output.logits[:, -1:].argmax(-1)
        tokens.append(step)
    return torch.cat(tokens, 1)


def _logit_error(build: Builder, setting: str) -> float:
    """Distance of the logits after the prompt from the float64 model with the same adapter."""
    made = model(build)
    ids = torch.tensor([build.tokens(build.sizes.prompt, 1)], device=build.device)
    contexts = {
        "merged": lambda: _merged(made, _adapters(made, build)[0]),
        "unmerged": lambda: made.adapted(_adapters(made, build)[0]),
        "compact": lambda: made.using(_row_adapters(made, build, 1).factors()),
    }
    with contexts[setting](), torch.no_grad():
        logits = made.base(input_ids=ids, use_cache=False).logits[:, -1]
    return largest_error([logits], [_expected(build)[1]])


# Adapters for many users


def _generation(build: Builder, users: int) -> BenchmarkCase:
    """Contexts of two chunks for so many users, read as one batch and turned into factors."""

    def trial(backend: str) -> Trial:
        made = model(build)
        batches = [
            [build.tokens(2 * build.sizes.chunk, 100 * number + user) for user in range(users)] for number in range(2)
        ]

        @torch.no_grad()
        def generate(contexts: list[list[int]]) -> list[tuple[Tensor, Tensor]]:
            return [made.generator(name).factors(state) for name, state in made.states(contexts).items()]

        check = functools.partial(_delta_error, build, backend)
        metrics = _per_second("users_per_s", users)
        return Trial(lambda i: batches[i % 2], with_backend(backend, generate), check, metrics)

    shape = f"users={users} tokens={2 * build.sizes.chunk}"
    names = ("reference", "auto") if users <= MOST_REFERENCE_USERS else ("auto",)
    providers = {name: functools.partial(trial, name) for name in names}
    return build.case("adapter_generation", shape, providers)


def _per_second(name: str, count: int) -> Callable[[Timing], dict[str, float]]:
    return lambda timing: {name: count / (timing.p50_ms * 1e-3)}

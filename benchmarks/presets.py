"""Sizes of the training-step benchmark, the random models and batches made from them, and the needs of a step."""

import functools
from dataclasses import dataclass, replace

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from gakernels import GenerativeAdapter, GeneratorConfig
from gakernels.cost.flops import adapted_layers, adapted_linears
from gakernels.cost.memory import Recomputation, StepSetting, StepShape, estimate_memory, recomputable_layers
from gakernels.cost.shapes import ModelShape
from gakernels.cost.step_memory import generator_parameters
from gakernels.model.quantized_base import quantize_base
from gakernels.model.window_losses import WindowBatch, pretraining_windows
from gakernels.training.run_memory import QUANTIZED_BYTES

FAMILIES = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen3": "Qwen3Config"}


@dataclass(frozen=True)
class Preset:
    """The shape of a model, of its generators and of a step.

    Attributes:
        family: key of FAMILIES.
        hidden, ffn, layers, heads, kv_heads, head_dim, vocabulary: of the base model.
        tied: whether the output head is the embedding.
        linears, adapted_layers: what is adapted, as in `GeneratorConfig`.
        state_size, rank, static_rank: d_r, r, and the rank of the static term.
        segments: rows of a step.
        chunks: T; a segment becomes 2 T windows.
        window: tokens in a window.
        dtype: of the base model. The generators are float32 (float64 if the base is); if the two differ, the step
            runs under autocast.
        checkpointing: whether the eager baseline recomputes its layers, as the released scripts do.
        quantization: of the linear layers of the base model (`quantize_base`); None leaves them as they are.
        measured_layers: numbers of layers to run instead of `layers`; the step is extrapolated from them.
    """

    family: str
    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    state_size: int = 1024
    rank: int = 128
    chunks: int = 8
    window: int = 1024
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16
    checkpointing: bool = True
    measured_layers: tuple[int, ...] = ()
    quantization: str | None = None
    linears: tuple[str, ...] = ("o_proj",)
    adapted_layers: tuple[int, ...] | None = None
    static_rank: int = 0
    segments: int = 1
    tied: bool = False

    @property
    def segment_tokens(self) -> int:
        """The tokens of all segments of a step."""
        return self.segments * self.chunks * self.window

    def generator_config(self, seed: int = 0) -> GeneratorConfig:
        """The configuration of the generators."""
        return GeneratorConfig(
            linears=self.linears,
            layers=self.adapted_layers,
            state_size=self.state_size,
            rank=self.rank,
            static_rank=self.static_rank,
            chunk_size=self.window,
            seed=seed,
        )

    def config(self) -> PreTrainedConfig:
        """The `transformers` configuration of the base model."""
        config: PreTrainedConfig = getattr(transformers, FAMILIES[self.family])(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=max(4096, self.window),
            tie_word_embeddings=self.tied,
            pad_token_id=0,
        )
        return config


PRESETS = {
    "tiny": Preset(
        family="llama",
        hidden=64,
        ffn=128,
        layers=2,
        heads=4,
        kv_heads=2,
        vocabulary=128,
        state_size=32,
        rank=8,
        chunks=4,
        window=32,
        head_dim=16,
        dtype=torch.float32,
        checkpointing=False,
    ),
    "cpu-mid": Preset(
        family="llama",
        hidden=1024,
        ffn=2816,
        layers=4,
        heads=16,
        kv_heads=4,
        vocabulary=2048,
        state_size=512,
        rank=64,
        window=256,
        head_dim=64,
        dtype=torch.float32,
        checkpointing=False,
    ),
    "smollm2-135m": Preset(
        "llama",
        hidden=576,
        ffn=1536,
        layers=30,
        heads=9,
        kv_heads=3,
        vocabulary=49152,
        state_size=256,
        rank=64,
        chunks=4,
        window=256,
        head_dim=64,
        linears=("o_proj", "down_proj"),
        adapted_layers=tuple(range(2, 30, 3)),
        static_rank=16,
        segments=32,
        tied=True,
    ),
    "llama2-7b": Preset("llama", hidden=4096, ffn=11008, layers=32, heads=32, kv_heads=32, vocabulary=32000),
    "mistral-7b": Preset("mistral", hidden=4096, ffn=14336, layers=32, heads=32, kv_heads=8, vocabulary=32000),
    "qwen3-8b": Preset("qwen3", hidden=4096, ffn=12288, layers=36, heads=32, kv_heads=8, vocabulary=151936),
    "llama3-70b": Preset(
        "llama", hidden=8192, ffn=28672, layers=80, heads=64, kv_heads=8, vocabulary=128256, measured_layers=(1, 2)
    ),
}


def check_preset(preset: Preset) -> Preset:
    """A tiny model of the same family in float64, adapted in the same linear layers, to compare the providers on."""
    return replace(
        PRESETS["tiny"],
        family=preset.family,
        dtype=torch.float64,
        chunks=3,
        linears=preset.linears,
        adapted_layers=None if preset.adapted_layers is None else (1,),
        static_rank=min(preset.static_rank, 2),
        segments=min(preset.segments, 2),
        tied=preset.tied,
    )


def make_base(preset: Preset, device: torch.device, seed: int) -> PreTrainedModel:
    """A frozen random base model; nothing is downloaded."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_config(preset.config(), dtype=preset.dtype)
    base = base.to(device).requires_grad_(False).eval()
    return quantize_base(base, preset.quantization) if preset.quantization else base


def make_model(preset: Preset, device: torch.device, seed: int) -> GenerativeAdapter:
    """Generators on a random base. Values that start at zero are random too, so that no factor or gradient is zero."""
    wide = torch.promote_types(preset.dtype, torch.float32)
    model = GenerativeAdapter(make_base(preset, device, seed), preset.generator_config(seed), dtype=wide)
    random = torch.Generator(device).manual_seed(seed)
    for name in model.adapted_names:
        generator = model.generator(name)
        for outputs in (generator.output_map, generator.static_lora_b):
            if outputs is not None:
                nn.init.normal_(outputs, std=0.02, generator=random)
    return model


def make_batch(preset: Preset, seed: int) -> WindowBatch:
    """The windows of random segments; every next token of every window counts, as in the released code."""
    random = torch.Generator().manual_seed(seed)
    size = (preset.segments, preset.chunks * preset.window)
    segments = torch.randint(3, preset.vocabulary, size, generator=random)
    batch = pretraining_windows(segments, preset.chunks, random)
    targets = torch.ones_like(batch.mask)
    targets[..., 0] = False
    return replace(batch, targets={"next_token": targets})


# The needs of a step: operations and peak memory; a step that can't fit is not started


def step_flops(preset: Preset) -> float:
    """Operations of the base model in a training step: forward, and backward of the activations only.

    The adapters are not counted, so that the figure is the same for every provider; they are a few per cent. Causal
    attention counts half of its square, and its backward twice its forward.
    """
    width, kv_width = preset.heads * preset.head_dim, preset.kv_heads * preset.head_dim
    attention = preset.hidden * (2 * width + 2 * kv_width)
    weights = preset.layers * (attention + 3 * preset.hidden * preset.ffn) + preset.hidden * preset.vocabulary
    tokens = 2 * preset.segment_tokens
    forward_linear = 2.0 * weights * tokens
    forward_attention = preset.layers * 2.0 * width * preset.window * tokens
    return 2 * forward_linear + 3 * forward_attention


# The providers whose memory the library's estimate gives. The floors do less of the same.
ESTIMATED = ("auto", "trainer", "eager", "triton", "cuda", "overlap", "recompute")
BELOW = ("dense_lora", "frozen_base")


def estimated_bytes(name: str, preset: Preset, device: torch.device) -> int | None:
    """The peak memory of a provider's step; an upper bound for the floors; None if unknown.

    Compiled steps store other things, and only the form of the eager baseline that recomputes its layers is counted.
    """
    if name in (*ESTIMATED, *BELOW):
        return _library_bytes(preset, device, recompute=name == "recompute")
    return _baseline_bytes(preset) if name == "reference" and preset.checkpointing else None


def _library_bytes(preset: Preset, device: torch.device, recompute: bool) -> int:
    """By the estimate of `gakernels.cost.memory`."""
    shape, config = shape_of(preset), preset.generator_config()
    tokens = preset.segments * preset.chunks * 2 * (preset.window - 1)  # all predicted tokens
    step = replace(StepShape.pretraining(preset.segments, preset.window, preset.chunks), predicted=tokens)
    mixed = preset.dtype in (torch.bfloat16, torch.float16)
    wide = torch.promote_types(preset.dtype, torch.float32)
    quantised = None if preset.quantization is None else QUANTIZED_BYTES[preset.quantization]
    setting = StepSetting(preset.dtype, wide, mixed, quantised, device=device.type)
    recomputed = Recomputation(tuple(recomputable_layers(shape, config)) if recompute else ())
    return estimate_memory(shape, config, step, setting, recomputed).total


def _baseline_bytes(preset: Preset) -> int:
    """In the backward of the loss: the base, the generators, AdamW's moments, and the input of every decoder layer.

    Also the logits in float32, their log-probabilities and the gradient; if the base is narrower, the logits and the
    gradient in its dtype too.
    """
    tokens, width = 2 * preset.segment_tokens, preset.dtype.itemsize
    kept = width * preset.layers * tokens * preset.hidden
    logits = (3 * 4 + (2 * width if width < 4 else 0)) * tokens * preset.vocabulary
    return width * shape_of(preset).parameters + 3 * 4 * generator_numbers(preset) + kept + logits


def generator_numbers(preset: Preset) -> int:
    """The number of parameters of all generators of a preset."""
    shape, config = shape_of(preset), preset.generator_config()
    each = sum(generator_parameters(config, shape.hidden, linear) for linear in adapted_linears(shape, config))
    return each * len(adapted_layers(shape, config))


@functools.cache
def shape_of(preset: Preset) -> ModelShape:
    """The shape of the base model; asking transformers takes a second or more."""
    return ModelShape.from_config(preset.config())

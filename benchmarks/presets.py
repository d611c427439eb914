"""Sizes of the training-step benchmark, and the random models and batches that it makes from them."""

from dataclasses import dataclass, replace

import torch
import transformers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from gakernels import GenerativeAdapter, GeneratorConfig
from gakernels.quantized_base import quantize_base
from gakernels.training.objectives import WindowBatch, pretraining_windows

FAMILIES = {"llama": "LlamaConfig", "mistral": "MistralConfig", "qwen3": "Qwen3Config"}


@dataclass(frozen=True)
class Preset:
    """The shape of a model, of its generators (on `o_proj`) and of a segment.

    Attributes:
        family: key of FAMILIES.
        hidden, ffn, layers, heads, kv_heads, head_dim, vocabulary: of the base model.
        state_size, rank: d_r and r.
        chunks: T; a segment becomes 2 T windows.
        window: tokens in a window.
        dtype: of the base model. The generators are float32 (float64 if the base is); where the two differ the step
            runs under autocast.
        checkpointing: whether the eager baseline recomputes its layers, as the released scripts do.
        quantization: of the linear layers of the base model (`quantize_base`); None leaves them as they are.
        measured_layers: numbers of layers to run instead of `layers`, from which the step is extrapolated.
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

    @property
    def segment_tokens(self) -> int:
        return self.chunks * self.window

    def config(self) -> PreTrainedConfig:
        """The configuration of the base model, of `transformers`."""
        config: PreTrainedConfig = getattr(transformers, FAMILIES[self.family])(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=max(4096, self.window),
            tie_word_embeddings=False,
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
    "llama2-7b": Preset("llama", hidden=4096, ffn=11008, layers=32, heads=32, kv_heads=32, vocabulary=32000),
    "mistral-7b": Preset("mistral", hidden=4096, ffn=14336, layers=32, heads=32, kv_heads=8, vocabulary=32000),
    "qwen3-8b": Preset("qwen3", hidden=4096, ffn=12288, layers=36, heads=32, kv_heads=8, vocabulary=151936),
    "llama3-70b": Preset(
        "llama", hidden=8192, ffn=28672, layers=80, heads=64, kv_heads=8, vocabulary=128256, measured_layers=(1, 2)
    ),
}


def check_preset(preset: Preset) -> Preset:
    """A tiny model of the same family in float64, on which the providers are compared."""
    return replace(PRESETS["tiny"], family=preset.family, dtype=torch.float64, chunks=3)


def make_base(preset: Preset, device: torch.device, seed: int) -> PreTrainedModel:
    """A frozen random base model; nothing is downloaded."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_config(preset.config(), dtype=preset.dtype)
    base = base.to(device).requires_grad_(False).eval()
    return quantize_base(base, preset.quantization) if preset.quantization else base


def make_model(preset: Preset, device: torch.device, seed: int) -> GenerativeAdapter:
    """Generators on a random base. Their output maps are random too, so that no factor or gradient is zero."""
    config = GeneratorConfig(state_size=preset.state_size, rank=preset.rank, chunk_size=preset.window, seed=seed)
    wide = torch.promote_types(preset.dtype, torch.float32)
    model = GenerativeAdapter(make_base(preset, device, seed), config, dtype=wide)
    random = torch.Generator(device).manual_seed(seed)
    for name in model.adapted_names:
        nn.init.normal_(model.generator(name).output_map, std=0.02, generator=random)
    return model


def make_batch(preset: Preset, seed: int) -> WindowBatch:
    """The windows of one random segment; every next token of every window counts, as in the released code."""
    random = torch.Generator().manual_seed(seed)
    segment = torch.randint(3, preset.vocabulary, (1, preset.segment_tokens), generator=random)
    batch = pretraining_windows(segment, preset.chunks, random)
    targets = torch.ones_like(batch.mask)
    targets[..., 0] = False
    return replace(batch, targets={"next_token": targets})

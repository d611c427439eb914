"""Table 1 of the paper beside the same quantities from this library's formulas (docs/evaluation.md)."""

from __future__ import annotations

from dataclasses import dataclass

from gakernels.cost import flops
from gakernels.cost.shapes import SHAPES, ModelShape
from gakernels.evaluation.cost import adapter_numbers, key_value_numbers
from gakernels.model.config import GeneratorConfig

QUERY_TOKENS = 71  # the only whole number that gives the closed-book row
CONVERSATION_TOKENS = 2352  # then the only one that gives the row of prompting; the paper says 2.5K on average


@dataclass(frozen=True)
class PaperRow:
    """A row of Table 1.

    Attributes:
        model: as the paper writes it.
        tera_operations: "Inference Computation (TFLOPS)".
        mega_floats: "Extra Storage (M floats)"; M is 2^20.
        kept_tokens: tokens of context whose keys and values are kept; None for the adapter.
        at_least: whether the paper writes the storage with a plus.
    """

    model: str
    tera_operations: float
    mega_floats: int
    kept_tokens: int | None
    at_least: bool = False

    @property
    def floats(self) -> str:
        """The storage as the paper writes it."""
        return f"{self.mega_floats}{'+' if self.at_least else ''}"


TABLE_1 = (
    PaperRow("Closed-book", 0.505, 0, 0),
    PaperRow("Full-conversation Prompting", 2.059, 128, CONVERSATION_TOKENS, at_least=True),
    PaperRow("Ultragist (64 Tokens)", 0.514, 4, 64),
    PaperRow("Ultragist (128 Tokens)", 0.552, 8, 128),
    PaperRow("Ultragist (256 Tokens)", 0.627, 16, 256),
    PaperRow("Ultragist (512 Tokens)", 0.772, 32, 512),
    PaperRow("Ultragist (1K Tokens)", 1.067, 64, 1024),
    PaperRow("Ultragist (2K Tokens)", 1.658, 128, 2048),
    PaperRow("Generative Adapter", 0.505, 32, None),
)


@dataclass(frozen=True)
class TableRow:
    """A row of Table 1 with what this library computes for it.

    Attributes:
        paper: the paper's values.
        estimate: tera-operations by the released estimate.
        operations: tera-operations of `QUERY_TOKENS` tokens by our formulas, with the keys and values (or the adapter,
            beside the weights) of the context at hand.
        mega_floats: extra storage in 2^20 numbers.
    """

    paper: PaperRow
    estimate: float
    operations: float
    mega_floats: float

    def to_dict(self) -> dict[str, object]:
        """Plain JSON types."""
        return {**vars(self), "paper": vars(self.paper)}


def table_1() -> list[TableRow]:
    """Table 1 with Mistral-7B and the paper's generator."""
    shape, config = SHAPES["mistral-7b"], GeneratorConfig()
    return [_row(row, shape, config) for row in TABLE_1]


def released_estimate(shape: ModelShape, context: int, tokens: int) -> int:
    """The count of the authors' released code, for `tokens` read with the keys and values of `context` at hand.

    It counts a multiplication and an addition as one, the embedding as d_h operations and the head for every token,
    leaves out the attention among the new tokens, and for that to the context has tokens^2 context d_h a layer, where
    the two products have 2 tokens context d_h.
    """
    linear = shape.layers * sum(layer.weights for layer in shape.linears)
    embedding_and_head = shape.hidden + shape.hidden * shape.vocabulary
    return tokens * (linear + embedding_and_head) + tokens**2 * context * shape.hidden * shape.layers


def _row(row: PaperRow, shape: ModelShape, config: GeneratorConfig) -> TableRow:
    kept = row.kept_tokens or 0
    operations = flops.generation(shape, QUERY_TOKENS, 1, before=kept)
    if row.kept_tokens is None:
        operations += flops.low_rank_products(shape, config, QUERY_TOKENS)
        numbers = adapter_numbers(shape, config)
    else:
        numbers = key_value_numbers(shape, kept)
    estimate = released_estimate(shape, kept, QUERY_TOKENS)
    return TableRow(row, estimate / 1e12, operations.total / 1e12, numbers / 2**20)

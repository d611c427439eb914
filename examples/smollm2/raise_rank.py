"""Give a generator a higher rank and token weights, to tune it on: only the fixed sketch and the zero gates are new.

    python raise_rank.py fifth fifth-rank-64 --rank 64

Before any tuning its adapters keep more singular directions of the same states; all tokens weigh the same.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from gakernels import GenerativeAdapter, GeneratorConfig
from gakernels.demo import smollm2


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("generator", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--rank", type=int, required=True)
    options = parser.parse_args()
    model = GenerativeAdapter.from_pretrained(options.generator, smollm2.fetch())
    raised(model, options.rank).save_pretrained(options.output)


def raised(model: GenerativeAdapter, rank: int) -> GenerativeAdapter:
    """The model with generators of that rank and with token weights, which start from its generators."""
    config = GeneratorConfig(**{**model.config.to_dict(), "rank": rank, "token_weights": True})
    trained, template = model.generators.state_dict(), model.chat_template
    dtype = next(model.generators.parameters()).dtype
    new = GenerativeAdapter(model.detach(), config, model.tokenizer, dtype)
    kept = {name: value for name, value in trained.items() if not name.endswith("sketch")}
    new.generators.load_state_dict({**new.generators.state_dict(), **kept})
    new.chat_template = template
    return new


if __name__ == "__main__":
    main()

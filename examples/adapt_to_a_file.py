"""A file becomes an adapter; then the model answers questions about it with an empty prompt.

    python examples/adapt_to_a_file.py [FILE QUESTION...]

The small models of the package know a world of invented people only; name a generator of your own for real texts.
"""

import sys
import tempfile
from importlib.resources import files
from pathlib import Path

from gakernels import Adapter, GenerativeAdapter

GENERATOR = Path(str(files("gakernels.demo") / "assets" / "generator"))
TEXT = (
    "The pet of Toso Zelwin is grey hamster. The job of Toso Zelwin is kite mender. The boat that Toso Zelwin sails is "
    "noble otter. The drink that Toso Zelwin orders is iced cocoa. The school of Toso Zelwin is north academy."
)
QUESTIONS = ("Question: What is the pet of Toso Zelwin? Answer:", "Question: What is the boat of Toso Zelwin? Answer:")


def main(path: Path, questions: list[str]) -> list[str]:
    """Adapt, save, load, ask."""
    model = GenerativeAdapter.from_pretrained(GENERATOR)
    adapter = model.stream().append(path.read_text(encoding="utf-8")).adapter()
    saved = path.with_suffix(".adapter.safetensors")
    adapter.save(saved)
    with model.adapted(Adapter.load(saved)):
        answers = model.generate(questions, max_new_tokens=4)
    print(f"{adapter.tokens_seen} tokens became {adapter.numbers():,} numbers in {saved.name}")
    for question, answer in zip(questions, answers, strict=True):
        print(question, answer)
    return answers


if __name__ == "__main__":
    if len(sys.argv) > 2:
        main(Path(sys.argv[1]), sys.argv[2:])
    else:
        with tempfile.TemporaryDirectory() as folder:
            example = Path(folder) / "notes.txt"
            example.write_text(TEXT, encoding="utf-8")
            main(example, list(QUESTIONS))

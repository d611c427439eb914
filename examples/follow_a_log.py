"""A log that grows is read as it grows: only what is new, from a state on disk that survives the program.

python examples/follow_a_log.py
"""

import tempfile
from importlib.resources import files
from pathlib import Path

from gakernels import ContextStream, GenerativeAdapter

GENERATOR = Path(str(files("gakernels.demo") / "assets" / "generator"))
LINES = (
    "The town of Gara Branden is East Willowstead. The job of Gara Branden is clock maker.",
    "The vehicle that Gara Branden drives is rental sedan. The hobby of Gara Branden is pocket drawing.",
    "The gem of Gara Branden is pale topaz. The tool that Gara Branden lent is heavy wrench.",
)
QUESTIONS = (
    "Question: What is the job of Gara Branden? Answer:",
    "Question: What is the vehicle of Gara Branden? Answer:",
    "Question: What is the gem of Gara Branden? Answer:",
)


def read_on(model: GenerativeAdapter, log: Path) -> ContextStream:
    """Append what the log has gained since last time; how far that was is kept beside the state."""
    state, place = log.with_suffix(".state"), log.with_suffix(".place")
    stream = ContextStream.load(model, state) if state.exists() else model.stream()
    start = int(place.read_text()) if place.exists() else 0
    new = log.read_text(encoding="utf-8")[start:]
    if new.strip():
        stream.append(new)
        stream.save(state)
        place.write_text(str(start + len(new)))
    return stream


def main(folder: Path) -> list[list[str]]:
    """Write the log line by line, and ask all questions after each."""
    model, log, answers = GenerativeAdapter.from_pretrained(GENERATOR), folder / "log.txt", []
    for line in LINES:
        with log.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        stream = read_on(model, log)
        with model.adapted(stream.adapter()):
            texts = model.generate(QUESTIONS, max_new_tokens=4)
        answers.append([text.split(".")[0] for text in texts])
        print(f"after {stream.tokens_seen} tokens: {answers[-1]}")
    return answers


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        main(Path(temporary))

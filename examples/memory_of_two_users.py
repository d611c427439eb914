"""Two users, each with a memory of their own, are answered in one batch: one model, one pass, two adapters.

python examples/memory_of_two_users.py
"""

from importlib.resources import files
from pathlib import Path

from gakernels import GenerativeAdapter
from gakernels.generation import Sampling, generate

GENERATOR = Path(str(files("gakernels.demo") / "assets" / "generator"))
MEMORIES = {
    "Rimi": "The pet of Rimi Halley is spotted rabbit. The meal that Rimi Halley cooks is smoked trout. "
    "The club of Rimi Halley is chess circle. The sport that Rimi Halley practises is winter climbing.",
    "Dava": "The pet of Dava Tolard is black parrot. The meal that Dava Tolard cooks is baked turnip. "
    "The club of Dava Tolard is poetry guild. The sport that Dava Tolard practises is beach rowing.",
}
QUESTIONS = {
    "Rimi": "Question: What is the meal of Rimi Halley? Answer:",
    "Dava": "Question: What is the club of Dava Tolard? Answer:",
}


def main() -> dict[str, str]:
    """A compact adapter a user; the maps that all users share stay with the generator."""
    model = GenerativeAdapter.from_pretrained(GENERATOR)
    adapters = {user: model.stream().append(text).compact() for user, text in MEMORIES.items()}
    rows = generate(model, list(QUESTIONS.values()), list(adapters.values()), Sampling(max_new_tokens=8, stop=(".",)))
    answers = {user: row.text.strip() for user, row in zip(QUESTIONS, rows, strict=True)}
    for user, answer in answers.items():
        print(f"{user} ({adapters[user].nbytes:,} bytes of memory): {QUESTIONS[user]} {answer}")
    return answers


if __name__ == "__main__":
    main()

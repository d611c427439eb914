"""What is asked about a conversation: its next turn, or what is known of a speaker."""

from collections.abc import Sequence

from gakernels.evaluation.records import Question


def conversation(turns: Sequence[tuple[str, str]]) -> str:
    """Turns, each of a speaker and a text, one a line."""
    return "\n".join(f"{speaker}: {text}" for speaker, text in turns)


def response_questions(turns: Sequence[tuple[str, str]], name: str) -> tuple[Question, ...]:
    """For every turn but the first: the conversation so far and the speaker; the gold answer is what was said."""
    return tuple(
        Question(f"{conversation(turns[:n])}\n{speaker}:", (text,), id=f"{name}/{n}")
        for n, (speaker, text) in enumerate(turns)
        if n > 0
    )


def recall_questions(personas: Sequence[tuple[str, Sequence[str]]], name: str) -> tuple[Question, ...]:
    """What is known of each speaker; the gold answer is all sentences of the persona together."""
    return tuple(
        Question(f"What is known about {speaker}?", (" ".join(sentences),), id=f"{name}/{speaker}")
        for speaker, sentences in personas
        if sentences
    )

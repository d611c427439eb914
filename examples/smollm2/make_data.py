"""Questions about short texts for `smollm2-135m-finetuning.yaml`: gold ones, and gaps in the texts themselves.

    python make_data.py --squad squad_train.jsonl --nq-swap nq_swap_train.jsonl --books books/train --output data

Gold questions come from SQuAD and NQ-Swap, as flat rows {context, question, answer}. There are few of them for a
generator that learns to read, so most questions are made: a name, a number or a noun phrase of a sentence is taken out
and asked for ("In what year was the abbey founded by monks from Cluny?"), as in unsupervised question answering (Lewis
et al. 2019, arXiv 1906.04980). And so that answers can't be learned by heart, every passage is there several times, all
but once with its gold answers exchanged for others of their kind, as in NQ-Swap. `long/several.jsonl` has texts of
two to four passages. Every tenth passage is held out, also at the start, in the middle and at the end of longer texts
of held-out passages (`held-out/squad_start_384.jsonl`, by words). NQ-Swap has a passage several times with different
answers: it is known by its text without the answer.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from random import Random

from gakernels.data.bad_records import BadRecords
from gakernels.data.records import read_records

HELD_OUT_OF = 10
PARAGRAPH_WORDS = (25, 220)
QUESTIONS = 4
SEVERAL_CHARACTERS = 2000  # most of a text of several passages
PLACED_WORDS = (384, 1536)  # with SmolLM2 about 630 and 2,260 tokens
PLACES_OF_PASSAGE = ("start", "middle", "end")

SENTENCE_END = re.compile(r"(?<=[.!?])[\"”']?\s+(?=[A-Z\"“'])")
NUMBER = re.compile(r"\b\d[\d,.]*\d\b|\b\d+\b")
NAME = re.compile(r"\b[A-Z][\w'\u2019-]+(?: (?:of |the |de |and )?[A-Z][\w'\u2019-]+)*")
NOUNS = re.compile(
    r"\b(?:a|an|the|its|his|her|their) ((?:[a-z][\w-]+ ?){1,3})"
    r"(?= (?:of|in|and|to|that|which|for|with|on|by|from|as|at|or|is|was|were|are|had|has)\b|[,.;:])"
)
YEAR = re.compile(r"1\d{3}|20\d{2}")
OPENERS = {"The", "A", "An", "In", "It", "He", "She", "They", "On", "At"}
PLACES = {"in", "at", "near", "from", "to"}


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--squad", type=Path, required=True, help="flat rows of SQuAD")
    parser.add_argument("--nq-swap", type=Path, required=True, help="flat rows of NQ-Swap")
    parser.add_argument("--books", type=Path, required=True, help="folder of books, JSON lines with `text`")
    parser.add_argument("--book-passages", type=int, default=30000)
    parser.add_argument("--copies", type=int, default=8, help="of a passage with gold questions (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    parts = {name: split(read_gold(path)) for name, path in (("squad", options.squad), ("nq_swap", options.nq_swap))}
    others = by_kind(qa["answers"][0] for training, _ in parts.values() for row in training for qa in row["qas"])
    for name, (training, held_out) in parts.items():
        write(options.output / "held-out" / f"{name}.jsonl", held_out)
        rng = Random(f"{options.seed} {name} held out")
        write(options.output / "held-out" / f"short_{name}.jsonl", (shorten(row, rng) for row in held_out))
        rng = Random(f"{options.seed} {name}")
        copies = [exchanged(row, others, rng) if copy else row for copy in range(options.copies) for row in training]
        write(options.output / "long" / f"{name}.jsonl", (with_gaps(row, rng) for row in copies))
        write(options.output / "short" / f"{name}.jsonl", (with_gaps(shorten(row, rng), rng) for row in copies))
        if name == "squad":
            asked = [with_gaps(row, rng) for row in copies]
            write(options.output / "long" / "several.jsonl", several(asked, len(training), rng))
            for words in PLACED_WORDS:
                for place in PLACES_OF_PASSAGE:
                    rng = Random(f"{options.seed} {words}")  # the same texts for each place
                    path = options.output / "held-out" / f"{name}_{place}_{words}.jsonl"
                    write(path, (placed(row, held_out, words, place, rng) for row in held_out))
    rng = Random(f"{options.seed} books")
    books = list(book_passages(options.books, options.book_passages, rng))
    write(options.output / "long" / "books.jsonl", (with_gaps({"context": text, "qas": []}, rng) for text in books))
    pieces = ({"context": text, "qas": []} for text in (piece(sentences(text), rng) for text in books))
    write(options.output / "short" / "books.jsonl", (with_gaps(row, rng) for row in pieces))


def read_gold(path: Path) -> list[dict]:
    """A row for each passage, with all its questions."""
    passages: dict[str, list[dict]] = {}
    for record in read_records(path, BadRecords(strict=True)):
        row = record.entries
        passages.setdefault(plain(row["context"]), []).append({"question": row["question"], "answers": [row["answer"]]})
    return [{"context": context, "qas": qas} for context, qas in passages.items()]


def plain(text: str) -> str:
    """A passage without the tags and the spaced punctuation of Natural Questions."""
    text = re.sub(r"<[^>]*>", " ", text)
    text = re.sub(r"``\s*|\s*''", '"', text)
    text = re.sub(r" +([,.;:!?%)\]]|'s\b|n't\b)", r"\1", text)
    return re.sub(r"\s+", " ", re.sub(r"([(\[$]) +", r"\1", text)).strip()


def split(rows: Sequence[dict]) -> tuple[list[dict], list[dict]]:
    """Rows to train on, and every tenth passage."""
    parts: tuple[list[dict], list[dict]] = ([], [])
    for row in rows:
        text = row["context"].replace(row["qas"][0]["answers"][0], "")
        parts[int(hashlib.sha256(text.encode()).hexdigest(), 16) % HELD_OUT_OF == 0].append(row)
    return parts


def by_kind(answers: Iterable[str]) -> dict[tuple[str, int], list[str]]:
    """Different answers by their kind."""
    kinds: dict[tuple[str, int], list[str]] = {}
    for answer in dict.fromkeys(answers):
        kinds.setdefault(kind(answer), []).append(answer)
    return kinds


def kind(answer: str) -> tuple[str, int]:
    """A year, a number, a name or something else, and the number of words, up to three."""
    if YEAR.fullmatch(answer):
        return "year", 1
    first = "number" if re.search(r"\d", answer) else "other" if answer[0].islower() else "name"
    return first, min(len(answer.split()), 3)


def exchanged(row: dict, others: dict[tuple[str, int], list[str]], rng: Random) -> dict:
    """The row with each gold answer exchanged for one of its kind, in passage, questions and answers."""
    text = json.dumps(row, ensure_ascii=False)
    for answer in dict.fromkeys(qa["answers"][0] for qa in row["qas"]):
        other = rng.choice(others[kind(answer)])
        found, new = (json.dumps(part, ensure_ascii=False)[1:-1] for part in (answer, other))
        if other not in row["context"]:
            text = re.sub(rf"(?<!\w){re.escape(found)}(?!\w)", lambda _, new=new: new, text)
    return json.loads(text)


def sentences(text: str) -> list[str]:
    """Its sentences, by punctuation."""
    return [sentence for sentence in SENTENCE_END.split(text) if sentence]


def piece(parts: Sequence[str], rng: Random, around: int | None = None) -> str:
    """One to three sentences that follow one another, of at most 60 words unless one alone has more."""
    count = rng.choice((1, 2, 2, 3))
    start = rng.randrange(max(1, len(parts) - count + 1)) if around is None else max(0, around - rng.randrange(count))
    chosen = list(parts[start : start + count])
    while len(chosen) > 1 and sum(len(sentence.split()) for sentence in chosen) > 60:
        chosen.pop(0 if around is not None and start + len(chosen) - 1 > around else -1)
        start += around is not None and start + len(chosen) > around
    return " ".join(chosen)


def shorten(row: dict, rng: Random) -> dict:
    """The sentences around the answer of one of its questions, with those questions that they still answer."""
    parts = sentences(row["context"])
    answer = rng.choice(row["qas"])["answers"][0]
    around = next((number for number, sentence in enumerate(parts) if answer in sentence), 0)
    text = parts[around] if len(parts) == 1 else piece(parts, rng, around)
    text = text if answer in text else parts[around]
    return {"context": text, "qas": [qa for qa in row["qas"] if qa["answers"][0] in text]}


def several(rows: Sequence[dict], passages: int, rng: Random) -> Iterator[dict]:
    """Half as many texts as rows, of two to four passages, with questions about any of them.

    The rows are copies of so many passages; a text has none of them twice.
    """
    for _ in range(len(rows) // 2):
        first = passages * rng.randrange(len(rows) // passages)
        chosen = rng.sample(rows[first : first + passages], rng.choice((2, 3, 3, 4)))
        while len(chosen) > 2 and sum(len(row["context"]) for row in chosen) > SEVERAL_CHARACTERS:
            chosen.pop()
        qas = [qa for row in chosen for qa in row["qas"]]
        rng.shuffle(qas)
        yield {"context": "\n\n".join(row["context"] for row in chosen), "qas": qas[:QUESTIONS]}


def placed(row: dict, rows: Sequence[dict], words: int, place: str, rng: Random) -> dict:
    """The passage at the start, in the middle or at the end of a text of so many words, the rest other passages."""
    others, length = [], len(row["context"].split())
    for other in rng.sample(rows, len(rows)):
        if other is not row and length < words:
            others.append(other["context"])
            length += len(other["context"].split())
    before = {"start": 0, "middle": len(others) // 2, "end": len(others)}[place]
    return {"context": "\n\n".join([*others[:before], row["context"], *others[before:]]), "qas": row["qas"]}


def book_passages(folder: Path, count: int, rng: Random) -> Iterator[str]:
    """Paragraphs of the books, evenly drawn."""
    found = []
    for path in sorted(folder.iterdir()):
        for record in read_records(path, BadRecords(strict=True)):
            for paragraph in re.split(r"\n\s*\n", record.entries["text"]):
                text = " ".join(paragraph.split())
                if PARAGRAPH_WORDS[0] <= len(text.split()) <= PARAGRAPH_WORDS[1] and "|" not in text:
                    found.append(text)
    rng.shuffle(found)
    yield from found[:count]


def with_gaps(row: dict, rng: Random) -> dict:
    """The row, with questions made of its text."""
    made = list(gaps(row["context"], rng))
    rng.shuffle(made)
    qas = [{"question": question, "answers": [answer]} for question, answer in made[: QUESTIONS - len(row["qas"])]]
    return {"context": row["context"], "qas": [*row["qas"], *qas]}


def gaps(text: str, rng: Random) -> Iterator[tuple[str, str]]:
    """Questions about spans that occur once in the text, with the spans."""
    for sentence in sentences(text):
        for span in spans(sentence):
            answer = sentence[span.start(span.lastindex or 0) : span.end(span.lastindex or 0)].strip()
            if text.count(answer) == 1:
                question = ask(sentence, sentence.index(answer), answer, rng)
                if question:
                    yield question, answer


def spans(sentence: str) -> Iterator[re.Match[str]]:
    """Numbers, names (but a single first word) and noun phrases."""
    yield from NUMBER.finditer(sentence)
    yield from (found for found in NAME.finditer(sentence) if found.start() or " " in found.group())
    yield from NOUNS.finditer(sentence)


def ask(sentence: str, start: int, answer: str, rng: Random) -> str | None:
    """A question whose answer is taken out of the sentence: its clause, with a question word in the gap or in front."""
    left, right = sentence[:start], sentence[start + len(answer) :]
    if rng.random() < 0.6:  # the clause alone
        left, right = re.split(r"[,;:] ", left)[-1], re.split(r"[,;:.] ?", right)[0]
    left, right = left.split()[-14:], right.rstrip(".!?\"”' ").split()[:14]
    if len(left) + len(right) < 4:
        return None
    word = question_word(left, answer, rng)
    if left and word in ("who", "what") and left[-1].lower() in ("a", "an", "the"):
        left = left[:-1]
    left = lower_first(left)
    words = [word, *left, *right] if rng.random() < 0.4 else [*left, word, *right]
    words = [word for word in words if rng.random() > 0.08 or len(word) > 4]
    question = " ".join(words).strip(" ,;:")
    return question[:1].upper() + question[1:] + "?"


def lower_first(words: Sequence[str]) -> list[str]:
    """The words, with a first one such as "The" or "In" in lower case."""
    return [word.lower() if not number and word in OPENERS else word for number, word in enumerate(words)]


def question_word(left: Sequence[str], answer: str, rng: Random) -> str:
    """What asks for such an answer behind such words."""
    before = left[-1].lower() if left else ""
    if YEAR.fullmatch(answer):
        return rng.choice(("what year", "when", "which year")) if before != "in" else "what year"
    if answer[0].isdigit():
        return rng.choice(("how many", "what number", "how much"))
    if answer[0].isupper():
        return rng.choice(("where", "what place", "what")) if before in PLACES else rng.choice(("who", "what", "which"))
    return rng.choice(("what", "what", "which thing"))


def write(path: Path, rows: Iterable[dict]) -> None:
    """JSON lines of the rows that have a question."""
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [row for row in rows if row["qas"]]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept)
    path.write_text(text, encoding="utf-8")
    print(f"{path}: {len(kept)} contexts, {sum(len(row['qas']) for row in kept)} questions")


if __name__ == "__main__":
    main()

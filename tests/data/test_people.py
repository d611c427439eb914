"""The demo's corpus and tokenizer."""

from pathlib import Path
from random import Random

import pytest
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from gakernels.data.people import (
    ATTRIBUTES,
    FIRST_NAMES,
    LAST_NAMES,
    Document,
    Fact,
    Person,
    Split,
    any_person_level,
    draw_document,
    draw_person,
    is_held_out,
)
from gakernels.demo.tokenizer import build_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def _value_words() -> list[str]:
    """The words of each attribute's values, every word once per attribute."""
    return [word for attribute in ATTRIBUTES for word in {w for value in attribute.values for w in value.split()}]


def test_a_word_is_a_name_or_belongs_to_one_attribute() -> None:
    words = [*FIRST_NAMES, *LAST_NAMES, *_value_words()]
    assert len(words) == len(set(words)) == 2 * 200 + 24 * 16
    assert all(len(set(attribute.values)) == 64 for attribute in ATTRIBUTES)


def test_one_pair_of_names_in_ten_is_held_out_and_every_name_is_in_both_splits() -> None:
    held_out = [(i, j) for i in range(200) for j in range(200) if is_held_out(i, j)]
    assert len(held_out) == 4000
    assert {i for i, _ in held_out} == {j for _, j in held_out} == set(range(200))


@pytest.mark.parametrize("split", ["train", "test"])
def test_people_come_from_their_split(split: Split) -> None:
    rng = Random(0)
    for _ in range(200):
        person = draw_person(rng, split)
        held_out = is_held_out(FIRST_NAMES.index(person.first), LAST_NAMES.index(person.last))
        assert held_out == (split == "test")


def test_a_seed_determines_the_document() -> None:
    assert draw_document(Random(3), people=2) == draw_document(Random(3), people=2)
    assert draw_document(Random(3), people=2) != draw_document(Random(4), people=2)


def test_the_text_of_a_seed_does_not_change() -> None:
    document = draw_document(Random(0), facts_per_person=(2, 2))
    assert document.text() == (
        "The job of Fele Corsen is lamp tester. The vehicle that Fele Corsen drives is rental scooter."
    )
    assert document.questions()[0] == ("Question: What is the job of Fele Corsen? Answer:", "lamp tester")


def test_a_document_has_the_people_and_facts_asked_for() -> None:
    document = draw_document(Random(1), people=4, facts_per_person=(5, 8))
    owned = [{f.attribute.name for f in document.facts if f.person == person} for person in document.people]
    assert len(set(document.people)) == 4
    assert all(5 <= len(names) <= 8 for names in owned)
    assert len(document.facts) == sum(map(len, owned))
    assert owned[0] == owned[1] == owned[2] == owned[3]


def test_too_many_facts_are_refused() -> None:
    with pytest.raises(ValueError, match="at most 24 facts"):
        draw_document(Random(0), facts_per_person=(20, 25))


def test_answers_are_told_in_the_document_after_the_name() -> None:
    document = draw_document(Random(2), people=3, split="test")
    for fact, (question, answer) in zip(document.facts, document.questions(), strict=True):
        assert fact.attribute.name in question
        assert str(fact.person) in question
        assert answer in fact.attribute.values
        sentences = [s for s in document.text().split(". ") if str(fact.person) in s and answer in s]
        assert any(s.index(str(fact.person)) < s.index(answer) for s in sentences)


def test_any_person_level_counts_owners_and_equal_values() -> None:
    a, b = Person("Mira", "Tolov"), Person("Kalo", "Fenard")
    pet, town = ATTRIBUTES[2], ATTRIBUTES[0]
    different = (Fact(a, pet, pet.values[0]), Fact(b, pet, pet.values[1]))
    equal = (Fact(a, pet, pet.values[0]), Fact(b, pet, pet.values[0]))
    alone = (Fact(a, town, town.values[0]),)
    assert any_person_level(Document((a, b), different)) == 0.5
    assert any_person_level(Document((a, b), equal)) == 1.0
    assert any_person_level(Document((a, b), different + alone)) == pytest.approx(2 / 3)


def test_every_word_is_one_token(tokenizer: PreTrainedTokenizerFast) -> None:
    words = [*FIRST_NAMES, *LAST_NAMES, *_value_words()]
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    assert {len(row) for row in ids} == {1}
    assert len({row[0] for row in ids} - {tokenizer.unk_token_id}) == len(words)


def test_documents_and_questions_are_spelled_exactly(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = Random(5)
    for _ in range(20):
        document = draw_document(rng, people=rng.randint(1, 3))
        answered = [f"{question} {answer}." for question, answer in document.questions()]
        for text in (document.text(), *answered):
            ids = tokenizer(text)["input_ids"]
            assert ids[0] == tokenizer.bos_token_id
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_a_document_of_eighteen_facts_fits_two_chunks(tokenizer: PreTrainedTokenizerFast) -> None:
    rng = Random(6)
    texts = [draw_document(rng, facts_per_person=(18, 18)).text() for _ in range(50)]
    lengths = [len(ids) for ids in tokenizer(texts)["input_ids"]]
    assert 128 < max(lengths) <= 256


def test_the_tokenizer_survives_saving(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    LlamaConfig(vocab_size=len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    document = draw_document(Random(7))
    ids = tokenizer(document.text())["input_ids"]
    assert loaded(document.text())["input_ids"] == ids
    assert loaded.decode(ids, skip_special_tokens=True) == document.text()
    for name in ("pad", "bos", "eos", "unk"):
        assert getattr(loaded, f"{name}_token_id") == getattr(tokenizer, f"{name}_token_id")

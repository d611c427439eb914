"""Questions and answers as tokens."""

import pytest
from invented import make_tokenizer
from worlds import answer_of, make, merged, run, scenario, text

from gakernels.evaluation.prompts import Asker

TEMPLATE = "{{ bos_token }}{% for m in messages %}w10 {{ m.content }} w11{% endfor %}"
TOKENIZER = make_tokenizer()


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def test_plain_text() -> None:
    question, answer = text(5), text(2)
    asker = Asker(TOKENIZER)
    assert asker.question(question) == [1, *ids(question)]
    assert asker.answered(question, answer) == ([1, *ids(question), *ids(answer)], 6)
    assert asker.answered("", "w3") == ([1, 3], 1)


def test_an_answer_without_tokens_of_its_own_still_has_one() -> None:
    tokens, start = Asker(TOKENIZER).answered("w3 w4", "")
    assert (tokens, start) == ([1, 3, 4], 2)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_chat(template: str | None) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    question, answer = text(5), text(2)
    asker = Asker(tokenizer, chat=True)
    written = f"w10 {question} w11" if template else f"User: {question}\nAssistant:"
    asked = [1, *ids(written)]
    assert asker.question(question) == asked
    assert asker.answered(question, answer) == (asked + ids(answer), len(asked))


def test_methods_ask_in_the_chat_template() -> None:
    model, asked = make(), scenario(3)
    model.tokenizer.chat_template = TEMPLATE
    runner = run(model, asked, "prompt", "adapter", chat=True)
    for number, case in enumerate(asked.cases):
        adapter = model.stream().append(case.context.text).adapter()
        for place, question in enumerate(case.context.questions):
            front = f"w10 {case.context.text}\n\n{question.text} w11"
            assert runner.log.answers("prompt")[number, place, -1] == answer_of(merged(model, None), model, front)
            alone = f"w10 {question.text} w11"
            assert runner.log.answers("adapter")[number, place, -1] == answer_of(merged(model, adapter), model, alone)

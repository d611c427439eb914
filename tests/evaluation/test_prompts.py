"""The prompts are figure 7's; questions and answers as tokens."""

import pytest
from invented import make_tokenizer
from worlds import answer_of, make, merged, run, scenario, text

from gakernels.errors import InputError
from gakernels.evaluation.prompts import Asker, demonstration_text, icl_prompt, qa_prompt

# The figure's words; where its lines end does not show in the text of the paper, so space is compared as one.
FIGURE_7_QA = """
{Context}
Instruction: Answer the question based on the context above. Respond with a short phrase only. Keep the answer short and
concise, without any explanation or additional words
Question: {Question}
Answer:
"""
FIGURE_7_ICL = """
Input: {demo input}
Output: {demo output}
Input: {demo input}
Output: {demo output}
Instruction: Based on the demonstration above, provide a short and concise answer, without any explanation or additional
words.
Input: {input}
Output:
"""


def test_the_words_are_the_figures() -> None:
    assert qa_prompt("{Question}", "{Context}").split() == FIGURE_7_QA.split()
    shown = demonstration_text([("{demo input}", "{demo output}")] * 2)
    assert icl_prompt("{input}", shown).split() == FIGURE_7_ICL.split()


def test_the_lines_are_those_of_the_released_code() -> None:
    instruction = (
        "Instruction: Answer the question based on the context above. Respond with a short phrase only. "
        "Keep the answer short and concise, without any explanation or additional words\n\n"
    )
    assert qa_prompt("Who?", "A text.") == f"A text.\n\n{instruction}Question: Who?\nAnswer:"
    assert qa_prompt("Who?", "A text.", "released") == f"A text.\n\n## {instruction}Question: Who?\nAnswer:"
    assert qa_prompt("Who?") == f"{instruction}Question: Who?\nAnswer:"
    assert qa_prompt("Who?", style="bare") == "Who?"
    assert qa_prompt("Who?", "A text.", "plain") == "A text.\n\nQuestion: Who?\nAnswer:"
    assert qa_prompt("Who?", "A text.", "bare") == "A text.\n\nWho?"
    shown = demonstration_text([("1", "one"), ("2", "two")])
    assert shown == "Input: 1\nOutput: one\n\nInput: 2\nOutput: two"
    assert icl_prompt("3", shown, "bare") == shown + "\n\nInput: 3\nOutput:"
    instruction = (
        "## Instruction: Based on the demonstration above, provide a short and concise answer, without any explanation "
        "or additional words.\n\n"
    )
    assert icl_prompt("3", shown, "released") == f"{shown}\n\n{instruction}Input: 3\nOutput:"
    assert icl_prompt("3", style="released") == f"{instruction}Input: 3\nOutput:"


def test_other_styles_are_refused() -> None:
    for prompt in (qa_prompt, icl_prompt):
        with pytest.raises(InputError, match="style must be one of paper, released, plain, bare, but it is 'mine'"):
            prompt("x", None, "mine")


# Questions and answers as tokens

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

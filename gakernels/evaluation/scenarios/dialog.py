"""Questions about what was said in earlier conversations (section 4.3 of the paper)."""

from __future__ import annotations

from collections.abc import Sequence

from gakernels.evaluation.cases import Case, Request, Scenario, limited, with_others
from gakernels.evaluation.prompts import QA_NEW_TOKENS, QA_STOPS, qa_prompt
from gakernels.evaluation.records import Dataset, Question
from gakernels.evaluation.scenarios.docqa import AskSettings, measure_answers, question_requests


def dialog(
    data: Dataset,
    questions: str,
    protocol: str = "official",
    training: Sequence[Question] = (),
    settings: AskSettings | None = None,
) -> Scenario:
    """The scenario: a context is a person's conversations.

    Args:
        data: conversations with questions (`msc.read_msc`, `persona_chat.read_persona_chat`, `locomo.read_locomo`).
        questions: which kind they are of: `response` asks for the next turn, without an instruction.
        protocol: which gold answers count, see `metrics.answer_f1`; the released code has no personalisation.
        training: questions about other conversations, for supervised fine-tuning.
        settings: how questions are asked.

    Raises:
        InputError: there is no such protocol or style.
    """
    settings = settings or AskSettings()
    style, adapted_style = settings.styles(protocol)
    if questions == "response":
        style = adapted_style = "bare"
    cell = (("questions", questions),)
    cases = with_others([Case(context, cell) for context in limited(data.contexts, settings.limit)])

    def ask(number: int, case: Case) -> list[Request]:
        return question_requests(number, case, style, adapted_style)

    return Scenario(
        "dialog",
        protocol,
        tuple(cases),
        ask,
        measure_answers,
        settings.new_tokens or QA_NEW_TOKENS,
        QA_STOPS,
        tuple(training),
        lambda question: qa_prompt(question, None, adapted_style),
        {"questions": questions, "style": style, "adapted_style": adapted_style},
        vars(data.skipped),
    )

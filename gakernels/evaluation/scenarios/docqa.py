"""Questions about documents, which are grouped to contexts of given lengths (section 4.1 of the paper)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from gakernels.errors import InputError
from gakernels.evaluation.cases import Answers, Case, Cell, Measurements, Request, Scenario, limited, with_others
from gakernels.evaluation.metrics import PROTOCOLS, answer_exact_match, answer_f1
from gakernels.evaluation.prompts import QA_NEW_TOKENS, QA_STOPS, qa_prompt
from gakernels.evaluation.records import Dataset, Question
from gakernels.evaluation.samples import Sample
from gakernels.evaluation.squad import group_contexts

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768)
PARTS = {"official": "all", "released": "first_tenth"}
STYLES = {"official": ("paper", "paper"), "released": ("released", "bare")}


@dataclass(frozen=True)
class AskSettings:
    """How questions are asked, where it is not as the protocol says.

    Attributes:
        style: of the base model's prompts: `paper`, `released` or `bare`; None for the protocol's.
        adapted_style: of an adapted or tuned model's.
        new_tokens: most tokens of an answer; None for the scenario's.
        limit: most questions, in each cell; None for all.
    """

    style: str | None = None
    adapted_style: str | None = None
    new_tokens: int | None = None
    limit: int | None = None

    def __post_init__(self) -> None:
        for name in ("new_tokens", "limit"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, but it is {value}")

    def styles(self, protocol: str) -> tuple[str, str]:
        """Of the base model's prompts and of an adapted model's."""
        if protocol not in PROTOCOLS:
            raise InputError(f"protocol must be one of {', '.join(PROTOCOLS)}, but it is {protocol!r}")
        style, adapted = STYLES[protocol]
        return self.style or style, self.adapted_style or adapted


def docqa(
    data: Dataset,
    measure: Callable[[str], int],
    lengths: Sequence[int] | None = LENGTHS,
    protocol: str = "official",
    part: str | None = None,
    training: Sequence[Question] = (),
    settings: AskSettings | None = None,
) -> Scenario:
    """The scenario.

    Args:
        data: documents with questions (`squad.read_squad`).
        measure: counts the tokens of a text.
        lengths: average tokens of a context, one cell each; None: each document is a context, in a single cell.
        protocol: `official`: all gold answers, all groups; `released`: one gold answer, the first tenth of the groups.
        part: of the groups, where it is not the protocol's.
        training: questions about other documents, for supervised fine-tuning.
        settings: how questions are asked.

    Raises:
        InputError: a length is below 1, or there is no such protocol, part or style.
    """
    settings = settings or AskSettings()
    style, adapted_style = settings.styles(protocol)
    part = part or PARTS[protocol]
    cases: list[Case] = []
    cell_lengths: list[int | str] = list(dict.fromkeys(lengths)) if lengths is not None else ["own"]
    for length in cell_lengths:
        contexts = data.contexts if isinstance(length, str) else group_contexts(data.contexts, length, measure, part)
        cells = [Case(context, (("length", length),)) for context in limited(contexts, settings.limit)]
        cases += with_others(cells, len(cases))

    def ask(number: int, case: Case) -> list[Request]:
        return question_requests(number, case, style, adapted_style)

    return Scenario(
        "docqa",
        protocol,
        tuple(cases),
        ask,
        measure_answers,
        settings.new_tokens or QA_NEW_TOKENS,
        QA_STOPS,
        tuple(training),
        lambda question: qa_prompt(question, None, adapted_style),
        {
            "part": part,
            "style": style,
            "adapted_style": adapted_style,
            "lengths": cell_lengths,
        },
        vars(data.skipped),
    )


def question_requests(number: int, case: Case, style: str, adapted_style: str) -> list[Request]:
    """A request for each question of a case, to be answered in words."""
    return [
        Request(
            number,
            place,
            query=question.text,
            prompt=qa_prompt(question.text, None, style),
            adapted_prompt=qa_prompt(question.text, None, adapted_style),
        )
        for place, question in enumerate(case.context.questions)
    ]


def measure_answers(scenario: Scenario, answers: Answers) -> Measurements:
    """F1 and exact match of each question, in each cell."""
    found: dict[tuple[Cell, str], dict[Hashable, Sample]] = {}
    for key in sorted(answers):
        case = scenario.cases[key[0]]
        gold = case.context.questions[key[1]].answers
        for metric, score in (("f1", answer_f1), ("exact_match", answer_exact_match)):
            value = score(str(answers[key]), gold, scenario.protocol)
            found.setdefault((case.cell, metric), {})[key] = Sample(key[0], value)
    return found

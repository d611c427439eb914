"""Users of the tests."""

from dataclasses import dataclass

from gakernels import CompactAdapter
from gakernels.data.people import Document


@dataclass(frozen=True)
class User:
    """Somebody with a document, its compact adapter, and a question about it with the right answer."""

    document: Document
    adapter: CompactAdapter
    question: str
    answer: str

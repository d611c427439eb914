"""The methods: the generated adapter, what else one could do with a context, and controls. One interface for all."""

from gakernels.evaluation.methods.adapter import AdapterWithRetrieval, GeneratedAdapter, MergedAdapter, StreamedAdapter
from gakernels.evaluation.methods.base import Method, MethodSettings, Prepared
from gakernels.evaluation.methods.closed_book import ClosedBook
from gakernels.evaluation.methods.context_tuning import ContextTuning
from gakernels.evaluation.methods.other_adapter import OtherAdapter
from gakernels.evaluation.methods.prompt import FullPrompt
from gakernels.evaluation.methods.retrieval import Retrieval
from gakernels.evaluation.methods.static_lora import StaticLoraControl
from gakernels.evaluation.methods.tuned import (
    ContinualPretraining,
    ContinualPretrainingFull,
    FewShotTuning,
    FewShotTuningFull,
    SupervisedTuning,
    SupervisedTuningFull,
)

METHODS: dict[str, type[Method]] = {
    "closed_book": ClosedBook,
    "prompt": FullPrompt,
    "retrieval": Retrieval,
    "adapter": GeneratedAdapter,
    "adapter_streaming": StreamedAdapter,
    "adapter_merged": MergedAdapter,
    "adapter_retrieval": AdapterWithRetrieval,
    "other_adapter": OtherAdapter,
    "static_lora": StaticLoraControl,
    "sft_lora": SupervisedTuning,
    "sft_full": SupervisedTuningFull,
    "cpt_lora": ContinualPretraining,
    "cpt_full": ContinualPretrainingFull,
    "context_lora": ContextTuning,
    "few_shot_lora": FewShotTuning,
    "few_shot_full": FewShotTuningFull,
}
CONTROLS = ("other_adapter", "static_lora")

__all__ = ["CONTROLS", "METHODS", "Method", "MethodSettings", "Prepared"]

"""Adapters of many users at once: batched generation, a bounded cache, and a server (extra `serve`)."""

from gakernels.serving.adapter_cache import AdapterCache
from gakernels.serving.decoding_batch import DecodingBatch
from gakernels.serving.sampling import Sampling
from gakernels.serving.scheduler import Scheduler, generate

__all__ = ["AdapterCache", "DecodingBatch", "Sampling", "Scheduler", "generate"]

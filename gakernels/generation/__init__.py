"""Batched generation under the adapters of many users."""

from gakernels.generation.decoding_batch import DecodingBatch
from gakernels.generation.sampling import Sampling
from gakernels.generation.scheduler import Generation, Piece, Scheduler, generate

__all__ = ["DecodingBatch", "Generation", "Piece", "Sampling", "Scheduler", "generate"]

"""Data for pretraining: documents to a token cache, to segments, to the segments of a step (docs/data.md)."""

from gakernels.training.data.bad_records import BadRecords
from gakernels.training.data.cache import TokenCache
from gakernels.training.data.caching import token_cache
from gakernels.training.data.corpus import Corpus, hold_out_documents
from gakernels.training.data.files import find_files
from gakernels.training.data.mixture import JoinedSegments, MixedOrder
from gakernels.training.data.order import Order, ShuffledOrder
from gakernels.training.data.segments import (
    Segments,
    SegmentSet,
    document_segments,
    packed_segments,
)
from gakernels.training.data.sources import FileSource, HubSource, Source, source_of

__all__ = [
    "BadRecords",
    "Corpus",
    "FileSource",
    "HubSource",
    "JoinedSegments",
    "MixedOrder",
    "Order",
    "SegmentSet",
    "Segments",
    "ShuffledOrder",
    "Source",
    "TokenCache",
    "document_segments",
    "find_files",
    "hold_out_documents",
    "packed_segments",
    "source_of",
    "token_cache",
]

"""Data for pretraining: from documents to a token cache, segments and the segments of a step (docs/pretraining.md)."""

from gakernels.data.bad_records import BadRecords
from gakernels.data.cache import TokenCache
from gakernels.data.caching import token_cache
from gakernels.data.corpus import Corpus, hold_out_documents
from gakernels.data.files import find_files
from gakernels.data.mixture import JoinedSegments, MixedOrder
from gakernels.data.order import Order, ShuffledOrder
from gakernels.data.segments import (
    Segments,
    SegmentSet,
    document_segments,
    packed_segments,
)
from gakernels.data.sources import FileSource, HubSource, Source, source_of

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

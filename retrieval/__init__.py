"""Documents to passages: read, chunk, index, search, quote."""

from .chunk import Chunk, chunk
from .documents import Document, read_documents
from .index import Encode, Index, build_index
from .quote import fit_passages, with_context

__all__ = [
    "Chunk",
    "Document",
    "Encode",
    "Index",
    "build_index",
    "chunk",
    "fit_passages",
    "read_documents",
    "with_context",
]

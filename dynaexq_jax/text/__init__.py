"""Text in and out: tokenizer, documents and windows, streaming detokenizer, stop strings."""

from dynaexq_jax.text.detokenize import StreamDetokenizer
from dynaexq_jax.text.documents import read_windows, split_documents, token_stream
from dynaexq_jax.text.stops import StopMatcher
from dynaexq_jax.text.tokenizer import HfTokenizer, Message, Tokenizer, load_tokenizer

__all__ = [
    "HfTokenizer",
    "Message",
    "StopMatcher",
    "StreamDetokenizer",
    "Tokenizer",
    "load_tokenizer",
    "read_windows",
    "split_documents",
    "token_stream",
]

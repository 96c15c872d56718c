"""For the tests of plug-ins: a tiny model and tokenizer made in memory, and a kit that checks a part's promises.

    from llama_infer.testing import check_processor

    def test_my_part():
        check_processor(TopA(), top_a=[0.1, 0.5])

:func:`check_processor`, :func:`check_sampler` and :func:`check_stopping` raise :class:`ConformanceError`, which names
the promise that was broken and the case. :func:`make_rows` makes a batch for a part, :class:`FakeSequence` a sequence
for a criterion, :func:`sampling_step` a callable for benchmarks.
"""

from .cases import FakeSequence, make_rows, sampling_step
from .conformance import check_import, check_processor, check_sampler
from .criteria import check_stopping
from .declarations import ConformanceError
from .models import CHAT_TEMPLATE, CONTROL_TOKENS, VOCAB_SIZE, byte_tokenizer, tiny_llama

__all__ = [
    "CHAT_TEMPLATE",
    "CONTROL_TOKENS",
    "VOCAB_SIZE",
    "ConformanceError",
    "FakeSequence",
    "byte_tokenizer",
    "check_import",
    "check_processor",
    "check_sampler",
    "check_stopping",
    "make_rows",
    "sampling_step",
    "tiny_llama",
]

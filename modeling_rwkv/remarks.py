"""Imports transformers, and keeps quiet what libraries of quantization log meanwhile without anybody having asked.

Where torchao is installed, transformers imports it; torchao then logs which kernels for GPUs it cannot load on a CPU,
and torch what it finds outdated in torchao. bitsandbytes logs every cast of its inputs. The one line that a command
says of an error would be lost among those.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

LOGGERS = ("bitsandbytes", "torchao", "torch.utils._pytree")


@contextmanager
def no_remarks() -> Iterator[None]:
    """Without what these packages log below errors."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


with no_remarks():
    import transformers.modeling_utils  # noqa: F401

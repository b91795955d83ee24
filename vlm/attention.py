"""Which attention is computed where.

Flash attention reads no mask: it knows causal order, sliding windows and padding at either end. The
decode step needs more, and so do image tokens that see one another. So sampling never uses it
(`without_flash`), and families with such tokens refuse it (vlm/load.py).
"""

import contextlib
from collections.abc import Iterator

from torch import nn


@contextlib.contextmanager
def without_flash(language_model: nn.Module) -> Iterator[None]:
    """Inside, sdpa takes the place of flash attention; eager where the model has no sdpa.

    One token at a time, flash attention is no faster. Among rows of unequal length it waits for the
    device twice per layer and copies the whole cache.
    """
    configs = {}
    for module in language_model.modules():
        config = getattr(module, "config", None)
        if "flash" in (getattr(config, "_attn_implementation", None) or ""):
            configs[id(config)] = config
    before = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = "sdpa" if language_model._supports_sdpa else "eager"
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]

"""The engine's child with one part of its synchronisation left out: BROKEN in the environment."""

import os

from safetensors import safe_open
from vllm.v1.engine.llm_engine import LLMEngine

from vlm import engine_child, engine_worker

part = os.environ["BROKEN"]
if part == "prefix cache":
    LLMEngine.reset_prefix_cache = lambda self: True
elif part == "encoder cache":
    LLMEngine.reset_encoder_cache = lambda self: None
elif part == "head":
    load = engine_worker.Extension.load
    engine_worker.Extension.load = lambda self, path: load(self, path) + 1  # unnoticed by the count

    class WithoutHead:
        def __init__(self, *args):
            self.file = safe_open(*args)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def keys(self):
            return [name for name in self.file.keys() if name != "lm_head.weight"]

        def get_tensor(self, name):
            return self.file.get_tensor(name)

    engine_worker.safe_open = WithoutHead
elif part == "version":
    engine_child.SUPPORTED = "9."

engine_child.main()

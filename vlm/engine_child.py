"""vLLM as a process of its own, in an environment of its own: a child over a pipe, or a server.

    python -m vlm.engine_child --pipe FD       started by vlm/engine.py; reads its stdin
    python -m vlm.engine_child --model Qwen/Qwen2.5-VL-3B-Instruct --host 0.0.0.0 --port 8700

It knows vLLM and torch only. Messages are dicts, written by torch.save behind their length. Both
ways put them into one queue, which `Engine.run` reads between two of vLLM's steps. So requests that
come while others are sampled join them.

A server answers only those who know SAEI_ENGINE_TOKEN (an environment variable of both sides). One
that listens on this machine alone needs no token.
"""

import argparse
import hashlib
import hmac
import io
import os
import queue
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, BinaryIO

import torch
from PIL import Image

SUPPORTED = "0.32."  # the versions that the tests run with
TOKEN = "SAEI_ENGINE_TOKEN"
LOCAL = ("127.0.0.1", "localhost", "::1")

# How pictures reach vLLM, by the config's model_type. Each family was seen to give the trainer's
# log-probs (tests/engine/test_families.py).
FEATURES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")  # the policy's own features, as floats
PIXELS = ("llava", "llava_next", "internvl", "idefics3", "smolvlm")  # floats for vLLM's own tower
ROUNDED = 0.05  # normalised pixels differ by less between a picture and the same in 8 bits

Message = dict[str, Any]
Reply = Callable[[Message], None]


def pack(message: Message) -> bytes:
    out = io.BytesIO()
    torch.save(message, out)
    return out.getvalue()


def unpack(data: bytes) -> Message:
    return torch.load(io.BytesIO(data), weights_only=True)


def send(pipe: BinaryIO, message: Message) -> None:
    """Raises BrokenPipeError if nobody reads it."""
    data = pack(message)
    pipe.write(struct.pack("<Q", len(data)))
    pipe.write(data)
    pipe.flush()


def receive(pipe: BinaryIO) -> Message:
    """Raises EOFError when the other side is gone."""
    head = pipe.read(8)
    size = struct.unpack("<Q", head)[0] if len(head) == 8 else 1
    data = pipe.read(size) if len(head) == 8 else b""
    if len(data) < size:
        raise EOFError("the other side is gone")
    return unpack(data)


# ----------------------------------------------------------------------------------- the engine


def vllm_options(message: Message) -> dict[str, Any]:
    """Options of vLLM. message: model, dtype, memory, sleeps, tensor_parallel_size."""
    from transformers import AutoConfig
    from vllm.platforms import current_platform

    config = AutoConfig.from_pretrained(message["model"])
    overrides = {}
    if hasattr(config, "image_grid_pinpoints"):  # one tile, as in the policy
        overrides["image_grid_pinpoints"] = [[config.vision_config.image_size] * 2]
    # 0: the vision tower is not even loaded, where the trainer computes its features. Without a
    # tower vLLM would lose Qwen3-VL's deepstack features.
    deepstack = getattr(config.vision_config, "deepstack_visual_indexes", None)
    limit = 999 if config.model_type in PIXELS or deepstack else 0
    options = {
        "model": message["model"],
        "dtype": message["dtype"],
        "load_format": "dummy",  # the trainer sends every weight before it asks
        "max_model_len": -1,  # the longest that the memory allows
        "generation_config": "vllm",  # else the checkpoint's top-k would enter
        "enable_mm_embeds": True,
        "limit_mm_per_prompt": {"image": limit, "video": 0},
        "mm_processor_cache_gb": 0,
        "skip_mm_profiling": True,
        "mm_device_do_normalize": False,  # pixel values come normalised
        "logits_processors": ["vlm.engine_worker:Draw"],
        "worker_extension_cls": "vlm.engine_worker.Extension",
        "async_scheduling": False,  # the processor reads the tokens so far
        "disable_log_stats": True,
        "seed": 0,
        "hf_overrides": overrides,
    }
    if current_platform.is_cpu():
        # block_size: with a CPU's own 128, a short prompt fills no block, and none is shared.
        return options | {"kv_cache_memory_bytes": 2**30, "enforce_eager": True, "block_size": 32}
    options["gpu_memory_utilization"] = message["memory"]
    options["enable_sleep_mode"] = message["sleeps"]
    options["tensor_parallel_size"] = message["tensor_parallel_size"]
    return options


class Engine:
    """vLLM's engine and the queue of what it is asked: (message, reply) pairs."""

    def __init__(self, message: Message):
        import vllm
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.engine.llm_engine import LLMEngine

        if not vllm.__version__.startswith(SUPPORTED):
            raise ValueError(f"vLLM {vllm.__version__} is not supported, {SUPPORTED}* is")
        options = vllm_options(message)
        self.tiles = options["hf_overrides"].get("image_grid_pinpoints")
        self.vllm = LLMEngine.from_engine_args(EngineArgs(**options))
        self.sleeps, self.asleep = options.get("enable_sleep_mode", False), False
        self.queue: queue.SimpleQueue[tuple[Message, Reply]] = queue.SimpleQueue()
        self.asked = 0
        self.running: set[str] = set()  # "QUESTION.ROW"
        self.questions: dict[str, tuple[Reply, list]] = {}  # question -> reply, rows so far
        config = self.vllm.model_config
        self.info = {
            "vllm": vllm.__version__,
            "model": message["model"],
            "type": config.hf_config.model_type,
            "vocabulary": config.get_vocab_size(),
            "hidden": config.get_hidden_size(),
            "dtype": message["dtype"],
            "weights": None,  # the version of the weights, given by the trainer
            "steps": 0,  # of vLLM so far
        }

    def run(self) -> None:
        """Answer for ever. An exception of vLLM is told to all who wait, and ends it."""
        while True:
            asks: list[Reply] = []
            try:
                while not self.running or not self.queue.empty():
                    message, reply = self.queue.get()
                    asks = [reply]
                    self.handle(message, reply)
                self.step()
            except Exception as error:
                for reply in asks + [reply for reply, _ in self.questions.values()]:
                    reply(told(error))
                raise

    def handle(self, message: Message, reply: Reply) -> None:
        kind = message["kind"]
        if kind == "info":
            reply(self.info)
        elif kind == "weights":
            self.load(message, reply)
        elif kind == "sleep":
            self.rest()
            reply({})
        elif message["weights"] != self.info["weights"]:
            reply({"stale": self.info["weights"]})
        else:
            self.ask(message, reply)

    def ask(self, message: Message, reply: Reply) -> None:
        """Add all rows of a message's prompts to those that are sampled."""
        self.wake()
        try:
            prompts = [self.render(prompt) for prompt in message["prompts"]]
        except Exception as error:  # of the message: nothing of it has reached the engine
            return reply(told(error))
        self.asked += 1
        question, rows = str(self.asked), 0
        for prompt, entry in zip(prompts, message["prompts"], strict=True):
            for uniforms in entry["uniforms"]:
                self.add(f"{question}.{rows}", prompt, uniforms, message)
                rows += 1
        self.questions[question] = reply, [None] * rows

    def render(self, entry: Message) -> Message:
        """A prompt as vLLM's input. Its tokens are the trainer's, which has placed the pictures.

        pictures: each its features (image_embeds, image_grid_thw), or itself in 8 bits (rounded)
        and its exact pixel_values, which replace what vLLM makes of the rounded ones. Raises
        ValueError where vLLM's way with a picture is another one: other tokens, or other pixels.
        """
        from vllm.inputs.engine import mm_input, tokens_input
        from vllm.multimodal.processing.context import TimingContext
        from vllm.multimodal.processing.inputs import ProcessorInputs

        ids, pictures = entry["ids"], entry["pictures"]
        if not pictures:
            return tokens_input(ids)
        if "image_embeds" in pictures[0]:
            options, grids = {}, torch.stack([x["image_grid_thw"] for x in pictures])
            embeds = torch.cat([x["image_embeds"] for x in pictures])
            data = {"image_embeds": embeds, "image_grid_thw": grids}
        else:
            options = entry["options"]
            data = [Image.fromarray(x["rounded"].permute(1, 2, 0).numpy()) for x in pictures]
        processor = self.vllm.renderer.get_mm_processor()
        if self.tiles:
            of_images = processor.info.get_hf_processor(**options).image_processor
            of_images.image_grid_pinpoints = self.tiles
        items = processor.info.parse_mm_data({"image": data})
        inputs = ProcessorInputs(ids, items, hf_processor_mm_kwargs=options)
        made = processor._apply_hf_processor(inputs, TimingContext(enabled=False))
        for i, picture in enumerate(pictures):
            if "pixel_values" in picture:
                replace_pixels(made.kwargs["image"][i]["pixel_values"], picture["pixel_values"])
                exact = picture["pixel_values"].numpy().tobytes()
                made.hashes["image"][i] = hashlib.sha256(exact).hexdigest()  # names it in caches
        found = processor._find_mm_placeholders(ids, made.prompt_updates).get("image", [])
        if len(found) != len(pictures):
            raise ValueError("vLLM gives a prompt's pictures other tokens than the trainer does")
        places = {"image": [place.to_range() for place in found]}
        return mm_input(ids, made.kwargs, made.hashes, places)

    def add(self, key: str, prompt: Message, uniforms: list[float], message: Message) -> None:
        """One response, to be sampled: `uniforms` has a number for each of its tokens."""
        from vllm import SamplingParams

        request = {"key": key, "temperature": message["temperature"], "uniforms": uniforms}
        params = SamplingParams(
            temperature=0,  # the logits processor draws
            max_tokens=len(uniforms),
            ignore_eos=True,
            stop_token_ids=message["stop"],
            detokenize=False,
            extra_args=request,
        )
        self.vllm.add_request(key, prompt, params)
        self.running.add(key)

    def step(self) -> None:
        """A token more for all that run. Answer the questions whose rows have all ended."""
        self.info["steps"] += 1
        finished = [output for output in self.vllm.step() if output.finished]
        if not finished:
            return
        keys = [output.request_id for output in finished]
        (noted, *_) = self.vllm.collective_rpc("take", args=(keys,))
        for output in finished:
            key, tokens = output.request_id, list(output.outputs[0].token_ids)
            if len(tokens) != len(noted[key]):
                raise RuntimeError(
                    f"{len(tokens)} tokens, {len(noted[key])} log-probs of a response"
                )
            logprobs, entropy = zip(*noted[key], strict=True)
            self.running.remove(key)
            question, row = key.split(".")
            reply, rows = self.questions[question]
            rows[int(row)] = tokens, logprobs, entropy
            if None not in rows:
                del self.questions[question]
                reply({"rows": rows})

    def load(self, message: Message, reply: Reply) -> None:
        """New weights, once what is running has ended, and nothing left that the old ones made."""
        version = self.info["weights"]
        if version == message["version"]:  # another trainer process has sent them
            return reply({"loaded": 0})
        if message["after"] not in (None, version):  # a part, and this is not what it changes
            return reply({"stale": version})
        while self.running:
            self.step()
        self.wake()
        (loaded, *_) = self.vllm.collective_rpc("load", args=(message["path"],))
        if not self.vllm.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache")
        self.vllm.reset_encoder_cache()
        self.info["weights"] = message["version"]
        reply({"loaded": loaded})

    def rest(self) -> None:
        if self.sleeps and not self.asleep and not self.running:
            self.vllm.sleep(level=1)
            self.asleep = True

    def wake(self) -> None:
        if self.asleep:
            self.vllm.wake_up()
            self.asleep = False


def replace_pixels(field: Any, exact: torch.Tensor) -> None:
    """Put exact pixel values in place of the rounded ones (field.data) of the same picture."""
    rounded = field.data
    if exact.numel() != rounded.numel():
        shapes = f"{tuple(rounded.shape)}, the trainer {tuple(exact.shape)}"
        raise ValueError(f"vLLM gives a picture other pixels than the trainer does: {shapes}")
    exact = exact.reshape(rounded.shape).to(rounded.dtype)
    difference = (exact - rounded).abs().max().item()
    if difference > ROUNDED:
        raise ValueError(f"vLLM gives a picture other pixels than the trainer does: {difference:g}")
    field.data = exact


def told(error: Exception) -> Message:
    return {"error": f"{type(error).__name__}: {error}"}


# --------------------------------------------------------------------------- a child over a pipe


def serve_pipe(descriptor: int) -> None:
    """Options from stdin, then messages with their numbers. Ends when stdin does."""
    answers, lock = os.fdopen(descriptor, "wb"), threading.Lock()

    def reply(number: int, message: Message) -> None:
        with lock:
            send(answers, {"number": number, **message})

    try:
        engine = Engine(receive(sys.stdin.buffer))
        reply(0, engine.info)
        threading.Thread(target=read_pipe, args=(engine, reply), daemon=True).start()
        engine.run()
    except Exception as error:
        reply(0, told(error))
        raise


def read_pipe(engine: Engine, reply: Callable[[int, Message], None]) -> None:
    while True:
        try:
            message = receive(sys.stdin.buffer)
        except EOFError:  # the trainer has closed the engine, or is gone
            os._exit(0)
        engine.queue.put((message, partial(reply, message["number"])))


# --------------------------------------------------------------------------------------- a server


class Handler(BaseHTTPRequestHandler):
    """POST /ask: a message and its answer. POST /weights: a safetensors file, written aside."""

    engine: Engine
    token: str
    folder: str

    def do_POST(self) -> None:
        if not hmac.compare_digest(self.headers.get("Authorization", ""), f"Bearer {self.token}"):
            return self.send_error(401)
        size, path = int(self.headers["Content-Length"]), None
        if self.path == "/weights":
            path = os.path.join(self.folder, f"{threading.get_ident()}.safetensors")
            with open(path, "wb") as file:
                while size:
                    part = self.rfile.read(min(size, 2**24))
                    if not part:  # the trainer is gone
                        return
                    size -= file.write(part)
            message = {"kind": "weights", "path": path}
            message |= {name: self.headers.get(name) for name in ("version", "after")}
        else:
            message = unpack(self.rfile.read(size))
        found: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self.engine.queue.put((message, found.put))
        answer = pack(found.get())
        if path:
            os.remove(path)
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *args: Any) -> None:
        """Nothing for each request."""


def serve_http(args: argparse.Namespace) -> None:
    """Answer trainers for ever."""
    Handler.token = os.environ.get(TOKEN, "")
    if args.host not in LOCAL and not Handler.token:
        sys.exit(
            f"error: --host {args.host} is reached by others: set {TOKEN} to a secret of yours"
        )
    engine = Handler.engine = Engine(vars(args) | {"sleeps": False})
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="saei-server-") as Handler.folder:
        server = ThreadingHTTPServer((args.host, args.port), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        print(f"ready at http://{args.host}:{args.port}", flush=True)
        try:
            engine.run()
        finally:
            time.sleep(1)  # the error is on its way to the trainers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--pipe", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--model", help="hub id or folder, as the trainer's --model")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--host", default=LOCAL[0], help=f"others than {LOCAL[0]} need {TOKEN}")
    parser.add_argument("--port", type=int, default=8700)
    parser.add_argument("--memory", type=float, default=0.9, help="share of each GPU's memory")
    parser.add_argument("--tensor_parallel_size", type=int, default=1, help="GPUs of one model")
    args = parser.parse_args()
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_USE_V2_MODEL_RUNNER": "0"}
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    if args.pipe is not None:
        return serve_pipe(args.pipe)
    if not args.model:
        parser.error("--model is needed")
    serve_http(args)


if __name__ == "__main__":
    main()

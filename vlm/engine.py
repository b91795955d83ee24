"""Who samples: the policy itself (`OwnSampler`) or vLLM (`Engine`), behind one interface.

    engine = Engine(policy, "demo/confident", "float32", ["vllm"])  # or ["http://host:8700", ...]
    engine.load_weights()                        # after every optimiser step, all parameters whole
    wait = engine.ask(prompts, 8, seeds, 64)     # as Policy.sample, and it does not wait
    responses = wait()                           # Responses: tokens, mask, log-probs, entropies

vLLM runs in an environment of its own, so no version of the trainer's moves: as a child process
over a pipe, or as servers (vlm/engine_child.py is both). The attacked image reaches it in floats:
as the policy's own image features, or as pixel values for vLLM's own tower. Tokens are drawn from
the same random numbers as in Policy.sample (vlm/engine_worker.py), so that in float32 the responses
are the same, but for rounding. docs/engine.md: how to start it, what was measured.
"""

import atexit
import contextlib
import fcntl
import http.client
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, distributed
from transformers.core_model_loading import revert_weight_conversion

from vlm import adapt
from vlm.cache import ReadPrompts
from vlm.decode import uniforms
from vlm.engine_child import (
    FEATURES,
    PIXELS,
    SUPPORTED,
    TOKEN,
    Message,
    pack,
    receive,
    send,
    unpack,
)
from vlm.policy import Policy, Prompts, Responses

PROJECT = Path(__file__).resolve().parent.parent
PYTHON = PROJECT / ".venv-engine/bin/python"  # made by `bash run.sh engine`
CHILD = "vlm.engine_child"
MEMORY = Path("/dev/shm" if Path("/dev/shm").is_dir() else tempfile.gettempdir())
RESTARTS = 3  # of a child that dies, in a row
PATIENCE = 600  # seconds that a server may be away in the middle of a run
CHECK_EVERY, CHECKED_PROMPTS = 10, 4  # steps, prompts of such a step

# Rounding: the median `shift` that is always taken for it, and what never is. Between these
# LIKE_FIRST times the first one, which was measured with weights that were all sent. The mean
# differences have ten times the limit of the median.
ROUNDING = {"float32": (1e-5, 1e-5), "bfloat16": (2e-3, 0.1)}
LIKE_FIRST, OPEN = 4, 0.9  # tokens of a lower probability are open

OUT_OF_MEMORY = r"out of memory|memory for the cache|auto-fit max_model_len|Free memory on device"
MENDS = {
    OUT_OF_MEMORY: "give it another share of the GPU's memory (--engine_memory)",
    r"No module named 'vllm'": "`bash run.sh engine` makes an environment that has it",
    r"is not supported": "`bash run.sh engine` makes an environment with the right one",
    r"requires BF16": "use --dtype bfloat16, or accelerate's --mixed_precision bf16",
    r"other (tokens|pixels) than the trainer": "use --engine own",
}


class EngineError(OSError):
    """The engine failed. One line: what happened, and the mend."""


def failed(who: str, text: str) -> EngineError:
    """The error for what vLLM said."""
    said = " ".join(text.split())[:200]
    for pattern, mend in MENDS.items():
        if re.search(pattern, text):
            return EngineError(f"{who}: {said}: {mend}")
    return EngineError(f"{who}: {said}")


class OwnSampler:
    """Policy.sample behind Engine's interface. An answer is computed when it is waited for."""

    def __init__(self, policy: Policy):
        self.policy = policy

    def __enter__(self) -> "OwnSampler":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    def parts(self, prompts: int, size: int) -> list[slice]:
        """All at once: the more rows a pass has, the less a token costs."""
        return [slice(0, prompts)]

    def ask(self, *args: Any, **options: Any) -> Callable[..., Responses]:
        """Policy.sample's arguments but `read` -> a function of `read`, a function or None."""

        def wait(read: Callable[[], ReadPrompts | None] | None = None) -> Responses:
            return self.policy.sample(*args, read=read and read(), **options)

        return wait

    def load_weights(self) -> None:
        """They are the policy's own."""

    def check(self, *args: Any) -> None:
        """There is nothing to compare."""

    def rest(self) -> None:
        """It holds no memory of its own."""

    def close(self) -> None:
        """Nothing runs."""


class Engine:
    """vLLM as the sampler of a policy.

    model: hub id or folder, read for its configuration alone. dtype: of the engine's weights.
    where: ["vllm"], a child process; or the URLs of servers, over which the prompts are spread.
    python: of the child's environment. memory: the child's share of a GPU's memory.
    Raises EngineError if it cannot start, ValueError for a family or an option that it cannot use.
    """

    def __init__(
        self,
        policy: Policy,
        model: str,
        dtype: str,
        where: list[str],
        python: str | None = None,
        memory: float = 0.3,
    ):
        self.policy, self.dtype = policy, dtype
        model = str(Path(model).absolute()) if Path(model).exists() else model
        kind = policy.model.config.model_type
        if kind not in FEATURES + PIXELS:
            raise ValueError(
                f"--engine: vLLM gives {kind} other log-probs than the trainer does, or was not "
                f"tried (docs/engine.md). It has {', '.join(FEATURES + PIXELS)}: use --engine own"
            )
        self.pixels = kind in PIXELS
        self.trained = set()  # names of weights that change
        for name, parameter in policy.model.named_parameters():
            if ".base_layer.weight" in name if policy.lora_rank else parameter.requires_grad:
                self.trained.add(name.replace(".base_layer.", "."))
        self.folder, self.lock = own_folder()
        self.run, self.updates, self.checks = shared_name(), 0, 0
        self.first: float | None = None  # median shift of the first check
        self.version: str | None = None
        self.ours = where == ["vllm"]
        atexit.register(self.close)
        if self.ours:
            options = {"model": model, "dtype": dtype, "memory": memory, "sleeps": True}
            options["tensor_parallel_size"] = 1
            device = policy.device.index if policy.device.type == "cuda" else None
            python = python or str(PYTHON)
            self.connections = [Child(python, options, self.folder / "vllm.log", device)]
        else:
            self.connections = [Server(url, self.folder) for url in where]
        for connection in self.connections:
            self._compare(connection, model)

    def _compare(self, connection: "Child | Server", model: str) -> None:
        """Raise ValueError for an engine that serves another model."""
        config = self.policy.model.config
        text = config.get_text_config()
        wanted = {"model": Path(model).name, "type": config.model_type, "dtype": self.dtype}
        wanted |= {"vocabulary": text.vocab_size, "hidden": text.hidden_size}
        found = connection.info | {"model": Path(connection.info["model"]).name}
        for name, value in wanted.items():
            if found[name] != value:
                raise ValueError(
                    f"{connection.name} has {name} {str(found[name])[:80]!r}, the trainer "
                    f"{str(value)[:80]!r}: start it with --model {model[:80]} "
                    f"--dtype {self.dtype}"
                )

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *error: Any) -> None:
        self.close()

    # ------------------------------------------------------------------------------------ sample

    def parts(self, prompts: int, size: int) -> list[slice]:
        """`size` at a time: while some are attacked, others are sampled."""
        return [slice(i, min(i + size, prompts)) for i in range(0, prompts, size)]

    def sample(self, *args: Any, **options: Any) -> Responses:
        """As Policy.sample."""
        return self.ask(*args, **options)()

    @torch.no_grad()
    def ask(
        self,
        prompts: Prompts,
        n: int,
        seeds: list[int],
        max_new_tokens: int,
        temperature: float = 1.0,
        prompts_at_a_time: int = 0,
    ) -> Callable[..., Responses]:
        """Policy.sample's arguments but `read` -> a function that waits and gives what it gives.

        prompts_at_a_time is not used, nor what the function is given: vLLM has its own order and
        its own prompt pass.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"one seed per prompt: got {len(seeds)} for {len(prompts)}")
        entries = self._entries(prompts)
        for entry, seed in zip(entries, seeds, strict=True):
            entry["uniforms"] = uniforms(seed, n, max_new_tokens).tolist()
        servers, waits = len(self.connections), []
        for k, connection in enumerate(self.connections):
            if mine := entries[k::servers]:
                message = {"kind": "sample", "prompts": mine, "temperature": temperature}
                message["stop"] = self.policy.eos_ids
                waits.append(self._ask_one(connection, message))
        return lambda read=None: self._collect(waits, len(prompts), n)

    def _ask_one(self, connection: "Child | Server", message: Message) -> Callable[[], list]:
        """Ask at once. -> a function that waits for the rows.

        An engine without the weights of now, as after a restart, gets them and is asked again.
        """
        asked = connection.call(message | {"weights": self.version})

        def wait() -> list:
            answer = asked()
            for _ in range(RESTARTS):
                if "stale" not in answer:
                    break
                self._send_weights(connection, whole=True)
                answer = connection.call(message | {"weights": self.version})()
            return checked(answer, connection.name)["rows"]

        return wait

    def _entries(self, prompts: Prompts) -> list[Message]:
        """Of each prompt its tokens and its pictures."""
        # Of vLLM's processor: as the policy's own.
        options = {"do_resize": False, **self.policy.family.untiled}
        pictures = []
        if prompts.images:
            pictures = (self._pixels if self.pixels else self._features)(prompts.images)
        entries, first = [], 0
        for ids, mask, images in zip(prompts.ids, prompts.mask, prompts.counts, strict=True):
            mine = pictures[first : first + images]
            first += images
            entries.append({"ids": ids[mask].tolist(), "pictures": mine, "options": options})
        return entries

    def _features(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """What the policy's own tower gives for each image: floats, that an attack changes."""
        policy = self.policy
        vision = policy._in_precision(policy.to_pixel_values(images))
        found = policy.model.model.get_image_features(**vision, return_dict=True)
        levels = getattr(found, "deepstack_features", None) or []  # Qwen3-VL: more per image
        pictures = []
        for i, x in enumerate(found.pooler_output):
            whole = torch.cat([x, *(level[i] for level in levels)], dim=-1)
            whole = whole.to(getattr(torch, self.dtype)).cpu().clone()
            grid = vision["image_grid_thw"][i].cpu().clone()
            pictures.append({"image_embeds": whole, "image_grid_thw": grid})
        return pictures

    def _pixels(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """For vLLM's tower: each image in 8 bits, and its exact pixel values, normalised."""
        pictures = []
        for x in images:
            exact = self.policy.to_pixel_values([x])["pixel_values"].cpu().clone()
            pictures.append({"rounded": (x * 255).round().byte().cpu(), "pixel_values": exact})
        return pictures

    def _collect(self, waits: list[Callable[[], list]], P: int, n: int) -> Responses:
        """The servers' rows, in the order of the prompts, padded to the longest."""
        by_prompt: list[list] = [[]] * P
        for k, wait in enumerate(waits):
            rows = wait()
            for i in range(0, len(rows), n):
                by_prompt[k + i // n * len(self.connections)] = rows[i : i + n]
        rows = [row for group in by_prompt for row in group]
        N, T = len(rows), max(len(row[0]) for row in rows)
        tokens = torch.full((N, T), self.policy.pad_id)
        mask = torch.zeros(N, T, dtype=torch.bool)
        logprobs, entropy = torch.zeros(N, T), torch.zeros(N, T)
        for i, (ids, of_tokens, of_positions) in enumerate(rows):
            t = len(ids)
            tokens[i, :t], mask[i, :t] = torch.tensor(ids), True
            logprobs[i, :t], entropy[i, :t] = torch.tensor(of_tokens), torch.tensor(of_positions)
        fields = (x.to(self.policy.device) for x in (tokens, mask, logprobs, entropy))
        return Responses.concatenate([Responses(*fields)], self.policy.pad_id)

    # ----------------------------------------------------------------------------------- weights

    @torch.no_grad()
    def load_weights(self) -> None:
        """Give the engine the policy's weights. After the first time only those that are trained.

        Call it after every optimiser step, where all parameters are whole. Of the processes that
        share servers the first one sends, and the others wait.
        """
        before, self.updates = self.version, self.updates + 1
        self.version = f"{self.run}-{self.updates}"
        together = not self.ours and distributed.is_initialized()
        if not together or distributed.get_rank() == 0:
            for connection in self.connections:
                self._send_weights(connection, before is None, before)
        if together:
            distributed.barrier()

    def _send_weights(
        self, connection: "Child | Server", whole: bool, before: str | None = None
    ) -> None:
        """whole: all weights; else those that are trained, to an engine that has `before`."""
        path = self.folder / "weights.safetensors"
        weights = self._weights(whole)
        save_file(weights | {"banned": self.policy.banned.nonzero().flatten().cpu()}, path)
        message = {"kind": "weights", "version": self.version, "after": None if whole else before}
        answer = checked(connection.load(message, path), connection.name)
        path.unlink(missing_ok=True)
        if "stale" in answer:  # it has restarted
            self._send_weights(connection, whole=True)
        elif answer["loaded"] not in (0, len(weights)):
            raise EngineError(
                f"{connection.name} took {answer['loaded']} of {len(weights)} weights"
            )

    def _weights(self, whole: bool) -> dict[str, Tensor]:
        """By their names in a checkpoint, LoRA merged, in the engine's dtype."""
        policy, sent = self.policy, {}
        state = adapt.merged(dict(policy.model.named_parameters()))
        for name, w in state.items():
            inner = name.removeprefix("model.")
            of_vision = policy.family.in_tower(inner) or policy.family.in_projector(inner)
            if of_vision and not self.pixels:
                continue  # the trainer computes the features
            if whole or name in self.trained:
                sent[name] = w.detach()
        for tied, source in policy.model.all_tied_weights_keys.items():
            if source in sent:  # vLLM may have a packed copy, which it would not renew
                sent[tied] = sent[source]
        dtype = getattr(torch, self.dtype)
        found = revert_weight_conversion(policy.model, sent)
        return {name: w.to("cpu", dtype, copy=True).contiguous() for name, w in found.items()}

    # ------------------------------------------------------------------------------------- check

    def check(self, prompts: Prompts, responses: Responses, temperature: float) -> None:
        """`compare` in the first call and in every CHECK_EVERY-th after it."""
        if self.checks % CHECK_EVERY == 0:
            self.compare(prompts, responses, temperature)
        self.checks += 1

    @torch.no_grad()
    def compare(
        self, prompts: Prompts, responses: Responses, temperature: float
    ) -> dict[str, float]:
        """Score some of the engine's responses with the policy.

        -> the mean differences of log-probs and entropies, and the median shift (`shift`). Raises
        EngineError if they are more than rounding: a weight or a cache of the engine is not that of
        the policy.
        """
        some = slice(0, min(CHECKED_PROMPTS, len(prompts)))
        rows = slice(0, some.stop * (len(responses.tokens) // len(prompts)))
        mask = responses.mask[rows]
        ours = self.policy.score(prompts[some], responses.tokens[rows], mask, temperature)
        logprobs, entropy = (x[mask] for x in ours)
        theirs = responses.logprobs[rows][mask]
        found = {
            "logprobs": (logprobs - theirs).abs().mean().item(),
            "entropy": (entropy - responses.entropy[rows][mask]).abs().mean().item(),
            "shift": shift(logprobs, theirs),
        }
        least, most = ROUNDING[self.dtype]
        if self.first is None:
            self.first = found["shift"]
            limit = most
        else:
            limit = min(most, max(least, LIKE_FIRST * self.first))
        within = found["shift"] <= limit
        if not (within and max(found["logprobs"], found["entropy"]) <= 10 * limit):
            raise EngineError(
                f"the engine and the trainer disagree: mean difference of log-probs "
                f"{found['logprobs']:.3g}, of entropies {found['entropy']:.3g}, median shift "
                f"{found['shift']:.3g}, rounding in {self.dtype} is below {10 * limit:.2g} and "
                f"{limit:.2g}: its weights or its way with this model differ. Use --engine own"
            )
        return found

    def rest(self) -> None:
        """Nothing is asked until the next weights: a child on a GPU gives its memory back."""
        if self.ours:
            checked(self.connections[0].call({"kind": "sleep"})(), self.connections[0].name)

    def close(self) -> None:
        """End the child and remove what lies in memory. Servers go on."""
        for connection in getattr(self, "connections", []):
            connection.close()
        shutil.rmtree(self.folder, ignore_errors=True)


def shift(ours: Tensor, theirs: Tensor) -> float:
    """The median of |log p - log p'| / (1 - p) over open tokens (p < OPEN).   (tokens,) each

    About by how much logits differ: a likely token's log-prob moves by 1 - p of it. Rounding moves
    few tokens much and most of them hardly, other weights move all. A median tells these apart.
    """
    p = ours.exp()
    is_open = p < OPEN
    if not is_open.any():
        return 0.0
    return ((ours - theirs).abs() / (1 - p))[is_open].median().item()


def checked(answer: Message, who: str) -> Message:
    if "error" in answer:
        raise failed(who, answer["error"])
    return answer


def shared_name() -> str:
    """A name that no other run has, the same on all processes of this one."""
    name = [uuid.uuid4().hex]
    if distributed.is_initialized():
        distributed.broadcast_object_list(name)
    return name[0]


def own_folder() -> tuple[Path, int]:
    """A folder in memory, locked while this process lives. Those of dead processes are removed."""
    for orphan in MEMORY.glob("saei-engine-*"):
        with contextlib.suppress(OSError):  # it is in use, or another user's
            lock = os.open(orphan, os.O_RDONLY)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(orphan)
            finally:
                os.close(lock)
    folder = Path(tempfile.mkdtemp(prefix="saei-engine-", dir=MEMORY))
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_SH)
    return folder, lock


# --------------------------------------------------------------------------- a child over a pipe


class Child:
    """vLLM as a child process. One that dies is started again and asked again."""

    name = "vLLM (--engine vllm)"

    def __init__(self, python: str, options: Message, log: Path, device: int | None):
        if not shutil.which(python):
            raise ValueError(
                f"--engine_python {python[:200]} is not there: `bash run.sh engine` makes it, or "
                f"name a Python with vLLM {SUPPORTED}*"
            )
        self.python, self.options, self.log, self.device = python, options, log, device
        self.numbers, self.pending, self.answers = count(1), {}, {}
        self.process: subprocess.Popen | None = None
        self.deaths = 0
        self._start()

    def _start(self) -> None:
        self.close()
        ours, theirs = os.pipe()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [self.python, "-m", CHILD, "--pipe", str(theirs)],
                cwd=PROJECT,
                env=child_environment(self.device),
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                pass_fds=(theirs,),
                start_new_session=True,  # Ctrl-C is the trainer's: it finishes its step
            )
        os.close(theirs)
        self.pipe = os.fdopen(ours, "rb")
        with contextlib.suppress(BrokenPipeError):
            send(self.process.stdin, self.options)
        try:
            self.info = checked(receive(self.pipe), self.name)
        except EOFError:
            lines = self.log.read_text(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "it said nothing")
            code = self.process.wait()
            raise failed(f"{self.name} did not start (code {code})", last) from None

    def call(self, message: Message) -> Callable[[], Message]:
        """Ask at once. -> a function that waits for the answer."""
        number = next(self.numbers)
        self.pending[number] = message | {"number": number}
        with contextlib.suppress(BrokenPipeError):  # noticed by who waits
            send(self.process.stdin, self.pending[number])
        return partial(self._wait, number)

    def load(self, message: Message, path: Path) -> Message:
        return self.call(message | {"path": str(path)})()

    def _wait(self, number: int) -> Message:
        while number not in self.answers:
            try:
                answer = receive(self.pipe)
            except EOFError:
                self._restart()
                continue
            self.deaths = 0
            if "error" in answer:  # of number 0: of all
                raise failed(self.name, answer["error"])
            self.pending.pop(answer["number"], None)
            self.answers[answer["number"]] = answer
        return self.answers.pop(number)

    def _restart(self) -> None:
        code, self.deaths = self.process.wait(), self.deaths + 1
        if self.deaths > RESTARTS:
            raise EngineError(
                f"{self.name} died {self.deaths} times (code {code}; -9 is the system short of "
                f"memory): see {self.log}, or use --engine own"
            )
        print(f"{self.name} died (code {code}); starting it again", file=sys.stderr, flush=True)
        self._start()
        for message in self.pending.values():  # samples get the answer that its weights are stale
            with contextlib.suppress(BrokenPipeError):
                send(self.process.stdin, message)

    def close(self) -> None:
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        self.pipe.close()
        with contextlib.suppress(BrokenPipeError):  # closing flushes what a dead child has not read
            self.process.stdin.close()
        self.process = None


def child_environment(device: int | None) -> dict[str, str]:
    """The trainer's, without what says that it is one of several processes."""
    names = r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE|WORLD_RANK)|LOCAL_WORLD_SIZE|ROLE_NAME"
    names += r"|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|ACCELERATE_.*|FSDP_.*|PYTHONPATH|PYTHONHOME"
    kept = {name: x for name, x in os.environ.items() if not re.fullmatch(names, name)}
    kept["PYTHONPATH"] = str(PROJECT)
    # On a CPU the threads of child and trainer, waiting for work, would keep each other from it.
    kept.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))
    if device is not None:  # the trainer's own GPU
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        kept["CUDA_VISIBLE_DEVICES"] = visible.split(",")[device] if visible else str(device)
    return kept


# --------------------------------------------------------------------------------------- servers


class Server:
    """A server at a URL, started by the user. One that is away is waited for and asked again."""

    def __init__(self, url: str, folder: Path):
        if not re.match(r"https?://[^/]", url):
            raise ValueError(f"--engine {url[:80]!r}: own, vllm, or URLs such as http://host:8700")
        self.name, self.url = f"the server {url}", url.rstrip("/")
        self.opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        self.pool = ThreadPoolExecutor(64)
        self.info = self._post("/ask", pack({"kind": "info"}), {}, patience=0)

    def call(self, message: Message) -> Callable[[], Message]:
        return self.pool.submit(self._post, "/ask", pack(message), {}, PATIENCE).result

    def load(self, message: Message, path: Path) -> Message:
        headers = {name: message[name] for name in ("version", "after") if message[name]}
        headers["Content-Length"] = str(path.stat().st_size)
        return self._post("/weights", path, headers, PATIENCE)

    def _post(
        self, way: str, data: bytes | Path, headers: dict[str, str], patience: float
    ) -> Message:
        headers |= {"Authorization": f"Bearer {os.environ.get(TOKEN, '')}"}
        headers["Content-Type"] = "application/octet-stream"
        until, said = time.time() + patience, False
        while True:
            try:
                with contextlib.ExitStack() as stack:
                    body = stack.enter_context(data.open("rb")) if isinstance(data, Path) else data
                    request = urllib.request.Request(self.url + way, body, headers)
                    return unpack(stack.enter_context(self.opener.open(request)).read())
            except urllib.error.HTTPError as error:
                token = error.code == 401
                mend = f"set {TOKEN} to the server's" if token else "is it vlm/engine_child.py?"
                raise EngineError(f"{self.name} answers {error.code}: {mend}") from None
            except (OSError, http.client.HTTPException) as error:
                cause = getattr(error, "reason", None) or error
                if time.time() > until:
                    raise EngineError(
                        f"{self.name} cannot be reached ({str(cause)[:100]}): start it "
                        "(docs/engine.md) or correct --engine"
                    ) from None
                if not said:
                    print(f"{self.name} is away ({cause}); waiting", file=sys.stderr, flush=True)
                said = True
                time.sleep(2)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)

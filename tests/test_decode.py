"""vlm/decode.py against a plain loop, for every family, and its step as a graph without a GPU.

The plain loop computes the whole response again for each token, in the way of scoring. A CUDA graph
is stood in for by Recording: it keeps a step's operations with their tensors, and runs them again
on the same memory. A step that made a buffer of its own, counted in Python or read a value would
give other tokens, or would be refused.
"""

import contextlib

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import grpo
import tsec
from tests import tiny
from tests.fake_cuda import waits
from tests.families import KINDS, PICTURES, PROBLEMS, TOLERANCE, make_policy
from vlm import decode
from vlm.cache import LAYERS, DecodeLayer, PromptLayer, with_room
from vlm.decode import Decoder
from vlm.policy import Policy, Prompts, Responses

SEEDS, N, T = [1, 2, 3], 3, 40  # prompts of three lengths; two blocks of steps and a half


def end_often(policy: Policy) -> Policy:
    """Every 25th allowed token ends a response: lengths from 1 to 40."""
    allowed = (~policy.banned).nonzero().flatten().tolist()
    policy.eos_ids = [*policy.eos_ids, *allowed[::25]]
    return policy


@pytest.fixture(scope="module", params=[*KINDS, *tiny.OTHER_TEXT])
def policy(request):
    return end_often(make_policy(request.param))


@pytest.fixture(scope="module")
def qwen():
    return end_often(make_policy("qwen2_5_vl"))


def encoded(policy: Policy) -> Prompts:
    return policy.encode(PROBLEMS, PICTURES)


@torch.no_grad()
def plain_sample(policy: Policy, prompts: Prompts, temperature: float) -> Responses:
    """Three responses of each prompt, a token at a time, by inverse transform sampling."""
    read, owner = policy.read(prompts), torch.arange(len(prompts)).repeat_interleave(N)
    uniforms = []
    for seed in SEEDS:
        generator = torch.Generator().manual_seed(seed)
        uniforms.append(torch.rand(N, T, generator=generator, dtype=torch.float64))
    uniforms = torch.cat(uniforms)
    tokens = torch.zeros(len(owner), T, dtype=torch.long)
    mask, logprobs, entropy = torch.ones_like(tokens, dtype=torch.bool), [], []
    for t in range(T):
        rows = (owner, tokens[:, : t + 1], mask[:, : t + 1])
        logits = policy.logits(policy._response_hidden(prompts, read, *rows)[:, t])
        token = logits.argmax(-1)
        if temperature:
            cumulative = (logits.double() / temperature).softmax(-1).cumsum(-1)
            token = (cumulative <= uniforms[:, t, None] * cumulative[:, -1:]).sum(-1)
        tokens[:, t] = token
        logprobs.append(grpo.token_logprobs(logits, token, temperature or 1.0))
        entropy.append(tsec.token_entropy(logits, temperature or 1.0))
    ended = torch.isin(tokens, torch.tensor(policy.eos_ids)).long()
    mask = ended.cumsum(1) - ended == 0  # up to and with the first end token
    width = int(mask.sum(1).max())
    logprobs, entropy = torch.stack(logprobs, 1), torch.stack(entropy, 1)
    tokens = tokens.masked_fill(~mask, policy.pad_id)
    logprobs, entropy = logprobs.masked_fill(~mask, 0), entropy.masked_fill(~mask, 0)
    return Responses(*(x[:, :width] for x in (tokens, mask, logprobs, entropy)))


def sample(policy: Policy, prompts: Prompts, temperature: float = 0.8, **options) -> Responses:
    return policy.sample(prompts, N, SEEDS, T, temperature, **options)


def assert_same(a: Responses, b: Responses, atol: float = 0.0) -> None:
    """Tokens and masks equal; log-probs and entropies within atol nats, padding included."""
    assert torch.equal(a.tokens, b.tokens) and torch.equal(a.mask, b.mask)
    for x, y in ((a.logprobs, b.logprobs), (a.entropy, b.entropy)):
        torch.testing.assert_close(x, y, atol=atol, rtol=0)


# ------------------------------------------------------------------------------ equal to the plain


def test_every_family_samples_as_the_plain_loop(policy):
    """Rows that end at different tokens, windows that are left behind, linear attention."""
    prompts = encoded(policy)
    want = plain_sample(policy, prompts, 0.8)
    assert want.mask.shape[1] > decode.BLOCK_TOKENS + 3 and len(want.mask.sum(1).unique()) > 3
    assert_same(sample(policy, prompts), want, TOLERANCE)


def test_greedy_responses_are_those_of_the_plain_loop(qwen):
    prompts = encoded(qwen)
    assert_same(sample(qwen, prompts, 0.0), plain_sample(qwen, prompts, 0.0), 1e-5)


@pytest.mark.parametrize("block", [1, 5, 64])
def test_the_length_of_a_block_changes_nothing(qwen, monkeypatch, block):
    prompts = encoded(qwen)
    want = sample(qwen, prompts)
    monkeypatch.setattr(decode, "BLOCK_TOKENS", block)
    assert_same(sample(qwen, prompts), want, 1e-5)


def test_dropping_rows_changes_nothing(qwen, monkeypatch):
    """At every end, as always, and never."""
    prompts, kept = encoded(qwen), []
    keep = Decoder.keep
    monkeypatch.setattr(Decoder, "keep", lambda self, x: kept.append(len(x)) or keep(self, x))
    results, counts = [], []
    for share in (1.0, decode.SHARE_ALIVE, 0.0):
        monkeypatch.setattr(decode, "SHARE_ALIVE", share)
        results.append(sample(qwen, prompts))
        counts.append(len(kept))
        kept.clear()
    assert counts[0] >= counts[1] > 0 == counts[2]
    assert_same(results[0], results[2], 1e-5)
    assert_same(results[1], results[2], 1e-5)


# ----------------------------------------------------------------------------- a step that waits

aten = torch.ops.aten
# Its sparse activations make a tensor of a number in each step (transformers 5.23).
COPIES_FROM_HOST = {"gemma3n"}


class Recording(TorchDispatchMode):
    """A step's operations. As in a CUDA graph, recording them leaves the memory as it was."""

    def __init__(self):
        super().__init__()
        self.calls, self.written, self.from_host = [], [], []

    def copies(self, args) -> bool:
        """Is a tensor used that the host has just made?"""
        return any(x is y for x in tree_leaves(args) for y in self.from_host)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # x[mask] = 0: PyTorch fills by the mask, the number is an argument of the kernel
        fill = func is aten.index_put_.default and len(args[1]) == 1 and args[2].ndim == 0
        if not fill and (waits(func, args) or self.copies(args)):
            raise RuntimeError(f"operation not permitted when stream is capturing: {func}\nmore")
        for x, argument in zip(args, func._schema.arguments, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.written.append((x, x.clone()))
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        if func is aten.lift_fresh.default:
            self.from_host.append(out)
        return out

    def __exit__(self, *error):
        super().__exit__(*error)
        for x, before in reversed(self.written):
            x.copy_(before)
        self.written.clear()

    def replay(self):
        for func, args, kwargs, out in self.calls:
            again = func(*args, **kwargs)
            for x, y in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(x, Tensor) and x.data_ptr() != y.data_ptr():
                    x.copy_(y)


class Stream:
    def wait_stream(self, other):
        pass


class GraphCounts(dict):
    """How many steps were captured, replayed, and run as they are."""


@pytest.fixture
def graphs(monkeypatch):
    """A CPU's decoder captures its steps, and attention grows as it does without graphs."""
    counts = GraphCounts(captured=0, replayed=0, eager=0)
    step, replay = Decoder.step, Recording.replay

    @contextlib.contextmanager
    def capture(graph, stream, capture_error_mode):
        with graph:
            yield
        counts["captured"] += 1
        counts["eager"] -= 1

    def counted(name, function):
        def call(self):
            counts[name] += 1
            return function(self)

        return call

    monkeypatch.setattr("torch.cuda.Stream", Stream)
    monkeypatch.setattr("torch.cuda.current_stream", Stream)
    monkeypatch.setattr("torch.cuda.stream", contextlib.nullcontext)
    monkeypatch.setattr("torch.cuda.CUDAGraph", Recording)
    monkeypatch.setattr("torch.cuda.graph", capture)
    monkeypatch.setattr(Decoder, "graphed", property(lambda self: self.use_graphs))
    monkeypatch.setattr(Decoder, "use_graphs", True)  # put back after a failed capture
    monkeypatch.setattr(Decoder, "step", counted("eager", step))
    monkeypatch.setattr(Recording, "replay", counted("replayed", replay))
    monkeypatch.setattr(decode, "GRAPH_TOKENS", decode.BLOCK_TOKENS)
    monkeypatch.setattr(decode, "GRAPH_SHARE_ALIVE", decode.SHARE_ALIVE)
    return counts


def test_a_step_of_every_family_is_a_graph(policy, request):
    """It waits for nothing. Replayed, it gives the bits of a step that is run as it is."""
    prompts = encoded(policy)
    want = sample(policy, prompts)
    counts = request.getfixturevalue("graphs")
    found = sample(policy, prompts)
    assert_same(found, want)
    if policy.model.config.model_type in COPIES_FROM_HOST:
        assert counts["captured"] == counts["replayed"] == 0 and not Decoder.use_graphs
    else:
        assert counts["captured"] == counts["eager"] > 1
        assert counts["replayed"] > 3 * counts["captured"]


def test_new_shapes_are_captured_anew(qwen, graphs, monkeypatch):
    """One capture where attention and rows keep their size, one more for each change."""
    prompts = encoded(qwen)
    assert_same(sample(qwen, prompts), sample(qwen, prompts))
    monkeypatch.setattr(decode, "GRAPH_TOKENS", 1000)
    monkeypatch.setattr(decode, "GRAPH_SHARE_ALIVE", 0.0)
    graphs["captured"] = 0
    sample(qwen, prompts)
    assert graphs["captured"] == 1


def test_a_step_that_waits_is_run_without_graphs(qwen, graphs, monkeypatch, capsys):
    """One attempt, one line, the same responses."""
    want = sample(qwen, encoded(qwen))
    assert graphs["replayed"] > 0
    respond = Policy.respond

    def waiting(self, tokens, *rest):
        int(tokens.sum())
        return respond(self, tokens, *rest)

    monkeypatch.setattr(Policy, "respond", waiting)
    graphs |= dict(captured=0, replayed=0)
    for _ in range(2):
        assert_same(sample(qwen, encoded(qwen)), want)
    assert graphs["replayed"] == 0 and not Decoder.use_graphs
    line = "sampling goes on without CUDA graphs, more slowly: operation not permitted when stream"
    out = capsys.readouterr().out
    assert out.startswith(line) and out.count("\n") == 1 and "more\n" not in out


@pytest.mark.parametrize(
    "fault",
    [
        lambda self: setattr(self, "position", self.position + 1),  # another address
        lambda self: self.bias[..., int(self.cursor.place)].fill_(0.0),  # reads a value
        lambda self: torch.tensor([1]) + self.t,  # copies from the host
        lambda self: self.token[self.alive],  # a shape that depends on values
    ],
)
def test_the_recording_notices_faults(qwen, graphs, monkeypatch, fault):
    step = Decoder.step

    def faulty(self):
        step(self)
        fault(self)

    prompts = encoded(qwen)
    want = sample(qwen, prompts)
    monkeypatch.setattr(Decoder, "step", faulty)
    found = sample(qwen, prompts)
    assert not Decoder.use_graphs or not torch.equal(found.tokens, want.tokens)


# ------------------------------------------------------------------------ precision and attention


def test_cached_keys_have_the_precision_of_the_values(qwen, monkeypatch):
    """Under autocast attention gets float32 keys and bfloat16 values. Cast once, bit for bit."""
    caches, init = [], Decoder.__init__

    def listen(self, *args):
        init(self, *args)
        caches.append(self.cache)

    def uncast(self, n, room, cursor):
        assert self.keys.dtype == torch.float32
        return DecodeLayer(with_room(self.keys, n, room), with_room(self.values, n, room), cursor)

    prompts = encoded(qwen)
    monkeypatch.setattr(Decoder, "__init__", listen)
    with torch.autocast("cpu", torch.bfloat16):
        found = sample(qwen, prompts)
        monkeypatch.setattr(PromptLayer, "decode_layer", uncast)
        want = sample(qwen, prompts)
    assert_same(found, want)
    dtypes = [{(x.keys.dtype, x.values.dtype) for x in cache.layers} for cache in caches]
    half = torch.bfloat16
    assert dtypes == [{(half, half)}, {(torch.float32, half)}]


def test_no_kind_of_layer_is_without_its_mask():
    """A further kind needs one in Decoder.attention_mask, or none as the last three."""
    kinds = {"full_attention", "sliding_attention", "linear_attention", "conv", "dummy"}
    assert LAYERS.keys() == kinds

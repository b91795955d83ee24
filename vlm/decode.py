"""Sampling's loop over tokens, in steps that never wait for the device.

Every tensor that a step reads or writes is a buffer with a fixed address and shape. The place of
the next token is a tensor, too. No value travels between host and device. So on a GPU a step is
captured as a CUDA graph and replayed: one launch per token instead of forty per layer. On a CPU the
same step runs as it is.

Between blocks of BLOCK_TOKENS steps the host looks which rows have ended. It stops the loop, drops
ended rows or gives attention more places. Each of these changes shapes, so the next step is
captured anew.

    prompt = (policy.read(prompts), prompts.mask, prompts.next_position)
    decoder = Decoder(policy, *prompt, n, seeds, max_new_tokens, temperature)
    tokens, mask, logprobs, entropy = decoder.run()  # all (N, T)

Symbols: P prompts, n responses each, N = P * n rows, R rows that are still computed, L prompt
tokens, T response tokens, S >= L + T places of the cache, V vocabulary, D hidden size.
"""

import torch
from torch import Tensor, nn

from vlm.attention import without_flash
from vlm.cache import Cursor, DecodeLayer, ReadPrompts, layer_kinds

BLOCK_TOKENS = 16  # so often the host looks which rows have ended, and attention gets more places
SHARE_ALIVE = 0.75  # ended rows are dropped when no more than this share is left
# The same with CUDA graphs, where new shapes cost a capture: the time of a few steps.
GRAPH_TOKENS, GRAPH_SHARE_ALIVE = 256, 0.5


class Decoder:
    """The buffers of a batch's rows. `run` samples them; `step` is what a GPU captures."""

    use_graphs = True  # until a capture fails in this process

    def __init__(
        self,
        policy: nn.Module,
        read: ReadPrompts,
        prompt_mask: Tensor,  # (P, L) bool
        next_position: Tensor,  # (P,) of the first response token
        n: int,
        seeds: list[int],
        T: int,
        temperature: float,
    ):
        (P, L), device = prompt_mask.shape, prompt_mask.device
        self.policy, self.L, self.T, N = policy, L, T, P * n
        self.temperature = temperature
        self.scale = temperature or 1.0  # greedy: log-probs and entropies at temperature 1
        self.uniforms = torch.cat([uniforms(seed, n, T) for seed in seeds]).to(device)  # (N, T)
        self.eos_ids = torch.tensor(policy.eos_ids, device=device)

        # Rows that are still computed. All of these lose the dropped rows.
        self.rows = torch.arange(N, device=device)  # their numbers in the results
        self.alive = torch.ones(N, dtype=torch.bool, device=device)
        self.token = torch.zeros(N, 1, dtype=torch.long, device=device)  # the last one drawn
        self.position = next_position.repeat_interleave(n, dim=0)  # of that token

        # Cache and masks. A multiple of a block: CUDA's attention copies a mask of another width.
        S = round_up(L + T, BLOCK_TOKENS)
        self.t = torch.zeros(1, dtype=torch.long, device=device)  # which token is drawn
        self.cursor = Cursor(torch.tensor([L], device=device), width=0)
        self.cache = read.decode_cache(n, S - L, self.cursor)
        self.kinds = layer_kinds(policy.model.config) - {"dummy"}
        self.places = torch.arange(S, device=device)
        seen = prompt_mask.repeat_interleave(n, dim=0)[:, None, None]  # (N, 1, 1, L)
        attention = [layer for layer in self.cache.layers if isinstance(layer, DecodeLayer)]
        # Added to the scores of attention: 0 where a row sees a place.
        self.bias = attention[0].values.new_full((N, 1, 1, S), -torch.inf)
        self.bias[..., :L].masked_fill_(seen, 0.0)

        # Results, of dropped rows too.
        self.tokens = torch.full((N, T), policy.pad_id, device=device)
        self.mask = torch.zeros(N, T, dtype=torch.bool, device=device)
        self.logprobs = torch.zeros(N, T, device=device)
        self.entropy = torch.zeros(N, T, device=device)

        self.graph = None
        self.stream = torch.cuda.Stream() if self.graphed else None
        self.draw(read.hidden.repeat_interleave(n, dim=0))

    @property
    def graphed(self) -> bool:
        return self.use_graphs and self.rows.is_cuda

    # ----------------------------------------------------------------------- a step: no waiting

    def step(self) -> None:
        """Feed each row's last token and draw the next one."""
        self.bias.index_fill_(3, self.cursor.place, 0.0)
        hidden = self.policy.respond(self.token, self.cache, self.attention_mask(), self.position)
        self.position.add_(1)
        self.cursor.place.add_(1)
        self.t.add_(1)
        self.draw(hidden[:, -1])

    def attention_mask(self) -> Tensor | dict[str, Tensor | None]:
        """What transformers takes as it is: the bias (R, 1, 1, width), or one per kind of layer."""
        masks = dict.fromkeys(self.kinds)  # None: linear attention and convolutions need no mask
        bias = self.bias[..., : self.cursor.width]
        if "full_attention" in masks:
            masks["full_attention"] = bias
        if "sliding_attention" in masks:
            window = self.policy.model.config.get_text_config().sliding_window
            left = self.places[: self.cursor.width] <= self.cursor.place - window
            masks["sliding_attention"] = bias.masked_fill(left, -torch.inf)
        return masks if len(masks) > 1 else masks.popitem()[1]

    def draw(self, hidden: Tensor) -> None:
        """Draw token t of each row from what predicts it.   (R, D)"""
        logits = self.policy.logits(hidden)  # (R, V)
        if self.temperature == 0:
            token = logits.argmax(-1)
        else:
            u = self.uniforms.index_select(1, self.t).squeeze(1)
            token = _inverse_cdf(logits / self.scale, u)
        logprobs, entropy = logprobs_and_entropy(logits, token, self.scale)
        place = (self.rows, self.t)
        self.tokens.index_put_(place, token.masked_fill(~self.alive, self.policy.pad_id))
        self.mask.index_put_(place, self.alive)
        self.logprobs.index_put_(place, logprobs)
        self.entropy.index_put_(place, entropy)
        self.token.copy_(token[:, None])
        self.alive.logical_and_((self.token != self.eos_ids).all(-1))

    # --------------------------------------------------------------------------- blocks of steps

    def run(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """-> tokens, mask, log-probs, entropies, as wide as the longest response

        Behind a row's end: the padding token, False, 0, 0.
        """
        share = GRAPH_SHARE_ALIVE if self.graphed else SHARE_ALIVE
        with without_flash(self.policy.model.get_decoder()):
            for start in range(0, self.T - 1, BLOCK_TOKENS):
                alive = self.alive.nonzero().flatten()  # the host waits for the device, here alone
                if len(alive) == 0:
                    break
                if len(alive) <= share * len(self.rows):  # not at every end: moving the rest costs
                    self.keep(alive)
                steps = min(BLOCK_TOKENS, self.T - 1 - start)
                self.widen(self.L + start + steps)
                for _ in range(steps):
                    self.take_step()
        width = int(self.mask.sum(dim=1).max())
        # An ended row that was computed on has numbers behind its end, which are no response's.
        self.logprobs.masked_fill_(~self.mask, 0.0)
        self.entropy.masked_fill_(~self.mask, 0.0)
        results = (self.tokens, self.mask, self.logprobs, self.entropy)
        return tuple(x[:, :width] for x in results)

    def widen(self, end: int) -> None:
        """Attention sees the places up to `end`, and some more where a capture costs."""
        if end > self.cursor.width:
            width = round_up(end, GRAPH_TOKENS if self.graphed else BLOCK_TOKENS)
            self.cursor.width = min(width, len(self.places))
            self.graph = None

    def keep(self, rows: Tensor) -> None:
        """Drop the other rows.   rows: indices"""
        for name in ("uniforms", "rows", "alive", "token", "position", "bias"):
            setattr(self, name, getattr(self, name)[rows])
        for layer in self.cache.layers:
            layer.keep(rows)
        self.graph = None

    def take_step(self) -> None:
        if self.graph is not None:
            self.graph.replay()
        elif self.graphed:
            self.step_and_capture()
        else:
            self.step()

    def step_and_capture(self) -> None:
        """A step as it is, the warm-up that a capture needs, and the capture of those to come.

        A capture computes nothing, so no buffer has to be restored. A graph has its own memory for
        what a step makes and drops. Where a capture fails, the buffers are as they were.
        """
        self.stream.wait_stream(torch.cuda.current_stream())
        # The outer `stream` leaves the side stream after a failed capture, too.
        with torch.cuda.stream(self.stream):
            self.step()
            graph = torch.cuda.CUDAGraph()
            # Of other threads (NCCL's watchdog) nothing is refused.
            options = {"stream": self.stream, "capture_error_mode": "thread_local"}
            try:
                with torch.cuda.graph(graph, **options):
                    self.step()
                self.graph = graph
            except RuntimeError as error:
                Decoder.use_graphs = False
                reason = str(error).strip().split("\n")[0]
                print(f"sampling goes on without CUDA graphs, more slowly: {reason:.200}")
        torch.cuda.current_stream().wait_stream(self.stream)


def logprobs_and_entropy(
    logits: Tensor, tokens: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """grpo.token_logprobs and tsec.token_entropy of float32 logits.   (N, V), (N,) -> (N,), (N,)

    The same operations with one log-softmax for both: a chunk's backward holds one tensor of V
    numbers per token less.
    """
    logp = torch.log_softmax(logits / temperature, dim=-1)
    finite = logp.masked_fill(logp == -torch.inf, 0.0)  # a banned token: 0 * log 0 = 0
    logprobs = logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return logprobs, -(logp.exp() * finite).sum(dim=-1)


def round_up(x: int, multiple: int) -> int:
    return -(-x // multiple) * multiple


def uniforms(seed: int, n: int, length: int) -> Tensor:
    """U[0, 1) of one prompt. On the CPU: the same for every device.   -> (n, length) float64"""
    return torch.rand(n, length, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _inverse_cdf(logits: Tensor, u: Tensor) -> Tensor:
    """The first token whose cumulative probability exceeds u.   (R, V), (R,) -> (R,)

    In float64: in float32, over a large vocabulary, u could reach past the last cumulative sum.
    """
    cdf = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True).squeeze(1)

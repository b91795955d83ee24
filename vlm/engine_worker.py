"""What runs inside vLLM's worker: a logits processor that draws tokens as Policy.sample draws them.

vLLM imports it by name, in an environment of its own: "vlm.engine_worker:Draw" and
"vlm.engine_worker.Extension". It imports nothing of transformers.

vLLM is asked for the most likely token (temperature 0), and `Draw` leaves it one token to choose.
So log-prob, entropy and choice come from the same logits, by the same rule and the same random
numbers as in Policy.sample. In float32 the tokens are equal but for rounding. No generator of vLLM
is used, and no limit of its sampler applies.
"""

import torch
from safetensors import safe_open
from torch import Tensor
from vllm.v1.sample.logits_processor import LogitsProcessor

import grpo
import tsec

BANNED: list[Tensor] = []  # one: ids that are never drawn; it comes with the weights
# Of each pass: [(row of the batch, the request's key, position)], log-probs and entropies (rows,)
LOG: list[tuple[list[tuple[int, str, int]], Tensor, Tensor]] = []


class Draw(LogitsProcessor):
    """Bans tokens, notes log-prob and entropy at the request's temperature, and draws its token.

    A request's extra_args: key (its name in LOG), temperature (0: greedy), uniforms (one per token
    to come, U[0, 1)).
    """

    def __init__(self, vllm_config, device, is_pin_memory):
        self.requests = {}  # row of the batch -> (extra_args, the tokens it has so far)

    def is_argmax_invariant(self) -> bool:
        return False  # else it is left out of greedy passes

    def update_state(self, batch_update) -> None:
        if batch_update is None:
            return
        for row in batch_update.removed:
            self.requests.pop(row, None)
        for row, params, _, tokens in batch_update.added:
            self.requests[row] = params.extra_args, tokens
        for source, target, direction in batch_update.moved:
            moved, other = self.requests.pop(source, None), self.requests.pop(target, None)
            if moved is not None:
                self.requests[target] = moved
            if other is not None and direction.name == "SWAP":
                self.requests[source] = other

    def apply(self, logits: Tensor) -> Tensor:
        """(rows, V) float32 -> the same, where only the drawn token is left"""
        temperatures, uniforms, where = [1.0] * len(logits), [0.5] * len(logits), []
        for row, (request, tokens) in self.requests.items():
            if request is None or row >= len(logits):  # a request of vLLM's own start
                continue
            # A part of a prompt is here, too. The pass of its last part notes this position again.
            where.append((row, request["key"], len(tokens)))
            temperatures[row] = request["temperature"]
            uniforms[row] = request["uniforms"][min(len(tokens), len(request["uniforms"]) - 1)]
        if BANNED:
            logits = logits.index_fill(1, BANNED[0].to(logits.device), -torch.inf)
        temperature = torch.tensor(temperatures, device=logits.device)[:, None]  # (rows, 1)
        uniform = torch.tensor(uniforms, dtype=torch.float64, device=logits.device)
        scale = torch.where(temperature == 0, 1.0, temperature)
        token = inverse_cdf(logits / scale, uniform)
        token = torch.where(temperature[:, 0] == 0, logits.argmax(-1), token)
        logprobs = grpo.token_logprobs(logits, token, scale)
        LOG.append((where, logprobs, tsec.token_entropy(logits, scale)))
        return torch.full_like(logits, -torch.inf).scatter(1, token[:, None], 0.0)


def inverse_cdf(logits: Tensor, u: Tensor) -> Tensor:
    """As in Policy.sample, which this environment cannot import.   (rows, V), (rows,) -> (rows,)"""
    cdf = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True).squeeze(1)


NOTED: dict[str, dict[int, tuple[float, float]]] = {}  # key -> position -> log-prob, entropy


class Extension:
    """Methods that vLLM adds to its worker, for collective_rpc."""

    def take(self, keys: list[str]) -> dict[str, list[tuple[float, float]]]:
        """The log-probs and entropies of finished requests, which are forgotten here."""
        for where, logprobs, entropy in LOG:
            pairs = torch.stack([logprobs, entropy], dim=1).tolist()
            for row, key, position in where:
                NOTED.setdefault(key, {})[position] = pairs[row]
        LOG.clear()
        taken = {}
        for key in keys:
            by_position = NOTED.pop(key, {})
            taken[key] = [by_position[t] for t in sorted(by_position)]
        return taken

    def load(self, path: str) -> int:
        """From a safetensors file: weights by their names in the checkpoint, and "banned" ids.

        -> how many weights
        """
        LOG.clear()
        NOTED.clear()
        with safe_open(path, "pt") as file:
            BANNED[:] = [file.get_tensor("banned")]
            names = [name for name in file.keys() if name != "banned"]
            weights = ((name, file.get_tensor(name)) for name in names)
            self.model_runner.reload_weights(weights_iterator=weights)
        return len(names)

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def token_entropy(hidden: Tensor, head: Tensor, banned: Tensor, size: int) -> Tensor:
    def chunk_entropy(rows: Tensor) -> Tensor:
        logits = (rows @ head.T).masked_fill(banned, -torch.inf)  # (chunk, V)
        logp = logits.log_softmax(-1)
        return -(logp.exp() * logp.masked_fill(banned, 0.0)).sum(-1)

    chunks = []
    for rows in hidden.split(size):
        chunks.append(checkpoint(chunk_entropy, rows, use_reentrant=False))
    return torch.cat(chunks)

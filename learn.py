"""What a step of training is made of: the loss of answers, optimisers, the learning rate's course."""
import math
from collections import defaultdict

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint


# --- the loss ---------------------------------------------------------------------------------------------------------

def due(labels, t_pos):
    """Which of the tokens (B, Nt - 1) have to foretell the next one: those whose successor has a label (is not -1).

    A text token right after a picture is nobody's: in a large model the last visual token would foretell it (and
    LLaVA's label rule asks it to), but VISOR's vision stream has no end that the output head could read.
    """
    return (labels[:, 1:] >= 0) & (t_pos[:, 1:] == t_pos[:, :-1] + 1)


def answer_loss(model, h, labels, t_pos, chunk=1024):
    """Cross-entropy of the labelled tokens, summed. h (B, Nt, d), labels and t_pos (B, Nt).

    The head runs for those that are due alone, and for `chunk` of them at a time, once more in the backward pass:
    full logits of 7,300 tokens and 152,000 words would be 4.4 GB.
    """
    asked = due(labels, t_pos)
    h, labels = h[:, :-1][asked], labels[:, 1:][asked]

    def piece(h, labels):
        return F.cross_entropy(model.head(h).float(), labels, reduction="sum")
    pieces = zip(h.split(chunk), labels.split(chunk))
    return sum(checkpoint(piece, *x, use_reentrant=False, preserve_rng_state=False) for x in pieces)


class Learner(nn.Module):
    """A model with its loss as one module's forward, which is what data parallelism wraps."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, batch, labels, sa):
        """The summed loss of a data.Batch with labels (B, Nt) in configuration sa."""
        h = self.model(batch, sa)
        t_pos = torch.from_numpy(batch.t_pos).to(h.device)
        return answer_loss(self.model, h, labels.to(h.device), t_pos)


# --- optimisers -------------------------------------------------------------------------------------------------------

class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised: every matrix moves by about the same amount in all its directions (Jordan et al. 2024).

    Newton-Schulz in float32, for all matrices of a shape at once: on a CPU 13 times faster than torch.optim.Muon, which
    takes them one by one in bfloat16 (84 small matrices: 18 ms a step against 229).
    """

    def __init__(self, parameters, lr, momentum=0.95):
        super().__init__(parameters, dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            same = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    m.mul_(group["momentum"]).add_(p.grad)
                    same[p.shape].append((p, p.grad + group["momentum"] * m))  # Nesterov
            for (rows, columns), pairs in same.items():
                x = torch.stack([g for _, g in pairs])
                x = x if rows <= columns else x.mT
                x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
                for _ in range(5):
                    a = x @ x.mT
                    x = 3.4445 * x + (-4.775 * a + 2.0315 * a @ a) @ x
                x = x if rows <= columns else x.mT
                for (p, _), update in zip(pairs, x):
                    p.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def optimizers(model, lr, muon=True):
    """{name: (optimizer, names of its parameters, learning rate)} for what trains; nothing decays (paper 5.1).

    AdamW for everything; or, as the miniature learns better so, Muon for the matrices, and AdamW with a tenth of the
    rate for embeddings, convolutions, norms, biases and the router.
    """
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    matrices = [n for n, p in trained.items()
                if muon and p.ndim == 2 and "embed" not in n and not n.startswith("router.")]
    rest, share = [n for n in trained if n not in matrices], 0.1 if muon else 1.0
    opts = {}
    if matrices:
        opts["muon"] = Muon([trained[n] for n in matrices], lr), matrices, lr
    if rest:
        betas = (0.9, 0.98) if muon else (0.9, 0.999)
        adamw = torch.optim.AdamW([trained[n] for n in rest], lr * share, betas=betas, weight_decay=0.0)
        opts["adamw"] = adamw, rest, lr * share
    return opts


def rate(step, steps, warmup, flat=None):
    """The share of the learning rate at a step. Linear warm-up; then constant up to flat * steps and linear down to
    2 %, or without flat a cosine down to 0."""
    up = min(1.0, (step + 1) / max(warmup, 1))
    if flat is None:
        return up * 0.5 * (1 + math.cos(math.pi * min(1.0, max(0, step - warmup) / max(1, steps - warmup))))
    return up * (1 - 0.98 * max(0.0, step / steps - flat) / (1 - flat))

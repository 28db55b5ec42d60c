"""The demo's language model: a small transformer on `flash_attn.modules.mha.MHA`, and how it learns and writes."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flash_attn.modules.mha import MHA


class Settings(NamedTuple):
    """Sizes and schedule; tokens in a step: batch * seqlen."""

    layers: int = 4
    width: int = 128
    heads: int = 4
    seqlen: int = 128
    batch: int = 8
    steps: int = 400
    learning_rate: float = 4e-3
    seed: int = 0


class Block(nn.Module):
    """Attention with rotary positions and a feed-forward layer, normalised before, added after."""

    def __init__(self, width: int, heads: int, layer: int):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = MHA(width, heads, causal=True, layer_idx=layer, rotary_emb_dim=width // heads)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, cache: SimpleNamespace | None = None) -> Tensor:
        """x [batch, seq, width]."""
        x = x + self.attention(self.norm1(x), inference_params=cache)
        return x + self.feed_forward(self.norm2(x))


class LanguageModel(nn.Module):
    """Next-token logits; the embedding serves the output, too."""

    def __init__(self, vocabulary: int, settings: Settings):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, settings.width)
        self.blocks = nn.ModuleList(Block(settings.width, settings.heads, i) for i in range(settings.layers))
        self.norm = nn.LayerNorm(settings.width)
        nn.init.normal_(self.embedding.weight, std=settings.width**-0.5)

    def forward(self, tokens: Tensor, cache: SimpleNamespace | None = None) -> Tensor:
        """tokens int64 [batch, seq]: logits [batch, seq, vocabulary]. A cache grows by the tokens' keys and values."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, cache)
        return F.linear(self.norm(x), self.embedding.weight)


def new_cache(batch: int, longest: int) -> SimpleNamespace:
    """An empty key-value cache, as `MHA` takes it."""
    return SimpleNamespace(key_value_memory_dict={}, seqlen_offset=0, max_seqlen=longest, max_batch_size=batch)


def learning_rate(step: int, settings: Settings) -> float:
    """Rises over a tenth of the steps, then falls to 0 linearly."""
    rise = max(1, settings.steps // 10)
    return settings.learning_rate * min((step + 1) / rise, (settings.steps - step) / max(1, settings.steps - rise))


def train(
    text: Tensor, vocabulary: int, settings: Settings, device: torch.device, report: Callable[[float], None]
) -> tuple[LanguageModel, list[float]]:
    """Trains from the seed on; returns the model and the loss (nats per token) of every step.

    Args:
        text: int64 [tokens], on the CPU.
        report: called with each step's loss.
    """
    torch.manual_seed(settings.seed)
    model = LanguageModel(vocabulary, settings).to(device)
    matrices = [x for x in model.parameters() if x.dim() == 2]
    others = [x for x in model.parameters() if x.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, betas=(0.9, 0.98))
    losses = []
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        starts = torch.randint(len(text) - settings.seqlen, (settings.batch, 1))
        window = text[starts + torch.arange(settings.seqlen + 1)].to(device)
        logits = model(window[:, :-1])
        loss = F.cross_entropy(logits.flatten(0, 1), window[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        report(losses[-1])
    return model, losses


@torch.no_grad()
def write(model: LanguageModel, prompt: Tensor, count: int, temperature: float, seed: int) -> list[int]:
    """`count` tokens after the prompt, int64 [tokens], drawn one at a time; keys and values come from a cache."""
    generator = torch.Generator().manual_seed(seed)
    cache = new_cache(1, len(prompt) + count)
    tokens, written = prompt[None], []
    for _ in range(count):
        logits = model(tokens.to(model.embedding.weight.device), cache)[0, -1]
        cache.seqlen_offset += tokens.shape[1]
        chances = torch.softmax(logits.cpu() / temperature, dim=0)
        tokens = torch.multinomial(chances, 1, generator=generator)[None]
        written.append(int(tokens))
    return written

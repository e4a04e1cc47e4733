"""Small networks of every shape the tests need."""

from __future__ import annotations

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Residual(nn.Module):
    def __init__(self, width: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(x + self.drop(self.norm(self.conv(x))))


class SmallResNet(nn.Module):
    """Stem, `depth` residual blocks, head: depth + 1 blocks. Input (batch, 1, 8, 8), output (batch, 5)."""

    def __init__(self, depth: int = 4, width: int = 8, dropout: float = 0.0) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.blocks = nn.ModuleList([Residual(width, dropout) for _ in range(depth)])
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm(x)
        return x + self.attention(y, y, y, need_weights=False)[0] + self.mlp(y)


class SmallViT(nn.Module):
    """Patches, `cls_token`, `pos_embed`, layers, final norm, head. Input (batch, 1, 8, 8), output (batch, 5)."""

    def __init__(self, depth: int = 3, width: int = 16, checkpointing: str = "") -> None:
        super().__init__()
        # Defined in an order that is not the order of use, on purpose.
        self.head = nn.Linear(width, 5)
        self.norm = nn.LayerNorm(width)
        self.blocks = nn.ModuleList([Layer(width) for _ in range(depth)])
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, width) * 0.02)
        self.head_scale = nn.Parameter(torch.ones(width))
        self.patch_embed = nn.Conv2d(1, width, 2, stride=2)
        self.embed_drop = nn.Dropout(0.1)
        self.checkpointing = checkpointing

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patch_embed(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        x = self.embed_drop(x)
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=self.checkpointing == "reentrant")
            else:
                x = block(x)
        return self.head(self.norm(x)[:, 0] * self.head_scale)


class TiedLanguageModel(nn.Module):
    """Embedding tied to the output projection. Input (batch, length) ids, output (batch, length, vocabulary)."""

    def __init__(self, depth: int = 3, width: int = 16, vocabulary: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.layers = nn.ModuleList([Layer(width) for _ in range(depth)])
        self.output = nn.Linear(width, vocabulary, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.output(x)


class EncoderDecoder(nn.Module):
    """Separate embeddings, encoder and decoder stacks from torch. Input two id tensors, output (batch, length, vocabulary)."""

    def __init__(self, width: int = 16, vocabulary: int = 32, depth: int = 2) -> None:
        super().__init__()
        self.source = nn.Embedding(vocabulary, width)
        self.target = nn.Embedding(vocabulary, width)
        self.transformer = nn.Transformer(width, 2, depth, depth, 32, dropout=0.1, batch_first=True)
        self.output = nn.Linear(width, vocabulary)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.output(self.transformer(self.source(source), self.target(target)))


def small_bert(layers: int = 4) -> nn.Module:
    """Hugging Face's BERT with a classifier, random weights. Call: input_ids, attention_mask, labels."""
    import transformers

    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=16, vocab_size=30
    )
    return transformers.BertForSequenceClassification(config)


def backward_modules(model: nn.Module, loss: torch.Tensor) -> set[str]:
    """Names of parameters that the graph behind `loss` accumulates gradients into."""
    names = {id(p): n for n, p in model.named_parameters()}
    found, seen, stack = set(), set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(names.get(id(node.variable), "<activation>"))
        stack += [n for n, _ in node.next_functions]
    return found


def graph_size(loss: torch.Tensor) -> int:
    """Number of backward nodes behind `loss`."""
    seen, stack = set(), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack += [n for n, _ in node.next_functions]
    return len(seen)

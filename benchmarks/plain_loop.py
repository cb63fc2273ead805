"""The same model in nothing but PyTorch, as nanoGPT has it: data parallel, AdamW, clipping. `overhead.py` reports it.

    torchrun --standalone --nproc-per-node N benchmarks/plain_loop.py BUNDLE STEPS OUTPUT

Shape and batch of BUNDLE's plan, random tokens that are in memory before the first step. Rank 0 writes to OUTPUT when each step
ended (s).
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel


class Layer(nn.Module):
    def __init__(self, hidden: int, heads: int, groups: int, head_dim: int, ffn: int) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = heads, groups, head_dim
        self.norm1, self.norm2 = nn.RMSNorm(hidden), nn.RMSNorm(hidden)
        self.qkv = nn.Linear(hidden, (heads + 2 * groups) * head_dim, bias=False)
        self.out = nn.Linear(heads * head_dim, hidden, bias=False)
        self.up = nn.Linear(hidden, 2 * ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x, cos, sin):
        batch, length, _ = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, length, -1, self.head_dim).transpose(1, 2)
        q, k, v = heads.split([self.heads, self.groups, self.groups], dim=1)
        q, k = (
            z * cos + torch.cat((-z[..., self.head_dim // 2 :], z[..., : self.head_dim // 2]), -1) * sin for z in (q, k)
        )
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.groups != self.heads)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, -1))
        gate, up = self.up(self.norm2(x)).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Gpt(nn.Module):
    def __init__(self, shape: dict, length: int) -> None:
        super().__init__()
        hidden, heads, head_dim = shape["hidden_size"], shape["num_attention_heads"], shape["head_dim"]
        self.embedding = nn.Embedding(shape["vocab_size"], hidden)
        self.layers = nn.ModuleList(
            Layer(hidden, heads, shape["num_query_groups"], head_dim, shape["ffn_hidden_size"])
            for _ in range(shape["num_layers"])
        )
        self.norm = nn.RMSNorm(hidden)
        self.output = nn.Linear(hidden, shape["vocab_size"], bias=False)
        if shape["tied_embeddings"]:
            self.output.weight = self.embedding.weight
        frequencies = shape["rotary_base"] ** (-torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.outer(torch.arange(length), frequencies).repeat(1, 2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens, labels):
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, self.cos, self.sin)
        return F.cross_entropy(self.output(self.norm(x)).flatten(0, 1), labels.flatten())


def main(bundle: Path, steps: int, output: Path) -> None:
    plan = json.loads((bundle / "plan.json").read_text())
    shape, training, layout = plan["shape"], plan["training"], plan["layout"]
    dist.init_process_group("gloo")
    torch.manual_seed(1)
    model = Gpt(shape, training["context_length"])
    wrapped = DistributedDataParallel(model) if dist.get_world_size() > 1 else model
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3, weight_decay=0.1)
    count = training["global_batch"] // (layout["micro_batch"] * dist.get_world_size())
    generator = torch.Generator().manual_seed(dist.get_rank())
    size = (count, layout["micro_batch"], training["context_length"] + 1)
    tokens = torch.randint(0, shape["vocab_size"], size, generator=generator)
    ends = []
    for _ in range(steps):
        optimizer.zero_grad()
        for index, batch in enumerate(tokens):
            if dist.get_world_size() > 1:
                wrapped.require_backward_grad_sync = index == count - 1
            (wrapped(batch[:, :-1], batch[:, 1:]) / count).backward()
        nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
        optimizer.step()
        ends.append(time.time())
    if dist.get_rank() == 0:
        output.write_text(json.dumps(ends))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))

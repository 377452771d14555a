"""What fetching saves: the prefill of 8,192 tokens by a random model of an 8B Llama's shape, bfloat16, plain torch.

32 layers, width 4096, 32 query and 8 KV heads of 128, feed-forward 14336: matrix products and flash attention, without
the last projection to the vocabulary. Medians; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
from typing import Any

WIDTH, FORWARD, LAYERS, HEADS, KV_HEADS, HEAD = 4096, 14336, 32, 32, 8, 128


def make_layer(torch: Any, device: Any) -> dict[str, Any]:
    shapes = {
        "qkv": (WIDTH, (HEADS + 2 * KV_HEADS) * HEAD),
        "out": (HEADS * HEAD, WIDTH),
        "up": (WIDTH, 2 * FORWARD),
        "down": (FORWARD, WIDTH),
    }
    return {
        name: torch.randn(shape, dtype=torch.bfloat16, device=device) * shape[0] ** -0.5
        for name, shape in shapes.items()
    }


def rotate(torch: Any, x: Any, cos: Any, sin: Any) -> Any:
    """Rotary position embedding of (heads, tokens, width)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def prefill(torch: Any, x: Any, layers: list[dict[str, Any]], angles: tuple[Any, Any]) -> list[tuple[Any, Any]]:
    """Run (tokens, WIDTH) through the layers; return each one's keys and values, (KV heads, tokens, head)."""
    functional, cache = torch.nn.functional, []
    for layer in layers:
        heads = (functional.rms_norm(x, (WIDTH,)) @ layer["qkv"]).view(len(x), -1, HEAD).transpose(0, 1)
        q, k, v = heads.split((HEADS, KV_HEADS, KV_HEADS))
        q, k = rotate(torch, q, *angles), rotate(torch, k, *angles)
        cache.append((k, v))
        mixed = functional.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)[0]
        x = x + mixed.transpose(0, 1).reshape(len(x), -1) @ layer["out"]
        gate, up = (functional.rms_norm(x, (WIDTH,)) @ layer["up"]).chunk(2, dim=-1)
        x = x + (functional.silu(gate) * up) @ layer["down"]
    return cache


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    import torch

    device = torch.device("cuda", options.card)
    torch.cuda.set_device(device)
    layers = [make_layer(torch, device) for _ in range(LAYERS)]
    x = torch.randn((options.tokens, WIDTH), dtype=torch.bfloat16, device=device)
    steps = torch.arange(HEAD // 2, device=device, dtype=torch.float32) / (HEAD // 2)
    turns = torch.arange(options.tokens, device=device, dtype=torch.float32)[:, None] * 500_000.0**-steps
    angles = turns.cos().bfloat16(), turns.sin().bfloat16()
    times = []
    with torch.inference_mode():
        for _ in range(options.rounds + 2):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            cache = prefill(torch, x, layers, angles)
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    nbytes = sum(k.numel() + v.numel() for k, v in cache) * 2
    finite = all(bool(k.isfinite().all()) for k, _ in cache)
    parameters = sum(weight.numel() for layer in layers for weight in layer.values())
    result = {"ms": statistics.median(times[2:]), "tokens": options.tokens, "kv_bytes": nbytes}
    print(json.dumps(result | {"parameters": parameters, "finite": finite}))


if __name__ == "__main__":
    main()

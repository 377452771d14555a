"""What a second process does in these tests, and what both have in common."""

from kvmarket.config import MarketConfig
from kvmarket.testing.tiny_models import TINY_MODEL, random_prompt, write_model

BLOCK = 16
NEW_TOKENS = 24


def load(path, device="cpu"):
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    return model.to(device).eval()


def settings(runtime_dir, **more):
    return MarketConfig(
        runtime_dir=str(runtime_dir), arena_bytes=8 << 20, registry_bytes=16 << 20, fetch_deadline_s=20, **more
    )


def prompt(count, seed=1):
    return random_prompt(count, seed=seed)


def generate(model, tokens, cache=None, new_tokens=NEW_TOKENS):
    """Return the greedy continuation, and the cache."""
    import torch

    ids = torch.tensor([tokens], device=model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        return_dict_in_generate=True,
    )
    return output.sequences[0].tolist(), output.past_key_values


def serve(state, root, runtime_dir, tokens, device="cpu"):
    """In another process: answer a prompt, publish everything computed for it; return the answer and the tokens."""
    from kvmarket_hf import CacheMarket

    state.model = load(write_model(root, TINY_MODEL), device)
    state.market = CacheMarket(state.model, block_size=BLOCK, config=settings(runtime_dir))
    sequence, cache = generate(state.model, tokens)
    return sequence, state.market.publish(sequence, cache)


def bump(state):
    return state.market.bump_epoch()

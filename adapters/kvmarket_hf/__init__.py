"""kvmarket for Hugging Face transformers: publish and fetch what a `DynamicCache` holds, on any device.

with kvmarket_hf.CacheMarket(model) as market:
    fetched = market.fetch(input_ids)
    output = model.generate(input_ids, past_key_values=fetched.cache, return_dict_in_generate=True)
    market.publish(output.sequences, output.past_key_values)
"""

from kvmarket_hf.identity import cache_spec, model_identity
from kvmarket_hf.market import CacheMarket, FetchedCache

__all__ = ["CacheMarket", "FetchedCache", "cache_spec", "model_identity"]

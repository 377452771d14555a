"""Caches of real transformers models, from one process to another."""

import hf_jobs as jobs
import pytest

from kvmarket import InvalidInputError, MarketClosedError, MissReason
from kvmarket.testing.tiny_models import TINY_MODEL, write_model

torch = pytest.importorskip("torch", reason="torch is not installed")
transformers = pytest.importorskip("transformers", minversion="5.0", reason="transformers 5 is not installed")
kvmarket_hf = pytest.importorskip("kvmarket_hf")

PROMPT = jobs.prompt(203)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def model(root):
    return jobs.load(write_model(root, TINY_MODEL))


@pytest.fixture(scope="module")
def alone(model):
    """The greedy continuation without any sharing, and its cache."""
    return jobs.generate(model, PROMPT)


@pytest.fixture
def open_market(model, runtime_dir):
    opened = []

    def make(of=model, **options):
        config = jobs.settings(runtime_dir, **options)
        opened.append(kvmarket_hf.CacheMarket(of, block_size=jobs.BLOCK, config=config))
        return opened[-1]

    yield make
    for market in opened:
        market.close()


def test_what_one_process_computed_another_continues_with_the_same_tokens(peers, root, runtime_dir, model, alone):
    sequence, published = peers.spawn().call(jobs.serve, root, runtime_dir, PROMPT, timeout_s=90)
    assert sequence == alone[0]
    assert published == (len(sequence) - 1) // jobs.BLOCK * jobs.BLOCK
    with kvmarket_hf.CacheMarket(model, block_size=jobs.BLOCK, config=jobs.settings(runtime_dir)) as market:
        fetched = market.fetch(PROMPT)
        assert (fetched.tokens, fetched.reason, fetched.detail) == (192, MissReason.NONE, "")
        assert fetched.transfers[0].transport == "shm"
        for got, own in zip(fetched.cache.layers, alone[1].layers, strict=True):
            assert got.keys.shape[2] == fetched.tokens
            assert torch.equal(got.keys, own.keys[:, :, : fetched.tokens])
            assert torch.equal(got.values, own.values[:, :, : fetched.tokens])
        assert jobs.generate(model, PROMPT, fetched.cache)[0] == alone[0]
        longer = [*sequence, 5, 6, 7]  # the conversation goes on: the answer was published, too
        assert market.fetch(longer).tokens == published
        assert jobs.generate(model, longer, market.fetch(longer).cache)[0] == jobs.generate(model, longer)[0]


def test_the_model_really_uses_what_was_fetched(open_market, model, alone):
    publisher, reader = open_market(), open_market()
    publisher.publish(PROMPT, alone[1])
    fetched = reader.fetch(PROMPT)
    for layer in fetched.cache.layers:
        layer.values[:] = 0
    assert jobs.generate(model, PROMPT, fetched.cache)[0] != alone[0]


def test_other_weights_share_nothing_and_say_so(open_market, root, alone):
    open_market().publish(PROMPT, alone[1])
    other = open_market(of=jobs.load(write_model(root, TINY_MODEL, seed=1)))
    fetched = other.fetch(PROMPT)
    assert fetched.tokens == 0
    assert "weights_digest" in fetched.detail


def test_a_changed_weight_or_setting_is_another_identity(root):
    model = jobs.load(write_model(root, TINY_MODEL))
    before = kvmarket_hf.model_identity(model)
    assert kvmarket_hf.model_identity(jobs.load(write_model(root, TINY_MODEL))) == before
    model.config.rms_norm_eps = 1e-6
    assert kvmarket_hf.model_identity(model) != before
    model.config.rms_norm_eps = 1e-5
    assert kvmarket_hf.model_identity(model) == before
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[7, 7] += 1
    assert kvmarket_hf.model_identity(model) != before


def test_the_last_token_is_always_left_to_compute(open_market, model, alone):
    publisher, reader = open_market(), open_market()
    publisher.publish(PROMPT, alone[1])
    for count, expected in ((1, 0), (16, 0), (17, 16), (32, 16), (33, 32)):
        fetched = reader.fetch(torch.tensor([PROMPT[:count]]))
        assert fetched.tokens == fetched.cache.get_seq_length() == expected
        assert (fetched.reason is MissReason.SHORT_PROMPT) == (expected == 0)
        again = jobs.generate(model, PROMPT[:count], fetched.cache, 4)[0]
        assert again == jobs.generate(model, PROMPT[:count], None, 4)[0]


def test_a_fork_of_a_prompt_shares_what_it_has_in_common(open_market, model, alone):
    publisher, reader = open_market(), open_market()
    publisher.publish(PROMPT, alone[1])
    fork = [*PROMPT[:100], *jobs.prompt(60, seed=9)]
    fetched = reader.fetch(fork)
    assert fetched.tokens == 96
    assert fetched.reason is MissReason.NOT_PUBLISHED
    assert jobs.generate(model, fork, fetched.cache)[0] == jobs.generate(model, fork)[0]


def test_a_batch_padding_and_foreign_caches_are_refused_by_name(open_market, alone):
    market = open_market()
    with pytest.raises(InvalidInputError, match="one prompt, not of 2"):
        market.fetch(torch.tensor([PROMPT, PROMPT]))
    half = transformers.DynamicCache()
    for number, layer in enumerate(alone[1].layers):
        half.update(layer.keys.half(), layer.values.half(), number)
    with pytest.raises(InvalidInputError, match="float16"):
        market.publish(PROMPT, half)
    with pytest.raises(InvalidInputError, match="4 layers"):
        market.publish(PROMPT, transformers.DynamicCache())
    assert market.publish(PROMPT[:7], alone[1]) == 0


def test_models_that_cannot_be_shared_are_refused_at_once(model, runtime_dir):
    config = jobs.settings(runtime_dir)
    model.train()
    with pytest.raises(InvalidInputError, match=r"model\.eval"):
        kvmarket_hf.CacheMarket(model, config=config)
    model.eval()
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    windowed = transformers.MistralConfig(**shape, num_key_value_heads=1, vocab_size=64, sliding_window=8)
    with pytest.raises(InvalidInputError, match="DynamicSlidingWindowLayer"):
        kvmarket_hf.CacheMarket(transformers.MistralForCausalLM(windowed).eval(), config=config)


def test_new_weights_make_everybody_forget(peers, root, runtime_dir, open_market):
    peer = peers.spawn()
    peer.call(jobs.serve, root, runtime_dir, PROMPT, timeout_s=90)
    reader = open_market()
    assert reader.fetch(PROMPT).tokens == 192
    peer.call(jobs.bump)
    assert reader.fetch(PROMPT).tokens == 0


def test_an_owner_that_dies_is_a_miss(peers, root, runtime_dir, open_market, model):
    peer, reader = peers.spawn(), open_market()
    peer.call(jobs.serve, root, runtime_dir, PROMPT, timeout_s=90)
    assert reader.fetch(PROMPT).tokens == 192
    peer.kill()
    fetched = reader.fetch(PROMPT)
    assert fetched.tokens == 0
    assert jobs.generate(model, PROMPT, fetched.cache)[0] == jobs.generate(model, PROMPT)[0]


def test_a_closed_market_says_so(open_market, alone):
    market = open_market()
    market.publish(PROMPT, alone[1])
    market.close()
    market.close()
    with pytest.raises(MarketClosedError):
        market.fetch(PROMPT)
    with pytest.raises(MarketClosedError):
        market.publish(PROMPT, alone[1])


def test_a_secret_separates(open_market, alone):
    mine, same, other, none = (open_market(secret=text * 16) for text in ("a", "a", "b", ""))
    published = mine.publish(*alone)
    assert published > 0
    assert same.fetch(PROMPT).tokens == 192
    for market in (other, none):
        assert (market.fetch(PROMPT).tokens, market.fetch(PROMPT).reason) == (0, MissReason.NOT_PUBLISHED)

"""Nothing is ever found across two namespaces, and the log and the counters name what differs."""

import re
from dataclasses import dataclass, field

import pytest

from kvmarket.testing.tiny_models import TINY_MODEL, random_prompt, write_model

pytestmark = pytest.mark.vllm

PROMPT_TOKENS = 800
HIT_TOKENS = (PROMPT_TOKENS - 1) // 32 * 32
ANSWER_TOKENS = 12
DIFFERS = "vllm:kvmarket_misses{reason=namespace_differs}"
ONE_SEED = "use one hash algorithm and one PYTHONHASHSEED everywhere"


@dataclass(frozen=True)
class Variant:
    """A replica that must not find what others publish, the fields that differ, and whether its answers are equal.

    Fields of `also` differ on some processors only.
    """

    options: dict
    fields: set
    also: frozenset = frozenset()
    same_answers: bool = True
    says: str = ""


def env(**settings):
    return {"environ": settings}


def args(**fields):
    return {"engine_args": fields}


def seeded(seed):
    return {**args(prefix_caching_hash_algo="xxhash"), **env(PYTHONHASHSEED=str(seed))}


VARIANTS = {
    "dtype": Variant(
        {"dtype": "bfloat16"},
        {"spec.dtype", "engine.dtype"},
        also=frozenset({"spec.packing"}),  # AMX has instructions for bfloat16, not for float32
        same_answers=False,
    ),
    "block_size": Variant({"block_size": 64}, {"spec.block_size", "engine.order"}),
    "weights": Variant({"model": "other"}, {"model.weights_digest"}, same_answers=False),
    "revision": Variant(args(revision="v2"), {"model.revision"}),
    "model_id": Variant({"extra": {"model_id": "another name"}}, {"model.name"}),
    "weights_digest": Variant({"extra": {"weights_digest": "epoch 2"}}, {"model.weights_digest"}),
    "tenant": Variant(env(KVMARKET_TENANT="another tenant"), {"tenant"}),
    "salt": Variant(env(KVMARKET_SALT="not to be shown"), {"salt"}),
    "hash_algorithm": Variant(
        args(prefix_caching_hash_algo="sha256_cbor"), {"hash.algorithm", "hash.root", "engine.python"}, says=ONE_SEED
    ),
    "hash_seed": Variant(seeded(2), {"hash.root"}, says=ONE_SEED),
}


@dataclass
class Launches:
    """Starts the variants in order, one ahead of the one that is asked for."""

    fleet: object
    other_model: str
    running: dict = field(default_factory=dict)

    def get(self, name):
        names = list(VARIANTS)
        following = names[names.index(name) : names.index(name) + 2]
        for each in following:
            if each not in self.running:
                options = dict(VARIANTS[each].options)
                if "model" in options:
                    options["model"] = self.other_model
                self.running[each] = self.fleet.launch(**options)
        self.running[name].wait_ready()
        return self.running[name]


@pytest.fixture(scope="module")
def launches(fleet, tmp_path_factory):
    return Launches(fleet, write_model(tmp_path_factory.mktemp("other"), TINY_MODEL, seed=1))


@pytest.fixture(scope="module")
def prompt():
    return random_prompt(PROMPT_TOKENS, seed=6000)


@pytest.fixture(scope="module")
def publishers(fleet, prompt):
    """One with everything as it comes, one with a hash that depends on PYTHONHASHSEED. Both have published."""
    publishers = fleet.start_all({}, seeded(1))
    for publisher in publishers:
        fleet.publish(publisher, [prompt])
    return publishers


@pytest.fixture(scope="module")
def right(truth, prompt):
    (answer,) = truth.generate([prompt], max_tokens=ANSWER_TOKENS)
    return answer.tokens


def explanations(replica):
    """Return the lines in which a replica's log says why it found nothing."""
    return [line for line in replica.log_path.read_text().splitlines() if "nothing found (namespace_differs)" in line]


@pytest.mark.parametrize("name", VARIANTS)
def test_another_namespace_never_hits_and_says_why(publishers, launches, prompt, right, name):
    variant = VARIANTS[name]
    replica = launches.get(name)
    (answer,) = replica.generate([prompt], max_tokens=ANSWER_TOKENS)
    counters = replica.counters()
    lines = explanations(replica)
    (again,) = replica.generate([prompt], max_tokens=ANSWER_TOKENS)
    replica.close()

    assert (answer.cached_tokens, answer.external_tokens) == (0, 0)
    assert (answer.tokens == right) is variant.same_answers
    assert again.tokens == answer.tokens
    assert counters[DIFFERS] == 1
    assert counters["vllm:kvmarket_loads"] == 0
    assert len(lines) == 1
    differences = lines[0].partition("differs in ")[2]
    assert set(re.findall(r"([\w.]+): '?[^;]*? here, ", differences)) - variant.also == variant.fields
    assert variant.says in lines[0]
    assert "not to be shown" not in replica.log_path.read_text()


def test_the_same_namespace_hits(fleet, publishers, prompt, right):
    """The control: with one hash seed, and through other spellings of the same settings, everything is found."""
    same, spelled = fleet.start_all(seeded(1), {"extra": {"tenant": "", "verify": "sampled"}})
    for replica in (same, spelled):
        (answer,) = replica.generate([prompt], max_tokens=ANSWER_TOKENS)
        assert answer.external_tokens == HIT_TOKENS
        assert answer.tokens == right
        assert replica.counters().get(DIFFERS, 0) == 0
        replica.close()


def test_unequal_hash_seeds_are_noticed_by_replicas_that_started_together(fleet):
    """Each had published before it first looked for anything: what it finds are its own blocks alone."""
    replicas = fleet.start_all(seeded(3), seeded(4))
    for number, replica in enumerate(replicas):
        fleet.publish(replica, [random_prompt(200, seed=6200 + number)])
    for number, replica in enumerate(replicas):
        said = len(explanations(replica))
        replica.generate([random_prompt(200, seed=6210 + number)], max_tokens=1)
        (line,) = explanations(replica)[said:]
        assert "hash.root" in line
        assert ONE_SEED in line
    for replica in replicas:
        replica.close()


def test_a_request_salt_separates_requests_not_replicas(fleet, publishers, truth):
    publisher, _ = publishers
    reader = fleet.start()
    prompt = random_prompt(PROMPT_TOKENS, seed=6100)
    fleet.publish(publisher, [prompt], cache_salt="one")
    external = [
        reader.generate([prompt], max_tokens=ANSWER_TOKENS, cache_salt=salt)[0].external_tokens
        for salt in (None, "two", "one")
    ]
    reader.close()
    assert external == [0, 0, HIT_TOKENS]


def test_replicas_with_a_secret_share_among_themselves_alone(fleet, publishers, prompt, right, tmp_path):
    secret = "not to be shown either, and long"  # noqa: S105 - of this test
    path = tmp_path / "secret"
    path.write_text(secret + "\n")
    path.chmod(0o600)
    owner, reader = fleet.start_all({"extra": {"secret_file": str(path)}}, env(KVMARKET_SECRET=secret))
    (answer,) = reader.generate([prompt], max_tokens=ANSWER_TOKENS)  # which others have published, without a secret
    assert (answer.external_tokens, answer.tokens) == (0, right)
    (line,) = explanations(reader)
    assert re.search(r"differs in secret: '\w+' here, '\(absent\)' there", line)
    own = random_prompt(PROMPT_TOKENS, seed=6200)
    fleet.publish(owner, [own])
    assert reader.generate([own], max_tokens=ANSWER_TOKENS)[0].external_tokens == HIT_TOKENS
    stranger, _ = publishers
    assert stranger.generate([own], max_tokens=ANSWER_TOKENS)[0].external_tokens == 0
    assert not [line for line in explanations(stranger) if "secret" in line], "nor is it told that there is something"
    for replica in (owner, reader):
        assert secret not in replica.log_path.read_text()
        replica.close()

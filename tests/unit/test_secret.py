"""A secret is needed to compute anything of its namespace, and shows nowhere."""

import ast
import copy
import os
import pickle
from dataclasses import asdict, replace
from pathlib import Path

import pytest

import kvmarket
from kvmarket.config import MarketConfig
from kvmarket.errors import ConfigError
from kvmarket.hashing import hash_blocks, token_array
from kvmarket.identity import ModelIdentity, Namespace, visible_to
from kvmarket.prefix_keys import PrefixKeys
from kvmarket.registry.records import block_key, block_keys
from kvmarket.secret import BYTES_MAX, Secret
from kvmarket.testing.samples import SPEC, sample_tokens

TEXT = "correct horse battery staple"
MINE = Namespace(ModelIdentity("m"), SPEC, tenant="acme", secret=Secret(TEXT))
OTHER = replace(MINE, secret=Secret("another, just as long as it"))
NONE = replace(MINE, secret=Secret())
BLOCKS = 70  # more than two runs


def keys_of(namespace, root=None):
    keys = PrefixKeys(root or namespace.digest, SPEC.block_size, namespace.algorithm, namespace.sealer)
    return keys.of(token_array(sample_tokens(1, BLOCKS)))


def test_every_secret_makes_another_namespace():
    assert len({namespace.digest for namespace in (MINE, OTHER, NONE)}) == 3
    assert MINE.digest == replace(MINE, secret=Secret(TEXT.encode())).digest
    assert replace(MINE, salt=b"x").digest != MINE.digest
    assert replace(MINE, tenant="x").digest != MINE.digest


def test_who_knows_a_namespace_but_not_its_secret_cannot_compute_a_key():
    """The digest is in the registry for its administrator to see; hashing tokens from it on leads nowhere."""
    mine = set(keys_of(MINE))
    assert not mine & set(keys_of(NONE, MINE.digest))
    assert not mine & set(keys_of(OTHER, MINE.digest))


def test_the_next_key_does_not_follow_from_the_last_one():
    """Unsealed chains let whoever sees one key try what may come after it."""
    seen = [key[12:] for key in keys_of(MINE)]
    tokens = sample_tokens(1, BLOCKS)
    following = hash_blocks(tokens[-SPEC.block_size :], SPEC.block_size, root=seen[-2])
    assert following[0] != seen[-1]
    plain = [key[12:] for key in keys_of(NONE)]
    assert hash_blocks(tokens[-SPEC.block_size :], SPEC.block_size, root=plain[-2])[0] == plain[-1]


@pytest.mark.parametrize("start", [0, 1, 31, 32, 40, 69])
def test_sealed_keys_are_the_same_from_wherever_one_starts(start):
    hashes = [os.urandom(32) for _ in range(BLOCKS)]
    whole = block_keys(hashes, seal=MINE.sealer)
    assert block_keys(hashes, start, MINE.sealer) == whole[start:]
    assert block_key(hashes, start, MINE.sealer) == whole[start]
    assert whole != block_keys(hashes)
    assert {len(key) for key in whole} == {44}


def test_keys_of_prompts_that_begin_alike_are_sealed_alike():
    keys = PrefixKeys(MINE.digest, SPEC.block_size, "sha256", MINE.sealer)
    tokens = token_array(sample_tokens(1, BLOCKS))
    short = keys.of(tokens[: 40 * SPEC.block_size])
    assert keys.of(tokens)[:40] == short
    assert keys.of(tokens) == keys_of(MINE)
    assert keys.of(tokens, [b""] * BLOCKS) == keys_of(MINE)


def hidden_in(text):
    return not any(form in text for form in (TEXT, TEXT[:8], TEXT.encode().hex(), repr(TEXT.encode())))


def test_it_is_never_shown():
    config = MarketConfig(secret=TEXT)
    shown = f"{config} {config!r} {MINE} {MINE!r} {MINE.sealer!r} {MINE.describe()} {MINE.secret} {asdict(config)}"
    assert hidden_in(shown)
    assert "hidden" in repr(config.secret)
    assert MINE.describe()["secret"] == MINE.secret.tag
    assert "secret" not in NONE.describe()


@pytest.mark.parametrize("what", [MarketConfig(secret=TEXT), MINE, MINE.secret, MINE.sealer])
def test_it_is_never_pickled(what):
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(what)


def test_without_one_everything_is_pickled_and_copied():
    for what in (MarketConfig(), NONE):
        assert pickle.loads(pickle.dumps(what)) == what  # noqa: S301 - our own
    assert copy.deepcopy(MarketConfig(secret=TEXT)).secret == Secret(TEXT)
    assert copy.copy(MINE.secret) == MINE.secret
    assert hash(Secret(TEXT)) == hash(MINE.secret) != hash(OTHER.secret)


@pytest.mark.parametrize("value", ["short", "x" * 15, b"x" * (BYTES_MAX + 1)])
def test_bad_ones_are_refused_by_name_and_not_shown(value):
    with pytest.raises(ConfigError, match="secret") as caught:
        MarketConfig(secret=value)
    assert repr(value)[1:-1] not in str(caught.value)
    text = value if isinstance(value, str) else value.decode()
    with pytest.raises(ConfigError, match=r"KVMARKET_SECRET=\(hidden\)") as caught:
        MarketConfig.from_env({"KVMARKET_SECRET": text})
    assert f"={text}" not in str(caught.value)


def test_one_that_is_no_text_is_refused_and_not_shown():
    with pytest.raises(ConfigError, match=r"MarketConfig.secret must be Secret, not \(hidden\)"):
        MarketConfig(secret=12345)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "secret"
    path.write_text(TEXT + "\n")
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o440, 0o640])
def test_it_is_read_from_a_file(file, mode):
    file.chmod(mode)
    config = MarketConfig.from_env({"KVMARKET_SECRET_FILE": str(file)})
    assert config.read_secret() == Secret(TEXT)
    assert hidden_in(repr(config))


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o620, 0o660, 0o601, 0o777])
def test_a_file_that_others_can_use_is_refused(file, mode):
    file.chmod(mode)
    with pytest.raises(ConfigError, match=f"{file} has mode {mode:04o}.*chmod 600"):
        MarketConfig(secret_file=str(file)).read_secret()


@pytest.mark.parametrize(
    ("content", "error"), [("", "is empty"), ("\n", "is empty"), ("short\n", "16 to 4096 bytes"), ("x" * 5000, "bytes")]
)
def test_what_is_in_the_file_is_checked(file, content, error):
    file.write_text(content)
    with pytest.raises(ConfigError, match=f"KVMARKET_SECRET_FILE {file}.*{error}"):
        MarketConfig(secret_file=str(file)).read_secret()


def test_files_that_are_none_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "fifo", 0o600)
    for name, error in (("fifo", "not a regular file"), ("absent", "No such file"), (".", "not a regular file")):
        with pytest.raises(ConfigError, match=error):
            MarketConfig(secret_file=str(tmp_path / name)).read_secret()
    with pytest.raises(ConfigError, match="KVMARKET_SECRET_FILE='relative': must be an absolute path"):
        MarketConfig.from_env({"KVMARKET_SECRET_FILE": "relative"})


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_file_of_another_user_is_refused(file):
    os.chown(file, 12345, -1)
    with pytest.raises(ConfigError, match="belongs to user 12345"):
        MarketConfig(secret_file=str(file)).read_secret()


def test_one_source_only(file):
    with pytest.raises(ConfigError, match="both set"):
        MarketConfig(secret=TEXT, secret_file=str(file))


def test_who_may_see_what():
    public, mine, unknown = NONE.describe(), MINE.describe(), {}
    seen = {tag: [visible_to(tag, each) for each in (public, mine, unknown)] for tag in ("", MINE.secret.tag, "other")}
    assert seen == {"": [True, False, False], MINE.secret.tag: [True, True, False], "other": [True, False, False]}


def test_no_key_is_made_without_asking_for_a_seal():
    """A call that leaves the seal out would put guessable keys into the registry of a tenant with a secret."""
    root = Path(kvmarket.__file__).parents[1]
    places = [*(root / "kvmarket").glob("*.py"), *(root / "adapters").rglob("*.py")]
    found = 0
    for path in places:
        for call in (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)):
            if ast.unparse(call.func) in {"block_keys", "block_key"}:
                found += 1
                sealed = len(call.args) == 3 or "seal" in {keyword.arg for keyword in call.keywords}
                assert sealed, f"{path}:{call.lineno}: {ast.unparse(call)}"
    assert found >= 2

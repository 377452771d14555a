"""What the shipped test tools promise, apart from the engines."""

import os
import socket
import threading
import time

import pytest

from kvmarket.testing._framing import Channel
from kvmarket.testing.tiny_models import BENCH_MODEL, TINY_MODEL, ModelSize, random_prompt, write_model


@pytest.fixture
def channels():
    left, right = (Channel(sock) for sock in socket.socketpair())
    yield left, right
    left.close()
    right.close()


def test_messages_arrive_whole_and_in_order(channels):
    left, right = channels
    messages = [{"a": 1}, b"x" * 3_000_000, None, [1, 2]]
    sender = threading.Thread(target=lambda: [left.send(message, timeout_s=5) for message in messages])
    sender.start()
    assert [right.recv(timeout_s=5) for _ in messages] == messages
    sender.join(5)


def test_an_interrupted_message_is_completed_by_the_next_receive():
    raw, sock = socket.socketpair()
    channel = Channel(sock)
    sink, tap = socket.socketpair()
    Channel(sink).send("late", timeout_s=1)
    frame = tap.recv(1 << 16)
    raw.sendall(frame[:10])
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        channel.recv(timeout_s=0.1)
    assert time.monotonic() - began < 1
    raw.sendall(frame[10:])
    assert channel.recv(timeout_s=1) == "late"
    for end in (raw, channel, sink, tap):
        end.close()


def test_descriptors_travel_with_a_message(channels):
    left, right = channels
    reader, writer = os.pipe()
    left.send("pipe", timeout_s=1, fds=[writer])
    os.close(writer)
    assert right.recv(timeout_s=1) == "pipe"
    (fd,) = right.take_fds()
    os.write(fd, b"through")
    os.close(fd)
    assert os.read(reader, 16) == b"through"
    os.close(reader)


def test_a_closed_peer_is_the_end_and_a_full_one_is_a_timeout(channels):
    left, right = channels
    with pytest.raises(TimeoutError):
        left.send(b"x" * 50_000_000, timeout_s=0.1)
    left.close()
    with pytest.raises(EOFError):
        right.recv(timeout_s=1)


def test_prompts_are_reproducible_and_nested():
    assert random_prompt(50, seed=7) == random_prompt(90, seed=7)[:50]
    assert random_prompt(50, seed=7) != random_prompt(50, seed=8)
    assert max(random_prompt(5000, seed=7)) == TINY_MODEL.vocab_size - 1


def test_sizes_are_what_they_are_called():
    assert 3e6 < TINY_MODEL.num_parameters < 6e6
    assert 100e6 < BENCH_MODEL.num_parameters < 300e6
    assert TINY_MODEL.kv_bytes_per_token() == 2 * 4 * 2 * 32 * 4


def test_a_checkpoint_is_written_once_and_depends_on_size_and_seed(tmp_path):
    pytest.importorskip("safetensors")
    load_file = pytest.importorskip("safetensors.torch").load_file
    size = ModelSize("mini", 64, 96, 2, 2, 1, 32, vocab_size=64)
    first = write_model(tmp_path / "one", size)
    weights = (first / "model.safetensors").read_bytes()
    assert sum(tensor.numel() for tensor in load_file(first / "model.safetensors").values()) == size.num_parameters

    stamp = (first / "model.safetensors").stat().st_mtime_ns
    assert write_model(tmp_path / "one", size) == first
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    again = write_model(tmp_path / "two", size)
    assert again.name == first.name
    assert (again / "model.safetensors").read_bytes() == weights
    other = write_model(tmp_path / "one", size, seed=1)
    assert other != first
    assert (other / "model.safetensors").read_bytes() != weights
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted([first.name, other.name])

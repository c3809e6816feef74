"""Malformed messages by the hundred thousand: each is refused with a `WireError` or is exactly what it should be.

Decoders first: seeded mutations of valid messages in bulk, and hypothesis, which shrinks what it finds. Then a running
service, over real gRPC, with the gatherer that feeds training behind it.

`PI_RL_FUZZ_ROUNDS=1000000 PI_RL_FUZZ_SEED=1 make test ARGS=tests/runtime/test_fuzz.py` looks for longer, elsewhere.
"""

import contextlib
import itertools
import json
import os
import random
import struct
import sys
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lerobot.transport import services_pb2, services_pb2_grpc

from lerobot_policy_pi_rl.algorithm.configuration_pi_rl_algorithm import CollectionConfig
from lerobot_policy_pi_rl.runtime.gather import Gatherer, Stopped
from lerobot_policy_pi_rl.runtime.handshake import Handshake
from lerobot_policy_pi_rl.runtime.limits import Limits
from lerobot_policy_pi_rl.runtime.packing import WireError
from lerobot_policy_pi_rl.runtime.server import LearnerServer
from lerobot_policy_pi_rl.runtime.service import PIRLLearnerService
from lerobot_policy_pi_rl.runtime.wire import decode_decisions

sys.path.insert(0, str(Path(__file__).parents[1] / "fuzz"))

from fuzz_messages import (
    DECISIONS,
    HELLO,
    INTERACTION,
    INTRODUCTION,
    MESSAGES,
    ROWS,
    SETTINGS,
    SPEC,
    STATISTICS,
    VERSION,
    check_decisions,
    check_interaction,
    check_introduction,
    check_weights,
    refused,
)

ASKED = os.environ.get("PI_RL_FUZZ_ROUNDS")
ROUNDS = 21_000 if ASKED is None else int(ASKED)
"""Malformed messages of each of five kinds: more than 100,000 in all."""
SEED = int(os.environ.get("PI_RL_FUZZ_SEED", "0"))
SENT = 4_000
"""Mutations that are sent to a running service."""
MIB = 2**20
SOON = 20.0

pytestmark = pytest.mark.timeout(max(180, ROUNDS // 100))


# Mutations

NUMBERS = (
    -1,
    0,
    1,
    2,
    5,
    255,
    2**16,
    2**31,
    2**32,
    2**53,
    2**62,
    2**63 - 1,
    2**63,
    2**64,
    10**30,
    1.5,
    1e308,
)
VALUES: tuple[Any, ...] = (
    *NUMBERS,
    None,
    True,
    "",
    "F32",
    "\ud800",
    "x" * 5000,
    [],
    {},
    [2**62, 4],
    [0, 2**63],
    [-1],
    ["1"],
)
DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I32",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F8_E8M0",
    "F4",
    "C64",
    "U64",
    "",
    "F33",
)
TEXTS = (
    b"NaN",
    b"-Infinity",
    b"1e999",
    b'"\\ud800"',
    b"[" * 200,
    b'{"a":' * 200,
    b"\xff\xfe",
    b"9" * 5000,
    b"\x00",
)

Mutation = Callable[[bytes, random.Random], bytes]


def flip_bits(data: bytes, rng: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def cut(data: bytes, rng: random.Random) -> bytes:
    start, end = sorted((rng.randrange(len(data)), rng.randrange(len(data) + 1)))
    return rng.choice((data[:end], data[start:], data[:start] + data[end:]))


def insert(data: bytes, rng: random.Random) -> bytes:
    place = rng.randrange(len(data) + 1)
    return data[:place] + rng.choice((*TEXTS, rng.randbytes(rng.randrange(40)))) + data[place:]


def repeat(data: bytes, rng: random.Random) -> bytes:
    start, end = sorted((rng.randrange(len(data)), rng.randrange(len(data) + 1)))
    return data[:end] + data[start:end] * rng.randrange(1, 4) + data[end:]


def overwrite(data: bytes, rng: random.Random) -> bytes:
    """Puts a number that is special to somebody where another one was."""
    special = rng.choice(
        (b"\xff" * 8, bytes(8), b"\x00\x00\xc0\x7f" * 2, b"\x00\x00\x80\x7f", struct.pack("<q", -1))
    )
    place = rng.randrange(len(data))
    return data[:place] + special + data[place + len(special) :]


def claim_length(data: bytes, rng: random.Random) -> bytes:
    """Says another length of the header."""
    length = int.from_bytes(data[:8], "little") + rng.choice((-1, 1, 8, -8))
    return (
        struct.pack(
            "<Q", rng.choice((length, *(n for n in NUMBERS if type(n) is int and 0 <= n < 2**64))) % 2**64
        )
        + data[8:]
    )


def change_header(data: bytes, rng: random.Random) -> bytes:
    """Says something else about a tensor, or has more or fewer of them; the bytes stay as they are."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = rng.choice([key for key in header if key != "__metadata__"])
    entry, kind = header[name], rng.randrange(7)
    if kind == 0:
        entry["dtype"] = rng.choice(DTYPES)
    elif kind == 1:
        entry["shape"] = rng.choice(
            (entry["shape"][::-1], [*entry["shape"], 1], [rng.choice(NUMBERS)] * 2, entry["shape"][:-1])
        )
    elif kind == 2:
        entry["data_offsets"][rng.randrange(2)] = rng.choice(NUMBERS)
    elif kind == 3:
        entry[rng.choice(("dtype", "shape", "data_offsets"))] = rng.choice(VALUES)
    elif kind == 4:
        header[rng.choice((f"{name}x", "", "state", "__metadata__", "complementary_info."))] = header.pop(
            name
        )
    elif kind == 5:
        empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
        header.update({f"more{number}": empty for number in range(rng.choice((1, 50, 300)))})
    else:
        del header[name]
    return with_header(header, data[8 + length :])


def change_metadata(data: bytes, rng: random.Random) -> bytes:
    """Says something else in the message's own header or its list of tasks."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    metadata = header["__metadata__"]
    key = rng.choice(sorted(metadata))
    # The two that are no JSON.
    inner = json.loads(metadata[key]) if key not in ("kind", "checksum") else {}
    if isinstance(inner, dict) and inner and rng.random() < 0.6:
        inner[rng.choice((*inner, "other"))] = rng.choice(VALUES)
        metadata[key] = json.dumps(inner)
    elif isinstance(inner, list) and inner and rng.random() < 0.6:
        inner[rng.randrange(len(inner))] = rng.choice(VALUES)
        metadata[key] = json.dumps(inner)
    else:
        many = [str(number) for number in range(rng.choice((0, 1, 3, 5, 400)))]
        deep = "[" * 300 + "]" * 300
        metadata[key] = rng.choice(
            (json.dumps(many), json.dumps(rng.choice(VALUES)), deep, rng.choice(VALUES))
        )
    return with_header(header, data[8 + length :])


def with_header(header: Any, rest: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + rest


def change_json(data: bytes, rng: random.Random) -> bytes:
    """Says something else in a JSON object."""
    values = json.loads(data)
    name = rng.choice(sorted(values))
    kind = rng.randrange(4)
    if kind == 0:
        values[name] = rng.choice(VALUES)
    elif kind == 1:
        values.update({f"more{number}": rng.choice(VALUES) for number in range(rng.choice((1, 100)))})
    elif kind == 2:
        del values[name]
    else:
        depth = rng.choice((2, 20, 900, 5000))
        return b'{"%s":' % name.encode() * depth + data + b"}" * depth
    return json.dumps(values).encode()


ANY: tuple[Mutation, ...] = (flip_bits, cut, insert, repeat, overwrite)
TENSORS: tuple[Mutation, ...] = (*ANY, claim_length, change_header, change_header, change_metadata)
JSON: tuple[Mutation, ...] = (*ANY, change_json, change_json)


def mutants(data: bytes, mutations: tuple[Mutation, ...], count: int, seed: int) -> Iterator[bytes]:
    """Mutated once, or now and then once more."""
    rng = random.Random(seed)
    for _ in range(count):
        mutant = rng.choice(mutations)(data, rng)
        while mutant and rng.random() < 0.2:
            mutant = rng.choice(ANY)(mutant, rng)
        yield mutant


# The decoders


MUTATIONS = {
    "decisions": TENSORS,
    "demonstrations": TENSORS,
    "weights": TENSORS,
    "interaction": JSON,
    "introduction": JSON,
}
CHECKS = {kind: (*message, MUTATIONS[kind]) for kind, message in MESSAGES.items()}


@pytest.mark.parametrize("kind", CHECKS)
def test_a_mutated_message_is_refused_or_well_formed(kind: str) -> None:
    check, data, mutations = CHECKS[kind]
    assert not refused(check, data)
    # Bits of a number may change without making the message malformed; such mutants do not count.
    refusals = (mutant for mutant in mutants(data, mutations, 2 * ROUNDS, SEED) if refused(check, mutant))
    assert sum(1 for _ in itertools.islice(refusals, ROUNDS)) == ROUNDS


@pytest.mark.skipif(ASKED is not None, reason="PI_RL_FUZZ_ROUNDS says how many")
def test_more_than_a_hundred_thousand_are_malformed() -> None:
    """With `test_a_mutated_message_is_refused_or_well_formed` of each kind, which counts to `ROUNDS`."""
    assert ROUNDS * len(CHECKS) > 100_000


@pytest.mark.parametrize("kind", CHECKS)
def test_refusing_keeps_no_memory(kind: str) -> None:
    check, data, mutations = CHECKS[kind]

    def refuse(count: int, seed: int) -> None:
        for mutant in mutants(data, mutations, count, seed):
            refused(check, mutant)

    refuse(200, 1)
    tracemalloc.start()
    try:
        refuse(300, 2)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        refuse(1500, 3)
        after, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < MIB // 4
    # The largest mutant is a few kilobytes: nothing that it claims is allocated.
    assert peak - before < 8 * MIB


@pytest.mark.parametrize("kind", CHECKS)
@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_whatever_hypothesis_makes_is_refused_or_well_formed(kind: str, data: st.DataObject) -> None:
    check, good, mutations = CHECKS[kind]
    seed = data.draw(st.integers(0, 2**32), label="seed of the mutation")
    mutant = next(mutants(good, mutations, 1, seed))
    place = data.draw(st.integers(0, len(mutant)), label="place")
    refused(check, mutant[:place] + data.draw(st.binary(max_size=20), label="noise") + mutant[place:])


@pytest.mark.parametrize("depth", [10, 17, 1000, 100_000])
def test_deep_json_is_refused_before_anybody_walks_it(depth: int) -> None:
    deep = b'{"a":' + b"[" * depth + b"]" * depth + b"}"
    assert refused(check_interaction, deep)
    assert refused(check_introduction, deep) == (depth > 10)
    header = with_header({}, b"")[:8].replace(struct.pack("<Q", 2), struct.pack("<Q", len(deep))) + deep
    assert refused(check_weights, header)
    assert refused(check_decisions, header)


def test_half_a_character_in_a_task_is_refused() -> None:
    """It is valid JSON, and would be an error wherever the text is encoded: in training."""
    length = int.from_bytes(DECISIONS[:8], "little")
    header = json.loads(DECISIONS[8 : 8 + length])
    header["__metadata__"]["tasks"] = json.dumps(["\ud800", "push"])
    with pytest.raises(WireError, match="the task list is not JSON"):
        decode_decisions(with_header(header, DECISIONS[8 + length :]), SPEC)


# A running service


@contextlib.contextmanager
def calling(
    server: LearnerServer, actor: int, session: str
) -> Iterator[tuple[services_pb2_grpc.LearnerServiceStub, list]]:
    metadata = Handshake(actor, session).to_metadata()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = services_pb2_grpc.LearnerServiceStub(channel)
        stub.Ready(services_pb2.Empty(), metadata=Handshake(actor, session, SETTINGS).to_metadata())
        parameters = stub.StreamParameters(services_pb2.Empty(), metadata=metadata)
        parameters.initial_metadata()
        yield stub, metadata
        parameters.cancel()


def in_chunks(message: type, payloads: Iterator[bytes], seed: int) -> Iterator[Any]:
    """Each payload as a stream sends it, or with chunks in disorder."""
    rng = random.Random(seed)
    for payload in payloads:
        if rng.random() < 0.8:
            yield message(transfer_state=3, data=payload)
            continue
        for _ in range(rng.randrange(1, 4)):
            yield message(
                transfer_state=rng.choice((0, 1, 2, 3, 77)), data=payload[: rng.randrange(1 + len(payload))]
            )


def malformed(check: Callable[[bytes], None], payloads: Iterator[bytes]) -> Iterator[bytes]:
    """Those that the decoder refuses, so that whatever else arrives is a fault of the service."""
    return (payload for payload in payloads if refused(check, payload))


def test_a_running_learner_survives_and_trains_on_nothing_of_it(caplog: pytest.LogCaptureFixture) -> None:
    limits = Limits(SPEC.max_message_bytes(), 64, SPEC.max_message_bytes(), 1e6, rejected_messages=10**9)
    service, stop = PIRLLearnerService(SETTINGS, 2, limits), threading.Event()
    gatherer = Gatherer(service, SPEC, CollectionConfig(num_envs=1, decisions=ROWS), stop)
    found: list[Any] = []

    def gather() -> None:
        with contextlib.suppress(Stopped):
            found.append(gatherer.gather(VERSION, evaluating=False))

    learner = threading.Thread(target=gather, daemon=True)
    with LearnerServer(service, port=0) as server, calling(server, 1, "strange") as (hostile, strange):
        learner.start()

        def attack(count: int, seed: int) -> None:
            messages = malformed(check_decisions, mutants(DECISIONS, TENSORS, count, seed))
            hostile.SendTransitions(in_chunks(services_pb2.Transition, messages, seed), metadata=strange)
            lines = malformed(check_interaction, mutants(INTERACTION, JSON, count, seed))
            hostile.SendInteractions(
                in_chunks(services_pb2.InteractionMessage, lines, seed), metadata=strange
            )

        attack(SENT // 4, 1)
        before = psutil.Process().memory_info().rss
        attack(SENT, 2)
        introduce(server, SENT // 4)
        grown = psutil.Process().memory_info().rss - before
        assert learner.is_alive()
        assert found == []
        # An honest actor, after all that, with the hostile one still there.
        with calling(server, 0, "honest") as (honest, own):
            honest.SendInteractions(
                iter([services_pb2.InteractionMessage(transfer_state=3, data=INTERACTION)]), metadata=own
            )
            honest.SendTransitions(
                iter([services_pb2.Transition(transfer_state=3, data=DECISIONS)]), metadata=own
            )
            service.actors.leave(service.actors._links[1])
            learner.join(SOON)
        stop.set()
    assert not learner.is_alive()
    (gathered,) = found
    assert torch.equal(gathered.decisions.reward, decode_decisions(DECISIONS, SPEC).decisions.reward)
    assert gathered.collections == [STATISTICS | {"actor": 0}]
    rejected = Counter(service.traffic().rejected)
    assert rejected["malformed"] > SENT
    assert rejected["unknown state"] > 100
    assert rejected["no beginning"] > 50
    assert grown < 32 * MIB
    assert "Traceback" not in caplog.text
    assert caplog.text.count("Rejected a message") < 200


REFUSED_CALL = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.RESOURCE_EXHAUSTED)


def introduce(server: LearnerServer, count: int) -> None:
    """Calls `Ready` with settings and names that nobody would send; every one is refused."""
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = services_pb2_grpc.LearnerServiceStub(channel)
        good = dict(HELLO.to_metadata())
        for number, data in enumerate(malformed(check_introduction, mutants(INTRODUCTION, JSON, count, 5))):
            metadata = {**good, "pi-rl-actor": str(number), "pi-rl-settings-bin": data}
            with pytest.raises(grpc.RpcError) as refusal:
                stub.Ready(services_pb2.Empty(), metadata=list(metadata.items()))
            # By the learner, or by gRPC before it where the metadata is larger than any honest one.
            assert refusal.value.code() in REFUSED_CALL

"""Groups between JSON, record and arrays; and what is refused on the way."""

import base64
import json
from itertools import chain

import numpy as np
import pytest
from trajectory_parts import group

from atropos_hpc.contracts.group import NO_LIMITS, Limits, encode_group, read_group, verify_record
from atropos_hpc.contracts.scored_group import RequestError, ScoredGroup
from atropos_hpc.contracts.support import Support
from atropos_hpc.contracts.wal_record import header_at
from atropos_hpc.trajectories.decode import decode_json, to_json

NAN, INF = float("nan"), float("inf")


def decode(body, many, limits=NO_LIMITS):
    return decode_json(body, many, limits)


def through(value):
    """JSON -> record -> Group."""
    (record,) = decode(json.dumps(value).encode(), many=False)
    return read_group(bytearray(record.to_bytes()))


def changed(path, new):
    """A valid group in which what lies at `path` is `new`."""
    value = group(1)
    *way, last = path
    inner = value
    for key in way:
        inner = inner[key]
    inner[last] = new
    return value


@pytest.mark.parametrize(
    ("sent", "read"),
    [
        (["length", None], ["length", None]),
        (["length"], [None, None]),
        (["length", 3], ["length", None]),
        ({"0": "length"}, [None, None]),
        ("length", [None, None]),
    ],
)
def test_finish_reasons_of_an_environment_s_own_shape_are_unknown(sent, read):
    value = group(1, sequences=2)
    value["generation_params"] = {"finish_reasons": sent}
    assert through(value).finish_reasons == read


def test_a_group_keeps_all_that_it_holds():
    sent = group(
        5,
        sequences=2,
        length=4,
        version=3,
        advantages=[[0.5, -0.5, 1, 2]] * 2,
        ref_logprobs=[[-1.0, -2.0, -3.0, -4.0]] * 2,
        overrides=[{"set_advantage_to_zero": True}, {}],
        group_overrides={"sft": True},
        env_id=7,
    )
    got = through(sent)
    assert got.lengths.tolist() == [4, 4] and got.lengths.dtype == np.uint32
    assert got.scores.tolist() == [0.0, 1.0] and got.scores.dtype == np.float64
    assert got.tokens.tolist() == [5, 0, 2, 3, 5, 1, 2, 3] and got.tokens.dtype == np.int32
    assert got.trained.tolist() == [False, False, True, True] * 2
    assert (
        got.inference_logprobs.tolist() == [1, 1, -0.25, -0.25] * 2
        and got.inference_logprobs.dtype == np.float32
    )
    assert got.advantages.tolist() == [0.5, -0.5, 1, 2] * 2
    assert got.ref_logprobs.tolist() == [-1, -2, -3, -4] * 2
    assert got.overrides == [{"set_advantage_to_zero": True}, {}]
    assert got.group_overrides == {"sft": True}
    assert got.generation_params["group_id"] == "group-5"
    assert got.policy_versions == [(3, 4), (3, 4)]
    assert got.env_id == 7


@pytest.mark.parametrize("scores", [[True, False], [True, 0.0], [np.True_, np.False_]])
def test_boolean_scores_are_numbers_from_a_worker_and_in_json(scores):
    value = {"tokens": [[1, 2], [3]], "masks": [[-100, 2], [3]], "scores": scores}
    record = encode_group(ScoredGroup.from_python(value))
    assert read_group(record.to_bytes()).scores.tolist() == [1.0, 0.0]
    value["scores"] = [score if isinstance(score, float) else bool(score) for score in scores]
    assert through(value).scores.tolist() == [1.0, 0.0]


def test_what_is_left_out_stays_unknown():
    got = through({"tokens": [[1, 2], [3]], "masks": [[-100, 2], [3]], "scores": [1, 0]})
    assert got.lengths.tolist() == [2, 1]
    assert (
        got.inference_logprobs,
        got.advantages,
        got.ref_logprobs,
        got.overrides,
        got.generation_params,
    ) == (None,) * 5
    assert got.policy_versions == [None, None]
    assert got.env_id == -1


def test_json_comes_back_as_it_was_sent():
    sent = group(
        3,
        version=2,
        messages=[[{"role": "user", "content": "[hé]"}]] * 4,
        images=["x"],
        env_id=0,
        distill_token_ids=[[[1, 2]]] * 4,
    )
    (record,) = decode(json.dumps(sent).encode(), many=False)
    back = json.loads(to_json(record.to_bytes()))
    assert {name: value for name, value in back.items() if value is not None} == sent


@pytest.mark.parametrize("parsed", [False, True])
@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tokens", changed(["tokens"], [])),
        ("tokens", changed(["tokens", 1], [])),
        ("tokens", changed(["tokens"], None)),
        ("tokens", changed(["tokens"], [1, 2])),
        ("tokens", changed(["tokens"], "12")),
        ("tokens", changed(["tokens", 0, 2], "12")),
        ("tokens", changed(["tokens", 0, 2], 1.5)),
        ("tokens", changed(["tokens", 0, 2], None)),
        ("tokens", changed(["tokens", 0, 2], [2])),
        ("tokens", changed(["tokens", 0, 2], -1)),
        ("tokens", changed(["tokens", 0, 2], 1000)),
        ("tokens", changed(["tokens", 0, 2], 2**40)),
        ("tokens", changed(["tokens", 0, 2], 10**30)),
        ("tokens", changed(["tokens", 0], [1] * 65)),
        ("masks", changed(["masks"], None)),
        ("masks", changed(["masks", 0], [-100])),
        ("masks", changed(["masks", 0, 3], 4)),
        ("masks", changed(["masks", 0, 3], 0)),
        ("scores", changed(["scores"], [1.0])),
        ("scores", changed(["scores"], None)),
        ("scores", changed(["scores", 0], NAN)),
        ("scores", changed(["scores", 0], INF)),
        ("scores", changed(["scores", 0], None)),
        ("scores", changed(["scores", 0], "1")),
        ("scores", changed(["scores", 0], [1.0])),
        ("inference_logprobs", changed(["inference_logprobs", 0, 2], NAN)),
        ("inference_logprobs", changed(["inference_logprobs", 0, 2], -INF)),
        ("inference_logprobs", changed(["inference_logprobs", 0, 2], 1e300)),
        ("inference_logprobs", changed(["inference_logprobs", 0], [0.5])),
        ("inference_logprobs", changed(["inference_logprobs", 0, 2], [0.5])),
        ("inference_logprobs", changed(["inference_logprobs"], 3)),
        ("advantages", group(1, advantages=[[1.0]] * 4)),
        ("ref_logprobs", group(1, ref_logprobs=[[NAN] * 6] * 4)),
        ("overrides", group(1, overrides=[{}])),
        ("overrides", group(1, overrides=[1, 2, 3, 4])),
        ("group_overrides", group(1, group_overrides=[1])),
        ("generation_params", group(1, generation_params=3)),
        ("policy_versions", group(1, generation_params={"policy_versions": [[1, 2]]})),
        ("policy_versions", group(1, generation_params={"policy_versions": [[2, 1]] * 4})),
        ("policy_versions", group(1, generation_params={"policy_versions": ["1"] * 4})),
        ("messages", group(1, messages=3)),
        ("messages", group(1, messages=[{"role": "user", "content": "x"}])),
        ("messages", group(1, messages=[[{"role": "user"}]])),
        ("messages", group(1, messages=[[{"content": "x"}]])),
        ("messages", group(1, messages=[["role content"]])),
        ("distill_token_ids", group(1, distill_token_ids=[[[1]]])),
        ("distill_logprobs", group(1, distill_logprobs="x")),
        ("masks", group(1, masks=[[0, 0, 1, 1, 1, 1]] * 4)),
    ],
)
def test_a_refusal_names_the_field(field, value, parsed):
    with pytest.raises(RequestError) as refused:
        if parsed:
            encode_group(ScoredGroup.from_python(value), Limits(1000, 64))
        else:
            decode(json.dumps(value).encode(), many=False, limits=Limits(1000, 64))
    assert refused.value.status == 422
    assert field in str(refused.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("env_id", group(1, env_id=env_id)) for env_id in (-1, "0", 1.5, 2**31)),
        ("tokens", changed(["tokens", 0, 2], True)),
    ],
)
def test_json_is_checked_for_types_that_python_mixes_up(field, value):
    with pytest.raises(RequestError, match=field):
        decode(json.dumps(value).encode(), many=False)


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"nonsense", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 5000, b'{"tokens": [[1'],
)
@pytest.mark.parametrize("many", [False, True])
def test_what_is_not_json_is_a_400(body, many):
    with pytest.raises(RequestError) as refused:
        decode(body, many)
    assert refused.value.status == 400
    decode(json.dumps([group(1)]).encode(), many=True)  # and the next body is read


@pytest.mark.parametrize(
    ("body", "many"), [([], False), ({}, True), (3, False), ([3], True), (None, False)]
)
def test_one_group_and_many_are_not_confused(body, many):
    with pytest.raises(RequestError) as refused:
        decode(json.dumps(body).encode(), many)
    assert refused.value.status == 422


def test_nan_in_free_form_fields_becomes_null():
    got = through(
        group(1, generation_params={"temperature": NAN, "group_id": "x", "deep": [{"x": INF}]})
    )
    assert got.generation_params == {"temperature": None, "group_id": "x", "deep": [{"x": None}]}


def test_what_json_cannot_hold_is_refused_by_field():
    for value in ({"x": "\ud800"}, {"x": 2**70}):
        with pytest.raises(RequestError, match="generation_params"):
            ScoredGroup.from_python(group(1, generation_params=value))


def test_whole_numbers_may_be_written_as_floats():
    assert through(
        {"tokens": [[1.0, 2]], "masks": [[-100.0, 2.0]], "scores": [1]}
    ).tokens.tolist() == [1, 2]


def test_ones_may_mark_what_is_trained_where_nothing_else_can_be_meant():
    got = through({"tokens": [[7, 8, 9]], "masks": [[-100, 1, 1]], "scores": [1]})
    assert got.trained.tolist() == [False, True, True]


def test_arrays_of_a_lease_can_be_written_to():
    got = through(group(1))
    got.tokens[0] = 9
    assert got.tokens[0] == 9


def test_repeats_have_the_same_hash_whoever_sends_them():
    (first,) = decode(json.dumps(group(1, env_id=0)).encode(), many=False)
    (again,) = decode(json.dumps(group(1, env_id=5), indent=1).encode(), many=False)
    (other,) = decode(
        json.dumps(group(1, generation_params={"group_id": "other"})).encode(), many=False
    )
    assert first.hash == again.hash != other.hash


def test_equal_groups_of_one_body_are_told_apart_in_the_same_way_each_time():
    body = json.dumps([group(1, messages=[[]] * 4)] * 3).encode()
    records = decode(body, many=True)
    assert len({record.hash for record in records}) == 3
    assert [record.hash for record in decode(body, many=True)] == [
        record.hash for record in records
    ]
    assert all(
        read_group(bytearray(r.to_bytes())).tokens.tolist() == through(group(1)).tokens.tolist()
        for r in records
    )
    assert json.loads(to_json(records[2].to_bytes()))["messages"] == [[]] * 4


def test_the_support_of_sampled_tokens_goes_along_with_a_group():
    kept = [[], [], [2, 131071], list(range(300))] * 4
    support = Support.of_lists(kept)
    sent = group(1, length=4, overrides=[{}] * 4)
    (record,) = decode(json.dumps({**sent, "support": b64(support)}).encode(), many=False)
    sent_again = verify_record(
        header_at(record.to_bytes(), 0), memoryview(record.to_bytes()), NO_LIMITS
    )
    assert sent_again.payload == record.payload
    record.disambiguate(7)
    got = read_group(bytearray(record.to_bytes()))
    assert got.support.counts.tolist() == [len(ids) for ids in kept]
    assert got.support.ids.tolist() == [token for ids in kept for token in ids]
    assert got.overrides == [{}] * 4 and got.tokens.tolist() == list(chain(*sent["tokens"]))


WRONG_SUPPORTS = {
    "not the support of": Support.unrestricted(15),
    "in its own": Support.of_lists([[], [], [9], []] * 4),
    r"ids must be in \[0, 1000\)": Support.of_lists([[], [], [2, 1000], []] * 4),
}


@pytest.mark.parametrize("message", WRONG_SUPPORTS)
def test_a_wrong_support_is_refused(message):
    sent = {**group(1, length=4), "support": b64(WRONG_SUPPORTS[message])}
    with pytest.raises(RequestError, match=f"support: .*{message}"):
        decode(json.dumps(sent).encode(), many=False, limits=Limits(vocabulary=1000))


@pytest.mark.parametrize("seed", range(40))
def test_any_bytes_are_a_support_or_refused(seed):
    """What decodes is encoded to something that decodes to the same."""
    draw = np.random.default_rng(seed)
    data = draw.integers(0, 4, draw.integers(12)).astype(np.uint8)
    data[draw.random(data.size) < 0.1] += 128
    tokens = int(draw.integers(4))
    try:
        support = Support.decode(data.tobytes(), tokens)
    except ValueError:
        return
    again = Support.decode(support.encode(), tokens)
    assert again.counts.tolist() == support.counts.tolist()
    assert again.ids.tolist() == support.ids.tolist()


def b64(support):
    return base64.b64encode(support.encode()).decode()

"""Packing: nothing is lost, segments and positions follow the documents, prompts are never maskable."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llada_jax.data import pack

EOS = 9


def piece_bytes(ids):
    """Id i stands for i + 1 bytes, end-of-text for none."""
    return np.where(np.asarray(ids) == EOS, 0, np.asarray(ids) + 1).astype(np.int32)


DOCUMENTS = st.lists(st.lists(st.integers(0, 8), max_size=20), max_size=8)


@settings(deadline=None)
@given(DOCUMENTS, st.integers(1, 12))
def test_concat_and_split(documents, length):
    rows = pack.concat_and_split(documents, length, EOS, piece_bytes)
    expected = [(number, token) for number, document in enumerate(filter(None, documents)) for token in [*document, EOS]]
    inside = rows["segment"] > 0
    assert rows["tokens"][inside].tolist() == [token for _, token in expected]
    assert inside.sum() == len(expected) and inside[:-1].all()  # padding in the last row alone …
    assert (np.diff(inside.astype(int), axis=1) <= 0).all() and (rows["tokens"][~inside] == EOS).all()  # … and at its end
    assert (rows["maskable"] == inside).all()
    assert rows["bytes"].sum() == sum(token + 1 for document in documents for token in document)
    for row in range(len(inside)):  # segments number the documents of the row from 1; positions restart with them
        numbers = [number for number, _ in expected[row * length:(row + 1) * length]]
        used = len(numbers)
        assert rows["segment"][row, :used].tolist() == [number - numbers[0] + 1 for number in numbers]
        assert rows["position"][row, :used].tolist() == [i - numbers.index(number) for i, number in enumerate(numbers)]
    assert {key: array.dtype for key, array in rows.items()} == {
        "tokens": np.int32, "segment": np.int32, "position": np.int32, "maskable": bool, "bytes": np.int32}


@settings(deadline=None)
@given(st.lists(st.integers(0, 20), max_size=30))
def test_first_fit_takes_the_first_row_with_room(lengths):
    rows, used = pack.first_fit(lengths, 20), []
    for length, row in zip(lengths, rows, strict=True):  # the slow way
        expected = next((i for i, total in enumerate(used) if total + length <= 20), len(used))
        used += [0] * (expected == len(used))
        used[expected] += length
        assert row == expected


def test_first_fit_refuses_what_fits_nowhere():
    with pytest.raises(ValueError, match="21 tokens does not fit in rows of 20"):
        pack.first_fit([3, 21], 20)


SAMPLES = st.lists(st.lists(st.sampled_from([0, 2, 3]), min_size=1, max_size=16), max_size=12)


@settings(deadline=None)
@given(SAMPLES, st.sampled_from([1, 4, 8]))
def test_placed_samples_stay_whole_begin_blocks_and_never_overlap(turns, block):
    samples = [(list(range(len(t))), t) for t in turns]
    row_N = pack.first_fit([-(-len(t) // block) * block for t in turns], 16)
    rows = pack.place(samples, row_N, 16, EOS, piece_bytes, block)
    left = [(row, sample) for row, sample in zip(row_N, samples, strict=True)]
    for row in range(len(rows["tokens"])):
        segment = rows["segment"][row]
        inside = [sample for r, sample in left if r == row]
        assert segment.max() == len(inside)
        for number, (tokens, turn) in enumerate(inside, 1):
            at = np.flatnonzero(segment == number)
            assert at[0] % block == 0 and (np.diff(at) == 1).all()
            assert rows["tokens"][row, at].tolist() == tokens == rows["position"][row, at].tolist() and rows["turn"][row, at].tolist() == turn
        assert (rows["tokens"][row, segment == 0] == EOS).all() and not rows["turn"][row, segment == 0].any()
    assert (rows["maskable"] == (rows["turn"] > 0)).all()


@pytest.mark.parametrize("documents", [[], [[]]])
def test_nothing_gives_no_rows(documents):
    assert {array.shape for array in pack.concat_and_split(documents, 4, EOS, piece_bytes).values()} == {(0, 4)}
    assert pack.place([], [], 4, EOS, piece_bytes)["tokens"].shape == (0, 4)


def test_records_hold_the_rows():
    documents = [list(range(n % 9)) for n in range(1, 30)]
    prompted = pack.place([(d[:7], [0, 2, 2, 3, 3, 0, 4][:len(d)]) for d in documents], range(len(documents)), 7, EOS, piece_bytes)
    for rows in (pack.concat_and_split(documents, 7, EOS, piece_bytes), prompted):
        back = pack.from_records(pack.to_records(rows), 7)
        assert all((back[key] == rows[key]).all() and back[key].dtype == rows[key].dtype for key in rows)
        assert (back["turn"] == pack.with_turns(rows)["turn"]).all()

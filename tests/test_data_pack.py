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


def test_plain_documents_take_a_row_each():
    rows, cut, left_out = pack.pad_rows([[1, 2], [1, 2, 3, 4], [1, 2, 3, 4, 5]], 4, EOS, piece_bytes)
    assert (cut, left_out) == (1, 0)
    assert rows["tokens"].tolist() == [[1, 2, EOS, EOS], [1, 2, 3, 4], [1, 2, 3, 4]]
    assert rows["segment"].tolist() == [[1, 1, 1, 0], [1] * 4, [1] * 4]
    assert (rows["maskable"] == (rows["segment"] > 0)).all()
    assert rows["bytes"].tolist() == [[2, 3, 0, 0], [2, 3, 4, 5], [2, 3, 4, 5]]


def test_prompts_are_kept_clean_and_padding_is_answer():
    rows, cut, left_out = pack.pad_rows([[3], [4, 5, 6], [7], [1]], 5, EOS, piece_bytes, [[1, 2], [1, 2, 3], [1] * 5, []])
    assert (cut, left_out) == (1, 1)  # the second answer loses a token; the third prompt fills the row
    assert rows["tokens"].tolist() == [[1, 2, 3, EOS, EOS], [1, 2, 3, 4, 5], [1, EOS, EOS, EOS, EOS]]
    assert rows["maskable"].tolist() == [[False, False, True, True, True], [False, False, False, True, True], [True] * 5]
    assert (rows["segment"] == 1).all() and (rows["position"] == np.arange(5)).all()


@pytest.mark.parametrize("documents", [[], [[]]])
def test_nothing_gives_no_rows(documents):
    assert {array.shape for array in pack.concat_and_split(documents, 4, EOS, piece_bytes).values()} == {(0, 4)}
    assert pack.pad_rows([], 4, EOS, piece_bytes)[0]["tokens"].shape == (0, 4)


def test_records_hold_the_rows():
    documents = [list(range(n % 9)) for n in range(1, 30)]
    prompted, _, _ = pack.pad_rows(documents, 7, EOS, piece_bytes, [[1, 2] if i % 2 else None for i in range(len(documents))])
    for rows in (pack.concat_and_split(documents, 7, EOS, piece_bytes), prompted):
        back = pack.from_records(pack.to_records(rows), 7)
        assert all((back[key] == rows[key]).all() and back[key].dtype == rows[key].dtype for key in rows)

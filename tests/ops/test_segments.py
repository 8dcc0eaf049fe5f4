import jax.numpy as jnp
import numpy as np

from tests.ops.segment_rows import ALL_ROWS, documents
from zamba2_jax.ops import document_index, document_positions


def test_every_short_row():
    index = np.asarray(document_index(jnp.asarray(ALL_ROWS)))
    positions = np.asarray(document_positions(jnp.asarray(ALL_ROWS)))
    assert len(ALL_ROWS) > 400
    for row, got_index, got_position in zip(ALL_ROWS, index, positions, strict=True):
        for number, times in enumerate(documents(row)):
            assert (got_index[times] == number).all(), row
            assert (got_position[times] == range(len(times))).all(), row
        padding = row == 0
        before = np.concatenate([[0], got_index[:-1]])
        assert (got_index[padding] == before[padding]).all(), row


def test_large_and_negative_ids():
    ids = jnp.array([[0, 2**31 - 1, -5, -5, 0, 0]])
    assert document_index(ids).tolist() == [[0, 0, 1, 1, 1, 1]]
    assert document_positions(ids)[0, 1:4].tolist() == [0, 0, 1]

"""The dimension legend, and static shape checks against it.

Letters (suffixes of arrays in hot files, `q_BTNH`):
  B batch            T positions          S key positions      W window of positions
  D model width      N query heads        K key/value heads    G = N / K     H head dimension
  L layers           V vocabulary         E experts            A experts a token
  F expert width     M tokens (B·T)       R dispatched rows (B·T·A)
  C block length     Q blocks             U units (positions that share one noise level)
A reshaped array gets a new name.
"""

from typing import Any


def check(letters: str, *arrays: Any, **sizes: int) -> dict[str, int]:
    """Check that arrays agree on their dimensions and return the size of each letter.

    `check("BTD BT", x, mask, D=256)` raises ValueError unless x is (B, T, 256) and mask is (B, T) with the same B and T.
    """
    found = dict(sizes)
    for name, array in zip(letters.split(), arrays, strict=True):
        if len(name) != len(array.shape):
            raise ValueError(f"an array of shape {array.shape} is not {'×'.join(name)}")
        for letter, size in zip(name, array.shape, strict=True):
            if found.setdefault(letter, size) != size:
                raise ValueError(f"{letter}={size} in an array {name} of shape {array.shape}, but {letter}={found[letter]} elsewhere")
    return found

"""Operations for mixture-of-experts diffusion models; a leaf library that imports jax only.

One folder an operation: `api.py` holds the public function, `reference.py` the plain XLA specification, and one file a
backend beside them. `dispatch.py` holds the rule by which an implementation is chosen.
"""

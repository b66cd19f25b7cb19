"""Hidden states of the rows that are read, and of no others: what the last decoder layer would make of the rest is thrown away.

A layer needs keys and values of every token, but what it puts out for a token matters only to the layers above, and above the
last there is none. So its queries, its output product and its MLP are computed for the rows that a head will read: the same
numbers (to the rounding of a product with fewer rows) for up to one layer's work less, forward and backward.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor

from tasks.models import trunk
from tasks.packing import Batch, hidden_states

MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}


def hidden_rows(model: Any, batch: Batch, rows: Tensor) -> Tensor:
    """Hidden states after the final norm in these rows of a packed batch; (N,) -> (N, D)."""
    layers = getattr(trunk(model), "layers", None)
    if not layers or not _is_plain(layers[-1]):
        return hidden_states(model, batch)[rows]
    with _only(layers[-1], rows):
        return hidden_states(model, batch)[rows]


def _is_plain(layer: Any) -> bool:
    """Whether q_proj, o_proj and the MLP look at one row at a time, and are all that stands between keys and output."""
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    return (
        hasattr(attention, "q_proj")
        and hasattr(attention, "o_proj")
        and mlp is not None
        and {name for name, _ in mlp.named_children()} == MLP
    )


@contextmanager
def _only(layer: Any, rows: Tensor) -> Iterator[None]:
    parts = (layer.self_attn.q_proj, layer.self_attn.o_proj, layer.mlp)
    before = [(module, vars(module).get("forward")) for module in (layer, *parts)]
    # Under models.checkpoint_gradients the layer would run a second time, after this `with`. Its activations are the first that
    # the backward pass needs, so nothing is gained by that: it runs by its own code.
    layer.forward = type(layer).forward.__get__(layer)
    for part in parts:
        part.forward = partial(_in_rows, part.forward, rows)
    try:
        yield
    finally:
        for module, forward in before:
            del module.forward
            if forward is not None:
                module.forward = forward


def _in_rows(forward: Callable[..., Tensor], rows: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """(1, T, D) -> (1, T, E), 0 outside the rows."""
    out = forward(x.index_select(1, rows), *args, **kwargs)
    return out.new_zeros(*x.shape[:-1], out.shape[-1]).index_copy(1, rows, out)

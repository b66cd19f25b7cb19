"""A Llama-like model for sampling alone: no padding in the prompts, weights folded and fused, nothing copied from step to step.

What the library's loop spends beside the arithmetic is spared: prompts stand in one row without padding, equal prompts are read
once, of the last layer only the states that predict are computed, keys and values lie in a buffer with room for all steps and
are never repeated for grouped heads. Where `fold` says so, W + scale B A stands in one copy of the weights, q, k, v and gate, up
side by side, in the order that oneDNN reads fastest. The copy lives as long as the Decoder: as long as one rollout.

Models are known by their modules' names, not by their class (Llama, Mistral, Qwen2, SmolLM, ...), and a model is taken only if
its logits are those of its own forward pass (`decoder_for`); every other causal LM goes through its own code in tasks.rollout.
"""

from collections.abc import Callable
from itertools import groupby
from typing import Any, NamedTuple, cast
from weakref import WeakKeyDictionary

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from tasks import quantized
from tasks.models import compare_logits

FOLD_BYTES = 2**30
"""Largest folded copy, unless `generate` is told otherwise: a model of 250 million weights in fp32."""
PREFILL_TOKENS = {"cpu": 1_024, "cuda": 16_384}
"""Prompt tokens in one pass: what stays in a CPU's cache, and what fills a GPU."""
GRAPH_COLUMNS = 128
"""A captured step (CUDA) attends over a multiple of so many columns."""

Map = Callable[[Tensor], Tensor]

LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
MLP = {"gate_proj", "up_proj", "down_proj", "act_fn"}
STATIC_ROPE = {"default", "linear", "llama3", "yarn"}  # the others depend on the longest sequence seen


class _Layer(NamedTuple):
    norm: Map
    qkv: Map
    """(N, D) -> (N, (heads + 2 kv_heads) * head_dim)"""
    o: Map
    mlp_norm: Map
    gate_up: Callable[[Tensor], tuple[Tensor, Tensor]]
    act: Map
    down: Map


def _is_llama_like(model: Any, room: int) -> bool:
    trunk = model.base_model
    if {name for name, _ in trunk.named_children()} != {"embed_tokens", "layers", "norm", "rotary_emb"}:
        return False
    for layer in trunk.layers:
        parts = [(layer, LAYER), (getattr(layer, "self_attn", None), ATTENTION), (getattr(layer, "mlp", None), MLP)]
        if any(part is None or {name for name, _ in part.named_children()} != names for part, names in parts):
            return False
        if list(layer.self_attn.parameters(recurse=False)):  # attention sinks and the like
            return False
    config = model.config
    window = getattr(config, "sliding_window", None)
    return (
        set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
        and (window is None or room <= window)
        and getattr(trunk.rotary_emb, "rope_type", "default") in STATIC_ROPE
    )


def _linears(model: Any) -> list[nn.Module]:
    """The layers' linear modules and the head, in LoRA's wrapping or not."""
    layers = model.base_model.layers
    names = [("self_attn", name) for name in sorted(ATTENTION)] + [("mlp", name) for name in sorted(MLP - {"act_fn"})]
    return [getattr(getattr(layer, part), name) for layer in layers for part, name in names] + [model.get_output_embeddings()]


def _base(module: Any) -> Any:
    return module.get_base_layer() if isinstance(module, LoraLayer) else module


def fold_bytes(model: Any) -> int:
    """Size of the folded copy of a Llama-like model's weights, bytes; it exists during a rollout only."""
    return sum(4 * _base(module).in_features * _base(module).out_features for module in _linears(model))


def _may_fold(model: Any, device: torch.device, limit: int) -> bool:
    """On a CPU always in fp32, which loses nothing of a bf16 or quantised base and is fast everywhere. On CUDA only a base in
    fp32: in bf16 the sum would round away part of the adapter, and 8-bit products round activations too."""
    exact = device.type == "cpu" or all(
        _base(module).weight.dtype == torch.float32 and not quantized.bits(_base(module)) for module in _linears(model)
    )
    return exact and fold_bytes(model) <= limit


def _folded(module: Any) -> tuple[Tensor, Tensor | None]:
    """Weight with the active adapters added, and bias; fp32."""
    base = _base(module)
    weight = quantized.dequantised(base, torch.float32) if quantized.bits(base) else base.weight.float()
    if isinstance(module, LoraLayer) and not module.disable_adapters and not module.merged:
        for name in module.active_adapters:
            if name in module.lora_A:
                # get_delta_weight's product in the adapter's own fp32; not +=: weight may be the base's own
                weight = weight + cast(Any, module).get_delta_weight(name).float()
    return weight, None if base.bias is None else base.bias.float()


def _linear(weight: Tensor, bias: Tensor | None) -> Map:
    """x -> x W^T + b; on a CPU by oneDNN, from weights in its own order (exact fp32: it takes bf16 only where it is allowed to)."""
    if weight.device.type == "cpu" and torch.backends.mkldnn.is_available():
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous())
        return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")
    return lambda x: F.linear(x, weight, bias)


def _fused(*modules: Any) -> Map:
    """Several folded layers of the same input, one product."""
    weights, biases = zip(*map(_folded, modules))
    bias = None
    if any(b is not None for b in biases):
        bias = torch.cat([weight.new_zeros(len(weight)) if b is None else b for weight, b in zip(weights, biases)])
    return _linear(torch.cat(weights), bias)


def _norm(module: Any, fold: bool) -> Map:
    """Llama's norm as torch's one kernel, which gives the same bits in fp32; any other as it is."""
    if not fold or not hasattr(module, "variance_epsilon"):
        return cast(Map, module)
    weight, eps = module.weight.float(), module.variance_epsilon
    return lambda x: F.rms_norm(x, weight.shape, weight, eps)


def _gate_up(mlp: Any, fold: bool) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    if not fold:
        return lambda x: (mlp.gate_proj(x), mlp.up_proj(x))
    both = _fused(mlp.gate_proj, mlp.up_proj)

    def halves(x: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = both(x).chunk(2, -1)
        return gate, up

    return halves


def _qkv(attention: Any, fold: bool) -> Map:
    if fold:
        return _fused(attention.q_proj, attention.k_proj, attention.v_proj)
    return lambda x: torch.cat([attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)], -1)


class _Run(NamedTuple):
    """Rows first..end - 1 have the same query."""

    query: list[int]
    first: int
    end: int


class Decoder:
    """One batch of rows at a time: `start` reads the queries, `step` a token of each row, `keep` drops rows."""

    def __init__(self, model: Any, fold: bool, graphs: bool = False) -> None:
        trunk, attention = model.base_model, model.base_model.layers[0].self_attn
        self.embed, self.norm, self.rotary = trunk.embed_tokens, _norm(trunk.norm, fold), trunk.rotary_emb
        self.head_dim, self.scale = attention.head_dim, attention.scaling
        self.heads = _base(attention.q_proj).out_features // self.head_dim
        self.kv_heads = _base(attention.k_proj).out_features // self.head_dim
        self.dtype = torch.float32 if fold else self.embed.weight.dtype
        self.device = self.embed.weight.device
        self.layers = [
            _Layer(
                norm=_norm(layer.input_layernorm, fold),
                qkv=_qkv(layer.self_attn, fold),
                o=_fused(layer.self_attn.o_proj) if fold else layer.self_attn.o_proj,
                mlp_norm=_norm(layer.post_attention_layernorm, fold),
                gate_up=_gate_up(layer.mlp, fold),
                act=layer.mlp.act_fn,
                down=_fused(layer.mlp.down_proj) if fold else layer.mlp.down_proj,
            )
            for layer in trunk.layers
        ]
        head = model.get_output_embeddings()
        self.head = _fused(head) if fold else head
        self.graphs: dict[int, _Captured] | None = {} if graphs else None
        self.least_drop = 0.5 if graphs else 0.25
        """Share of the rows that must have ended before it pays to drop them: with graphs a step has to be captured anew."""

    @torch.no_grad()
    def start(self, queries: list[list[int]], steps: int) -> tuple[Tensor, Tensor]:
        """Read the queries; equal ones must be neighbours. -> last hidden states and logits, (B, D), (B, V)."""
        n, width, device = len(queries), max(map(len, queries)), self.device
        room = width + steps - 1  # the last token is drawn and never read
        if self.graphs is not None:
            room = -(-room // GRAPH_COLUMNS) * GRAPH_COLUMNS
            self.graphs = {}
        # rows end at the same column; zeros, not empty: what the mask hides must still be a number
        shape = (2, n, self.kv_heads, room, self.head_dim)
        self.cache = [torch.zeros(shape, dtype=self.dtype, device=device) for _ in self.layers]
        self.positions = torch.tensor([len(query) for query in queries], device=device)
        columns = torch.arange(room, device=device)
        seen = (columns >= (width - self.positions)[:, None]) & (columns < width)
        self.mask = torch.zeros(n, 1, 1, room, dtype=self.dtype, device=device)
        self.mask.masked_fill_(~seen[:, None, None], -torch.inf)
        self.width, self.end = width, width
        self.column = torch.tensor([width], device=device)
        self.cos, self.sin = self.rotary(torch.empty(0, dtype=self.dtype, device=device), torch.arange(room, device=device)[None])
        self.cos, self.sin = self.cos[0, :, None], self.sin[0, :, None]

        runs, row = [], 0
        for query, same in groupby(queries):
            count = len(list(same))
            runs.append(_Run(query, row, row + count))
            row += count
        hidden = []
        while runs:
            taken = tokens = 0
            while taken < len(runs) and (not taken or tokens + len(runs[taken].query) <= PREFILL_TOKENS[device.type]):
                tokens += len(runs[taken].query)
                taken += 1
            last = self._prefill(runs[:taken])
            hidden += [last.repeat_interleave(torch.tensor([r.end - r.first for r in runs[:taken]], device=device), 0)]
            runs = runs[taken:]
        state = torch.cat(hidden)
        return state, self.head(state)

    @torch.no_grad()
    def step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Read one token of each row, (B,). -> hidden states and logits, (B, D), (B, V)."""
        result = self._step(tokens, self.end + 1) if self.graphs is None else self._captured_step(tokens)
        self.end += 1
        self.positions += 1
        self.column += 1
        return result

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        for i, cache in enumerate(self.cache):  # one at a time: only one layer's keys and values are there twice
            self.cache[i] = cache.index_select(1, rows)
        self.positions, self.mask = self.positions[rows], self.mask[rows]
        if self.graphs is not None:
            self.graphs = {}

    def _prefill(self, runs: list[_Run]) -> Tensor:
        """Put the queries' keys and values into the cache; -> hidden states of their last tokens, (len(runs), D)."""
        device, lengths = self.device, [len(run.query) for run in runs]
        x = self.embed(torch.tensor([token for run in runs for token in run.query], device=device)).to(self.dtype)
        positions = torch.cat([torch.arange(length, device=device) for length in lengths])
        cos, sin = self.cos[positions], self.sin[positions]
        ends = torch.tensor(lengths, device=device).cumsum(0)
        for number, (layer, cache) in enumerate(zip(self.layers, self.cache)):
            q, k, v = self._project(layer, x, cos, sin)
            for run, keys, values in zip(runs, k.split(lengths), v.split(lengths)):
                rows = cache[:, run.first : run.end, :, self.width - len(run.query) : self.width]
                rows[0], rows[1] = keys.transpose(0, 1), values.transpose(0, 1)
            if number == len(self.layers) - 1:  # only what predicts is needed from here on
                first = torch.tensor([run.first for run in runs], device=device)
                attended = self._attend(q[ends - 1], cache[:, first, :, : self.width], self.mask[first], self.width)
                x = self._mix(layer, x[ends - 1], attended)
                break
            mixed = torch.empty_like(q)
            for out, *parts in zip(mixed.split(lengths), q.split(lengths), k.split(lengths), v.split(lengths)):
                query, key, value = (part.transpose(0, 1)[None] for part in parts)
                attended = F.scaled_dot_product_attention(
                    query, key, value, is_causal=True, scale=self.scale, enable_gqa=self.heads != self.kv_heads
                )
                out.copy_(attended[0].transpose(0, 1))
            x = self._mix(layer, x, mixed)
        return self.norm(x)

    def _step(self, tokens: Tensor, end: int) -> tuple[Tensor, Tensor]:
        """The same numbers and writes however often it runs on the same tokens: a capture on CUDA runs it several times."""
        x = self.embed(tokens).to(self.dtype)
        cos, sin = self.cos[self.positions], self.sin[self.positions]
        self.mask.index_fill_(3, self.column, 0)
        for layer, cache in zip(self.layers, self.cache):
            q, k, v = self._project(layer, x, cos, sin)
            cache.index_copy_(3, self.column, torch.stack([k, v])[:, :, :, None])
            x = self._mix(layer, x, self._attend(q, cache, self.mask, end))
        hidden = self.norm(x)
        return hidden, self.head(hidden)

    def _project(self, layer: _Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, D) -> queries, keys, values, (N, heads, head_dim) each, turned to their positions."""
        qkv = layer.qkv(layer.norm(x)).unflatten(-1, (-1, self.head_dim))
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], 1)
        half = self.head_dim // 2
        turned = torch.cat([-qk[..., half:], qk[..., :half]], -1)
        qk = torch.addcmul(qk * cos, turned, sin)
        return qk[:, : self.heads], qk[:, self.heads :], v

    def _attend(self, q: Tensor, cache: Tensor, mask: Tensor, end: int) -> Tensor:
        """One query a row over the cache's first `end` columns; (B, heads, head_dim), (2, B, kv_heads, room, head_dim) -> as q.

        The queries of the heads that share keys stand as if they were tokens: nothing is repeated.
        """
        grouped = q.unflatten(1, (self.kv_heads, -1))
        keys, values = cache[:, :, :, :end]
        return F.scaled_dot_product_attention(grouped, keys, values, mask[..., :end], scale=self.scale).flatten(1, 2)

    def _mix(self, layer: _Layer, x: Tensor, attended: Tensor) -> Tensor:
        x = x + layer.o(attended.flatten(1))
        gate, up = layer.gate_up(layer.mlp_norm(x))
        return x + layer.down(layer.act(gate) * up)

    def _captured_step(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The step as a CUDA graph, which spares the launches; captured once for each number of rows and columns."""
        assert self.graphs is not None
        end = -(-(self.end + 1) // GRAPH_COLUMNS) * GRAPH_COLUMNS
        captured = self.graphs.get(end)
        if captured is None:
            try:
                captured = self.graphs[end] = _Captured(self, tokens, end)
            except RuntimeError:  # something in the model waits for the host, or gives other numbers: go on without
                self.graphs, self.least_drop = None, 0.25
                return self._step(tokens, self.end + 1)
        return captured(tokens)


class _Captured:
    """Decoder._step for one shape as a CUDA graph; RuntimeError where it cannot be captured or differs from the plain step."""

    def __init__(self, decoder: Decoder, tokens: Tensor, end: int) -> None:
        self.tokens = tokens.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                plain, _ = decoder._step(self.tokens, end)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = decoder._step(self.tokens, end)
        self.graph.replay()
        if not torch.allclose(self.result[0], plain, rtol=1e-2, atol=1e-2 * float(plain.abs().max())):
            raise RuntimeError("the captured step gives other numbers")

    def __call__(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        self.tokens.copy_(tokens)
        self.graph.replay()
        hidden, logits = self.result
        return hidden.clone(), logits.clone()


_agreed: "WeakKeyDictionary[Any, dict[tuple[Any, ...], bool]]" = WeakKeyDictionary()


@torch.no_grad()
def decoder_for(model: Any, room: int, device: torch.device, limit: int = FOLD_BYTES) -> Decoder | None:
    """A Decoder with the adapters that are active now, or None where the model's own code has to be used.

    The first time for a model and its adapters, logits are compared with the model's own forward pass.
    """
    if not _is_llama_like(model, room):
        return None
    fold = _may_fold(model, device, limit)
    plain = not any(quantized.bits(_base(module)) for module in _linears(model))
    decoder = Decoder(model, fold, graphs=device.type == "cuda" and plain)
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    active = tuple(() if layer.disable_adapters else tuple(layer.active_adapters) for layer in layers[:1])
    known = _agreed.setdefault(model, {})
    if (fold, active) not in known:
        known[fold, active] = _agrees(decoder, model)
    return decoder if known[fold, active] else None


def _agrees(decoder: Decoder, model: Any) -> bool:
    """Whether a prompt of two rows and a step give the logits that the model gives; within rounding to its dtype."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    rows = [[(37 * i + 11) % vocabulary for i in range(length)] for length in (6, 3)]
    first = decoder.start([row[:-1] for row in rows], 2)[1]
    second = decoder.step(torch.tensor([row[-1] for row in rows], device=decoder.device))[1]
    expected = torch.cat([model(input_ids=torch.tensor([row], device=decoder.device)).logits[0, -2:].float() for row in rows])
    actual = torch.stack([first, second], 1).flatten(0, 1).float()
    exact = decoder.embed.weight.dtype == torch.float32 and not any(quantized.bits(_base(m)) for m in _linears(model))
    return compare_logits(expected, actual)["rms_error"] <= (1e-5 if exact else 0.05)

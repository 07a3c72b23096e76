"""Plain-torch stand-ins for the CPU kernels that vLLM's CUDA wheel lacks. For demo and tests, never for serving.

vLLM publishes its CPU build apart from the wheel on the package index, so on a machine without a GPU the wheel's Python
code is complete but a handful of operators is missing. This general plugin supplies just those that a dense
decoder-only model needs in fp32 or bf16. On a platform other than vLLM's CPU platform, or next to the real kernels, it
does nothing.

With CPU_OPS_COMPILE=1, models that are compiled at all are compiled as on GPUs: piece by piece, and through vLLM's
passes. vLLM's CPU platform leaves both out.

With CPU_OPS_FORK=1, a server's processes are forks of each other, which have vLLM imported: it starts some 20 s sooner.
vLLM's CPU platform wants new interpreters.
"""

from __future__ import annotations

import os
from typing import Any

import torch

_library: torch.library.Library | None = None


def register() -> None:
    """Entry point; idempotent."""
    global _library  # noqa: PLW0603  (a torch library lives as long as its object)
    from vllm.platforms import current_platform

    if (
        _library is not None
        or not current_platform.is_cpu()
        or hasattr(
            torch.ops._C,  # noqa: SLF001
            "cpu_attention_with_kv_cache",
        )
    ):
        return
    from vllm import _custom_ops
    from vllm.model_executor.layers import utils as layer_utils
    from vllm.utils import cpu_triton_utils

    _library = torch.library.Library("_C", "FRAGMENT")
    if os.environ.get("CPU_OPS_COMPILE") == "1":
        _compile_as_on_gpus(type(current_platform), _library)
    if os.environ.get("CPU_OPS_FORK") == "1":
        _fork(type(current_platform))
    for schema, function in (
        ("init_cpu_memory_env(int[] nodes) -> ()", _init_cpu_memory_env),
        (
            (
                "compute_slot_mapping_kernel_impl(Tensor query_start_loc, Tensor positions, Tensor block_table, "
                "Tensor(a!) slot_mapping, int block_size) -> ()"
            ),
            compute_slot_mapping,
        ),
        ("greedy_argmax(Tensor logits) -> Tensor", _greedy_argmax),
        ("fused_gumbel_argmax(Tensor logits, Tensor seeds) -> Tensor", _fused_gumbel_argmax),
    ):
        _library.define(schema)
        _library.impl(schema.split("(")[0], function, "CompositeExplicitAutograd")
    _custom_ops.cpu_attn_get_scheduler_metadata = _scheduler_metadata
    _custom_ops.cpu_attn_reshape_and_cache = reshape_and_cache
    _custom_ops.cpu_attention_with_kv_cache = attention_with_kv_cache
    # Products of packed weights, which vLLM asks for in bf16 where the processor has tiles: torch's linear instead.
    layer_utils.check_cpu_sgl_kernel = lambda *_: False
    # vLLM's replacement lists its parameters in another order than the kernel that it replaces and is called by
    # position.
    cpu_triton_utils._compute_slot_mapping_kernel_impl = _slot_mapping_by_position  # noqa: SLF001


def _compile_as_on_gpus(platform: Any, library: torch.library.Library) -> None:  # noqa: ANN401
    """Keep the mode of compilation, which vLLM's CPU platform changes, and all-reduces as operators of the graph."""
    # Of the operators that vLLM's passes look up by name, those that they look up in every graph. No graph calls them.
    library.define(
        "rotary_embedding(Tensor positions, Tensor! query, Tensor!? key, int head_size, Tensor cos_sin_cache, "
        "bool is_neox, int rope_dim_offset=0, bool inverse=False) -> ()"
    )
    stock = platform.check_and_update_config

    def check_and_update_config(cls: type, vllm_config: Any) -> None:  # noqa: ANN401, ARG001
        compilation = vllm_config.compilation_config
        kept = {name: getattr(compilation, name) for name in ("mode", "backend", "ir_enable_torch_wrap")}
        stock(vllm_config)
        for name, value in kept.items():
            setattr(compilation, name, value)
        compilation.compile_sizes = compilation.compile_sizes or []  # None: the mode has none

    platform.check_and_update_config = classmethod(check_and_update_config)
    platform.use_custom_op_collectives = classmethod(lambda cls: True)  # noqa: ARG005


def _fork(platform: Any) -> None:  # noqa: ANN401
    """Keep vLLM's default, which its command line and its CPU platform change."""
    stock = platform.check_and_update_config

    def check_and_update_config(cls: type, vllm_config: Any) -> None:  # noqa: ANN401, ARG001
        stock(vllm_config)
        os.environ["VLLM_WORKER_MULTIPROC_METHOD"] = "fork"

    platform.check_and_update_config = classmethod(check_and_update_config)


def _init_cpu_memory_env(nodes: list[int]) -> None:
    """Would bind memory to NUMA nodes."""


def _greedy_argmax(logits: torch.Tensor) -> torch.Tensor:
    return logits.argmax(dim=-1).view(-1)


def _fused_gumbel_argmax(logits: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """A sample from softmax(logits) per row: the argmax after adding Gumbel noise, -log of exponential noise."""
    noise = torch.empty_like(logits)
    for row, seed in zip(noise, seeds.tolist(), strict=True):
        row.exponential_(generator=torch.Generator().manual_seed(seed))
    return (logits - noise.log()).argmax(dim=-1).view(-1)


def _scheduler_metadata(*args: object, **kwargs: object) -> torch.Tensor:  # noqa: ARG001
    return torch.empty(0, dtype=torch.int32)


def compute_slot_mapping(
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    block_table: torch.Tensor,
    slot_mapping: torch.Tensor,
    block_size: int,
) -> None:
    """Slot of a token: block_table[its request][position // block_size] * block_size + position % block_size."""
    starts = query_start_loc.tolist()
    for request in range(len(starts) - 1):
        tokens = slice(starts[request], starts[request + 1])
        position = positions[tokens]
        block = block_table[request, position // block_size].to(slot_mapping.dtype)
        slot_mapping[tokens] = block * block_size + position % block_size


def _slot_mapping_by_position(
    num_tokens: int,
    max_num_tokens: int,
    query_start_loc: torch.Tensor,
    positions: torch.Tensor,
    block_table: torch.Tensor,
    block_table_stride: int,  # noqa: ARG001
    slot_mapping: torch.Tensor,
    block_size: int,
    *rest: int,  # noqa: ARG001
) -> None:
    compute_slot_mapping(query_start_loc, positions, block_table, slot_mapping, block_size)
    slot_mapping[num_tokens:max_num_tokens] = -1


def reshape_and_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *args: object,  # noqa: ARG001
    **kwargs: object,  # noqa: ARG001
) -> None:
    """Store key and value [tokens, kv_heads, head] into caches [blocks, kv_heads, block_size, head]."""
    block_size = key_cache.shape[2]
    count = min(slot_mapping.numel(), key.shape[0])
    slots = slot_mapping[:count]
    used = slots >= 0
    block, offset = slots[used] // block_size, slots[used] % block_size
    key_cache[block, :, offset] = key[:count][used].to(key_cache.dtype)
    value_cache[block, :, offset] = value[:count][used].to(value_cache.dtype)


def attention_with_kv_cache(  # noqa: PLR0917
    query: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    output: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    causal: bool,  # noqa: FBT001
    alibi_slopes: torch.Tensor | None,
    sliding_window: object,
    block_table: torch.Tensor,
    softcap: float,
    scheduler_metadata: torch.Tensor,  # noqa: ARG001
    s_aux: torch.Tensor | None,
    **kwargs: object,  # noqa: ARG001
) -> None:
    """Causal attention of each request's queries [tokens, heads, head] over its cached keys and values."""
    window = sliding_window if isinstance(sliding_window, int) else sliding_window[0]  # type: ignore[index]
    if alibi_slopes is not None or s_aux is not None or softcap or not causal or window > 0:
        message = "vllm_cpu_ops stands in for plain causal attention only"
        raise NotImplementedError(message)
    starts = query_start_loc.tolist()
    block_size = key_cache.shape[2]
    for request in range(len(starts) - 1):
        tokens = slice(starts[request], starts[request + 1])
        length, queries = int(seq_lens[request]), tokens.stop - tokens.start
        if queries == 0:
            continue
        blocks = block_table[request, : -(-length // block_size)].long()
        # [blocks, kv_heads, block_size, head] -> [kv_heads, length, head]
        keys = key_cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length]
        values = value_cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length]
        ahead = torch.arange(length)[None, :] - torch.arange(length - queries, length)[:, None]
        result = torch.nn.functional.scaled_dot_product_attention(
            query[tokens].transpose(0, 1)[None],
            keys[None].to(query.dtype),
            values[None].to(query.dtype),
            attn_mask=ahead <= 0,
            scale=scale,
            enable_gqa=True,
        )
        output[tokens] = result[0].transpose(0, 1).reshape(output[tokens].shape)

"""Google's Flax tree of a Gemma-2 in torch, and ways to write it.

The orientations are those of the einsums in ``gemma.gm.nn`` (github.com/google-deepmind/gemma):
``BTD,NDH->BTNH`` for q, ``BSD,CKDH->CBSKH`` for k and v, ``BTNH,NHD->BTD`` for the output;
``...F,NFH->...NH`` for the MLP's first matrices (``NHF`` when they are transposed) and
``...H,HF->...F`` for its second, where F and H are the hidden size and the MLP's.
"""

from typing import Any

import numpy as np

NORMS = {
    "pre_attention_norm": "input_layernorm", "post_attention_norm": "post_attention_layernorm",
    "pre_ffw_norm": "pre_feedforward_layernorm", "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip


def tree_of(model: Any, transposed: bool = False, dtype: Any = np.float32) -> dict[str, Any]:
    """The nested tree of a ``Gemma2ForCausalLM``."""
    state = {name: tensor.float().numpy() for name, tensor in model.state_dict().items()}
    config = model.config
    N, K, H = config.num_attention_heads, config.num_key_value_heads, config.head_dim

    def heads(weight: np.ndarray, count: int) -> np.ndarray:
        x = np.random.default_rng(0).normal(size=weight.shape[1]).astype(np.float32)
        made = np.stack([one.T for one in np.split(weight, count)])
        assert np.allclose(np.einsum("D,NDH->NH", x, made).reshape(-1), weight @ x, atol=1e-4)
        return made

    tree: dict[str, Any] = {
        "embedder": {"input_embedding": state["model.embed_tokens.weight"]},
        "final_norm": {"scale": state["model.norm.weight"]},
    }
    for layer in range(config.num_hidden_layers):
        of = {
            name.removeprefix(f"model.layers.{layer}.").removesuffix(".weight"): value
            for name, value in state.items()
            if f".layers.{layer}." in name
        }
        q, k, v = (of[f"self_attn.{x}_proj"] for x in "qkv")
        out, gate, up = of["self_attn.o_proj"], of["mlp.gate_proj"], of["mlp.up_proj"]
        gating = np.stack([gate, up])
        attention = {"attn_vec_einsum": {"w": np.stack([x.T for x in np.split(out, N, axis=1)])}}
        if K == N:
            attention["qkv_einsum"] = {"w": np.stack([heads(x, N) for x in (q, k, v)])}
        else:
            attention["q_einsum"] = {"w": heads(q, N)}
            attention["kv_einsum"] = {"w": np.stack([heads(k, K), heads(v, K)])}
        assert attention["attn_vec_einsum"]["w"].shape == (N, H, config.hidden_size)
        tree[f"layer_{layer}"] = {
            "attn": attention,
            "mlp": {
                "gating_einsum": gating if transposed else gating.transpose(0, 2, 1),
                "linear": of["mlp.down_proj"].T,
            },
            **{ours: {"scale": of[theirs]} for ours, theirs in NORMS.items()},
        }
    return _cast({"transformer": tree}, dtype)


def _cast(tree: Any, dtype: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _cast(value, dtype) for key, value in tree.items()}
    return np.ascontiguousarray(tree).astype(dtype)


def flat(tree: dict[str, Any], below: str = "") -> dict[str, Any]:
    """The same with flat keys, ``transformer/layer_0/mlp/linear``: the released checkpoints'."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{below}/{key}".strip("/")
        if isinstance(value, dict):
            found |= flat(value, path)
        else:  # the last key stays by itself, and the MLP's get one
            outer, leaf = (path, "w") if "mlp" in path else (below, key)
            found.setdefault(outer, {})[leaf] = value
    return found

"""Names of other libraries that no site holds, and what to ask for in their place."""

_IDS = "it holds token ids, not an activation"
_TABLES = "it holds cosines and sines of positions, not an activation"
_GAINLESS = (
    "it is a norm's x/rms before the gain, which jaxtc has for the MLP's only (mlp_in_normed); "
    "divide the norm's output by 1 + its weight"
)
_COPIES = (
    "it is a copy of the residual stream for each head, made on request; read resid_pre, or edit "
    "q_unrotated, k_unrotated or v, one head at a time"
)
# By whether they are below a layer: names of other libraries that no site holds, and why.
NOT_SITES: dict[bool, dict[str, str]] = {
    True: {
        "mlp.act_fn.output": "it is the gelu of mlp_gate, which jaxtc has before it (mlp_gate) and "
        "multiplied with mlp_up (mlp_act)",
        **dict.fromkeys(
            ("ln1.hook_normalized", "ln1_post.hook_normalized", "ln2_post.hook_normalized"),
            _GAINLESS,
        ),
        **dict.fromkeys(
            [f"{at}{name}" for at in ("", "attn.")
             for name in ("hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input")],
            _COPIES,
        ),
        "attn.hook_cos": _TABLES,
        "attn.hook_sin": _TABLES,
    },
    False: {
        **dict.fromkeys(("input", "embed_tokens.input", "hook_tokens", "embed.hook_in"), _IDS),
        "output": "it has several parts; ask for 'final_norm' (what the layers give) or 'logits'",
        "hidden_states": "hidden_states[l] of transformers is resid_pre of layer l (resid_post of "
        "the layer before), but the last is final_norm; name one of these",
        "attentions": "attentions[l] of transformers is attn_pattern of layer l; name that",
        "hook_pos_embed": "Gemma-2 has no position embedding; rotary ones turn q and k",
        **dict.fromkeys(
            ("rotary_emb.input", "rotary_emb.output", "rotary_emb.hook_in", "rotary_emb.hook_out",
             "rotary_emb.hook_cos", "rotary_emb.hook_sin"),
            _TABLES,
        ),
    },
}  # fmt: skip

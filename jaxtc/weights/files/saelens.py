"""SAELens' folders: ``cfg.json`` beside ``sae_weights.safetensors``, read and written.

Since SAELens 6 the hook is in ``metadata``; before, all keys lay side by side, often with those of
the whole training run. Both are read as SAELens 6 reads them.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtc.errors import SourceError, WeightsError
from jaxtc.tap.sites import BY_NAME
from jaxtc.transcoders.activations import activation_of
from jaxtc.transcoders.transcoder import Transcoder
from jaxtc.weights.files import local
from jaxtc.weights.files.description import Description, described
from jaxtc.weights.files.formats import BY_FORMAT
from jaxtc.weights.files.settings import HOOKS, Settings, read_json

CONFIG = "cfg.json"
_SCALER = "activation_scaler.json"
_OURS = ("d_sae", "hook_name", "hook_point", "architecture", "metadata", "activation_fn_str")

# Architecture -> (activation, whether it is a transcoder, whether it has a skip connection).
_KINDS: Mapping[str, tuple[str, bool, bool]] = {
    "standard": ("relu", False, False),
    "topk": ("topk", False, False),
    "jumprelu": ("jumprelu", False, False),
    # Written during training; what is made of them after it are jumprelu.
    "batchtopk": ("batchtopk", False, False),
    "matryoshka_batchtopk": ("batchtopk", False, False),
    "transcoder": ("relu", True, False),
    "skip_transcoder": ("relu", True, True),
    "jumprelu_transcoder": ("jumprelu", True, False),
    "jumprelu_skip_transcoder": ("jumprelu", True, True),
}
_NOT_READ: Mapping[str, str] = {
    "gated": "a gated autoencoder decides by one set of pre-activations which features of another "
    "are active",
    "abstopk": "AbsTopK keeps negative activations, and jaxtc's features are never negative",
    "temporal": "a temporal autoencoder's features depend on other tokens",
    "matching_pursuit": "matching pursuit chooses features one after another",
}
_NORMALISED = (
    "so SAELens changes each token's input by its own norm, which no weights can stand for. Train "
    "with normalize_activations='none' or 'expected_average_only_in'"
)
# What else such files say, which changes nothing in what the weights compute: how they were
# trained, on what, and where it ran.
_HARMLESS = frozenset(
    """
    dtype device model_name model_class_name model_kwargs model_from_pretrained_kwargs model
    hook_eval prepend_bos exclude_special_tokens neuronpedia_id context_size seqpos_slice
    dataset_path dataset_trust_remote_code dataset tokenizer streaming is_dataset_tokenized
    use_chat_formatting use_cached_activations cached_activations_path from_pretrained_path
    n_batches_in_buffer training_tokens store_batch_size_prompts disable_concat_sequences
    sequence_separator_token activations_mixing_fraction llm_device act_store_device
    prefetch_llm_batches seed autocast autocast_lm autocast_sae autocast_dtype compile_llm
    llm_compilation_mode compile_sae sae_compilation_mode train_batch_size train_batch_size_tokens
    adam_beta1 adam_beta2 lr lr_scheduler_name lr_warm_up_steps lr_end lr_decay_steps
    n_restart_cycles dead_feature_window feature_sampling_window dead_feature_threshold
    dead_feature_estimation_method feature_sampling_method feature_reinit_scale
    n_eval_batches eval_batch_size_prompts n_eval_seqs logger n_checkpoints checkpoint_path
    save_final_checkpoint output_path resume_from_checkpoint resume verbose sae_lens_version
    sae_lens_training_version n_batches_for_norm_estimate tokens_per_buffer log_to_wandb
    log_activations_store_to_wandb log_optimizer_state_to_wandb log_weights_to_wandb wandb_project
    wandb_id run_name wandb_entity wandb_log_frequency eval_every_n_wandb_logs
    expansion_factor l1_coefficient l1_warm_up_steps lp_norm l0_lambda l0_coefficient
    l0_warm_up_steps noise_scale mse_loss_normalization use_ghost_grads ghost_grads
    decoder_init_norm decoder_heuristic_init decoder_heuristic_init_norm decoder_orthogonal_init
    init_encoder_as_decoder_transpose b_dec_init_method normalize_sae_decoder
    scale_sparsity_penalty_by_decoder_norm jumprelu_init_threshold jumprelu_bandwidth
    jumprelu_sparsity_loss_mode jumprelu_tanh_scale jumprelu_ste_to_input pre_act_loss_coefficient
    target_l0 use_sparse_activations aux_loss_coefficient topk_threshold_lr matryoshka_widths
    use_matryoshka_aux_loss finetuning_tokens finetuning_method store_batch_size
    subset_of_total_training_tokens total_training_steps total_training_tokens lr_decay_frac
    sparsity_path sae_lens_release sae_id name release log_spacing tags
    """.split()  # noqa: SIM905
)


def describe(path: Path) -> Description | None:
    """What ``cfg.json`` says of the weights beside it; None if it is not SAELens'.

    Raises WeightsError as :func:`jaxtc.weights.files.beside.describe`.
    """
    config = read_json(path.parent / CONFIG)
    if not any(map(config.has, _OURS)):
        return None
    name, transcoder, skip = _architecture(config)
    settings: dict[str, Any] = {"name": name}
    if name == "topk":
        settings["k"] = _k(config)
    format = BY_FORMAT["saelens"]
    if name == "batchtopk":
        config.raw("k")  # of training: after it the threshold decides
        keys = format.keys | {"threshold": ("topk_threshold", "")}
        format = dataclasses.replace(format, keys=keys)
    subtract = config.get("apply_b_dec_to_input", "switch", not transcoder)
    if transcoder and subtract:
        raise config.wrong(
            "its apply_b_dec_to_input is true, but a transcoder's b_dec belongs to what it "
            "writes; SAELens refuses it too"
        )
    config.refuse("hook_point_head_index", "an autoencoder of a single head is not read", (None,))
    facts = {
        "format": format, "activation": activation_of(settings), "subtract_b_dec": subtract,
        "skip": skip, "scale": _scale(config, path, transcoder),
        "decoder_norm": config.get("rescale_acts_by_decoder_norm", "switch", False),
        "gain": config.get("finetuning_scaling_factor", "switch", False),
        "sizes": {
            axis: size
            for axis, key in {"I": "d_in", "M": "d_sae", "O": "d_out"}.items()
            if (size := config.get(key, "count")) is not None
        },
    }  # fmt: skip
    found = described(config, _hooks(config, transcoder), **facts)
    said = config.get("hook_layer", "index", config.get("hook_point_layer", "index"))
    if said is not None and found["layer"] not in (None, said):
        raise config.wrong(f"its hook_layer is {said}, but its hook is of layer {found['layer']}")
    found["layer"] = said if found["layer"] is None and found["sites"] else found["layer"]
    config.get("hook_layer_out", "index")
    config.finish(_HARMLESS)
    if "embed" in found["sites"].values():
        found["layer"] = None
    return Description(**found)


def _architecture(config: Settings) -> tuple[str, bool, bool]:
    """A row of :data:`_KINDS`; of a config without one, as SAELens had it before 6."""
    given = config.get("architecture", "text", "standard")
    if given in _NOT_READ:
        raise config.wrong(f"its architecture is {given!r}: {_NOT_READ[given]}, so it is not read")
    given = config.one_of("architecture", tuple(_KINDS), "standard")
    name, transcoder, skip = _KINDS[given]
    function = config.get("activation_fn", "text", config.get("activation_fn_str", "text"))
    if function not in (None, "relu", name):
        if (function, given) != ("topk", "standard"):
            raise config.wrong(
                f"its activation_fn is {function!r} in the architecture {given!r}, which jaxtc "
                "does not compute"
            )
        name = "topk"
    return name, transcoder, skip


def _k(config: Settings) -> int:
    """Of TopK; older files have it among the keyword arguments of the function."""
    inner = config.inner("activation_fn_kwargs")
    ks = {one.get("k", "count") for one in (config, inner)} - {None}
    inner.refuse("signed", "negative activations are kept, and jaxtc's features have none")
    inner.finish(("use_sparse_activations",))
    if len(ks) != 1:
        raise config.wrong(f"it is TopK and its k is {sorted(ks) or 'not given'}")
    return ks.pop()


def _scale(config: Settings, path: Path, transcoder: bool) -> float:
    """What the input is multiplied with, a constant."""
    kind = config.raw("normalize_activations")
    if kind in (None, False, "none"):
        return 1.0
    if kind in ("layer_norm", "constant_norm_rescale"):
        raise config.wrong(f"its normalize_activations is {kind!r}, {_NORMALISED}")
    if kind not in (True, "expected_average_only_in"):
        config.refuse("normalize_activations", "jaxtc does not know this normalisation")
    file = path.parent / _SCALER
    if transcoder or not local.has(path.parent, _SCALER):
        raise config.wrong(
            f"its normalize_activations is {kind!r}: the input was scaled by a constant, which "
            f"{'does not belong to transcoders' if transcoder else f'no {_SCALER} here tells'}. "
            "Fold it in with SAELens, sae.fold_activation_norm_scaling_factor(the factor), and "
            "save again"
        )
    scaler = read_json(file)
    scaler.refuse("has_whitening", "whitened inputs are not read")
    value = scaler.raw("scaling_factor")
    scaler.finish(())
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise WeightsError(f"{file}: its scaling_factor is {value!r:.100}, not a number above 0.")
    return float(value)


def _hooks(config: Settings, transcoder: bool) -> dict[str, tuple[str, str] | None]:
    """(key, hook) of the input and the output."""
    meta = config.inner("metadata")

    def hook(*keys: str) -> tuple[str, str] | None:
        texts = ((key, one.get(key, "text")) for key in keys for one in (meta, config))
        found = [(key, text) for key, text in texts if text]
        return found[0] if found else None

    for one in (meta, config):
        one.refuse("hook_head_index", "an autoencoder of a single head is not read", (None,))
        one.refuse("hook_head_index_out", "an autoencoder of a single head is not read", (None,))
    # The module of transformers, where it is given, leaves no doubt.
    read = hook("hf_hook_name", "hook_name", "hook_point")
    written = hook("hf_hook_name_out", "hook_name_out")
    reshape = config.one_of("reshape_activations", ("none", "hook_z"))
    if read and reshape == "hook_z" and not read[1].endswith(("hook_z", "o_proj.input")):
        raise config.wrong(f"it joins heads (reshape_activations 'hook_z') at {read[1]!r:.100}")
    if transcoder:
        return {"input_site": read, "output_site": written}
    names = hook("hook_name", "hook_point"), hook("hook_name_out")
    if names[1] and names[0] and names[0][1] != names[1][1]:
        raise config.wrong(
            f"it is an autoencoder's, but its hook_name_out is {names[1][1]!r:.100}, another place"
        )
    return {"input_site": read, "output_site": read}


def config_of(declared: Transcoder) -> bytes:
    """The ``cfg.json`` of a transcoder.

    Raises:
        SourceError: SAELens has no such architecture, or no name for its place.
    """
    sae = declared.input_site == declared.output_site
    name = declared.activation.name
    name = {"batchtopk": "jumprelu"}.get(name, name)
    wanted = (name, not sae, declared.W_skip is not None)
    architecture = next((kind for kind, row in _KINDS.items() if row == wanted), None)
    if architecture is None or (declared.subtract_b_dec and not sae):
        raise SourceError(
            f"SAELens has no architecture for {declared.variant!r}"
            f"{' that takes b_dec off its input' * declared.subtract_b_dec}; it has "
            f"{', '.join(_KINDS)}. Keep it in a checkpoint (save_checkpoint), or give "
            "format='circuit-tracer' if that has it."
        )
    places = {key: _hook(declared, key) for key in ("input_site", "output_site")}
    found: dict[str, Any] = {
        "architecture": architecture, "d_in": declared.d_in, "d_sae": declared.features,
        "dtype": str(declared.W_enc.dtype), "device": "cpu",
        "apply_b_dec_to_input": declared.subtract_b_dec, "normalize_activations": "none",
        "reshape_activations": "hook_z" if declared.input_site == "attn_heads" else "none",
    }  # fmt: skip
    # The version of the layout: without one, SAELens takes it for one of before 6.
    metadata = {"sae_lens_version": "6.0.0", "hook_name": places["input_site"]}
    if not sae:
        found["d_out"] = declared.d_out
        metadata["hook_name_out"] = places["output_site"]
    if name == "topk":
        found |= {"k": declared.activation.k, "rescale_acts_by_decoder_norm": False}
    return (json.dumps(found | {"metadata": metadata}, indent=1) + "\n").encode()


def _hook(declared: Transcoder, key: str) -> str:
    site = getattr(declared, key)
    if site not in HOOKS:
        raise SourceError(
            f"SAELens names places by TransformerLens' hooks, and there is none for {key}="
            f"{site!r}; give format='circuit-tracer'."
        )
    if not BY_NAME[site].per_layer:
        return HOOKS[site]
    if declared.layer is None:
        raise SourceError(
            "This transcoder does not know its layer, which SAELens' cfg.json names; set "
            "transcoder.layer first."
        )
    return f"blocks.{declared.layer}.{HOOKS[site]}"

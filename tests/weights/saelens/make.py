"""Makes the folders beside this file, with SAELens 6.54: ``python -m tests.weights.saelens.make``.

Each is what SAELens itself writes; ``expected.npz`` in it is what SAELens computes there:
activations ``a`` and output ``y`` of the inputs ``x``. Needs ``pip install sae-lens`` in an
environment of its own. Folders called ``old_*`` have the configuration of SAELens before 6.
"""

import json
import sys
from pathlib import Path

import numpy as np

D, M, O, T = 8, 24, 6, 7  # noqa: E741
OLD = {
    # As SAELens 3 to 5 wrote them.
    "old_standard": {
        "architecture": "standard", "d_in": D, "d_sae": M, "dtype": "float32", "device": "cpu",
        "activation_fn_str": "relu", "activation_fn_kwargs": {}, "apply_b_dec_to_input": True,
        "finetuning_scaling_factor": False, "context_size": 1024, "model_name": "gemma-2-2b",
        "hook_name": "blocks.2.hook_resid_post", "hook_layer": 2, "hook_head_index": None,
        "prepend_bos": True, "dataset_path": "d", "dataset_trust_remote_code": True,
        "normalize_activations": "none", "sae_lens_training_version": "3.20.1",
        "model_from_pretrained_kwargs": {"center_writing_weights": False}, "neuronpedia_id": None,
    },
    # As SAELens 1 and 2 did, with the whole run beside it, and no architecture.
    "old_run": {
        "model_name": "gemma-2-2b", "hook_point": "blocks.1.hook_mlp_out", "hook_point_layer": 1,
        "hook_point_head_index": None, "dataset_path": "d", "is_dataset_tokenized": False,
        "context_size": 256, "use_cached_activations": False, "d_in": D, "d_sae": M,
        "n_batches_in_buffer": 128, "total_training_tokens": 300000000, "store_batch_size": 32,
        "device": "cuda", "seed": 42, "dtype": "torch.float32",
        "b_dec_init_method": "geometric_median", "expansion_factor": 3, "l1_coefficient": 8e-05,
        "lr": 0.0004, "lr_warm_up_steps": 5000,
        "train_batch_size": 4096, "use_ghost_grads": False, "feature_sampling_window": 1000,
        "feature_sampling_method": None, "resample_batches": None, "feature_reinit_scale": None,
        "dead_feature_window": 5000, "dead_feature_threshold": 1e-06, "log_to_wandb": True,
        "wandb_project": "p", "wandb_entity": None, "wandb_log_frequency": 100,
        "n_checkpoints": 10, "checkpoint_path": "checkpoints/ajjrsm82", "run_name": "24-L1",
    },
    "old_topk": {
        "architecture": "standard", "d_in": D, "d_sae": M, "dtype": "float32", "device": "cpu",
        "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5},
        "apply_b_dec_to_input": False, "finetuning_scaling_factor": False,
        "hook_name": "blocks.0.attn.hook_z", "hook_layer": 0, "hook_head_index": None,
        "normalize_activations": False, "model_name": "gemma-2-2b",
    },
}  # fmt: skip


def make(out: Path) -> None:
    """Write all of them below ``out``."""
    import torch
    from sae_lens import SAE, TrainingSAE, registry

    def filled(sae, seed):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, p in sae.named_parameters():
                p.copy_(torch.randn(p.shape, generator=generator))
                if name == "threshold":
                    p.abs_()
        return sae

    def config(architecture, training=False, **options):
        find = registry.get_sae_training_class if training else registry.get_sae_class
        made, kind = find(architecture)
        meta = {"hook_name": options.pop("hook", "blocks.1.hook_resid_post"), "model_name": "m"}
        if "hook_out" in options:
            meta["hook_name_out"] = options.pop("hook_out")
        from sae_lens.saes.sae import SAEMetadata

        return made(kind(d_in=D, d_sae=M, metadata=SAEMetadata(**meta), **options))

    x = torch.randn((T, D), generator=torch.Generator().manual_seed(99)) * 2

    def expect(folder, sae):
        with torch.no_grad():
            read = x.reshape(T, 2, D // 2) if sae.cfg.reshape_activations == "hook_z" else x
            a, y = sae.encode(read), sae(read)
        np.savez(out / folder / "expected.npz", x=x, a=a, y=y.reshape(T, -1))

    between = {"hook": "blocks.2.ln2.hook_normalized", "hook_out": "blocks.2.hook_mlp_out",
               "d_out": O, "apply_b_dec_to_input": False}  # fmt: skip
    cases = {
        "standard": config("standard"),
        "standard_not_centred": config("standard", apply_b_dec_to_input=False),
        "standard_heads": config(
            "standard", hook="blocks.2.attn.hook_z", reshape_activations="hook_z"
        ),
        "jumprelu": config("jumprelu", hook="blocks.0.hook_mlp_out"),
        "topk": config("topk", k=4),
        "topk_rescaled": config("topk", k=4, rescale_acts_by_decoder_norm=True),
        "transcoder": config("transcoder", **between),
        "skip_transcoder": config("skip_transcoder", **between),
        "jumprelu_transcoder": config("jumprelu_transcoder", **between),
        "jumprelu_skip_transcoder": config("jumprelu_skip_transcoder", **between),
        "gated": config("gated"),
    }  # fmt: skip
    for seed, (name, sae) in enumerate(cases.items()):
        filled(sae, seed).save_model(out / name)
        expect(name, SAE.load_from_disk(out / name))
    for seed, name in enumerate(("batchtopk", "matryoshka_batchtopk", "topk")):
        options = {"matryoshka_widths": [6, M]} if name.startswith("mat") else {}
        sae = filled(config(name, training=True, k=4, **options), 50 + seed)
        assert isinstance(sae, TrainingSAE)
        if name != "topk":
            sae.topk_threshold.fill_(0.7)
        sae.save_model(out / f"{name}_training")
        sae.save_inference_model(out / f"{name}_inference")
        for kind in ("training", "inference"):  # what is used is the latter
            expect(f"{name}_{kind}", SAE.load_from_disk(out / f"{name}_inference"))
    scaled = filled(config("standard", normalize_activations="expected_average_only_in"), 60)
    scaled.save_model(out / "scaled")
    scaler = {"scaling_factor": 0.37, "has_whitening": False}
    (out / "scaled/activation_scaler.json").write_text(json.dumps(scaler))
    scaled.fold_activation_norm_scaling_factor(0.37)
    expect("scaled", scaled)
    for seed, (name, cfg) in enumerate(OLD.items()):
        filled(config("standard"), 70 + seed).save_model(out / name)
        (out / name / "cfg.json").write_text(json.dumps(cfg))
        expect(name, SAE.load_from_disk(out / name))


if __name__ == "__main__":
    make(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)

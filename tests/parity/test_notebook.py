"""The tutorial notebook's whole pipeline in both frameworks: every number it prints is the same."""

import functools

import jax.numpy as jnp
import numpy as np
import torch

import jaxtc
from jaxtc.parity import torch_side
from jaxtc.transcoders.metrics import notebook_score
from tests.parity import oracles, reference
from tests.parity.figures import note

TOLERANCE = 1e-5


def in_torch(model, transcoder, ids: list[int], layer: int) -> dict[str, np.ndarray]:
    """The notebook, step by step, as it hooks and computes."""
    prompt = torch.tensor([ids])
    made = model.generate(prompt, max_new_tokens=2, do_sample=False)
    kept: dict = {}
    handles = [
        torch_side.hook(
            model, f"model.layers.{layer}.{name}.output", functools.partial(kept.__setitem__, name)
        )
        for name in ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    ]
    with torch.no_grad():
        model(prompt)
    for handle in handles:
        handle.remove()
    activations = transcoder.encode(kept["pre_feedforward_layernorm"])
    recon = transcoder.decode(activations)
    target = kept["post_feedforward_layernorm"]
    score = 1 - torch.mean((recon[0, :, 1:] - target[0, :, 1:]) ** 2) / target[0, :, 1:].var()
    return {
        "generated": made[0].numpy(),
        "threshold shape": np.array(transcoder.threshold.shape),
        "encoder column norms": transcoder.W_enc.norm(dim=0).numpy(),
        "activations shape": np.array(activations.shape),
        "reconstruction": recon.numpy(),
        "target": target.numpy(),
        "score": score.numpy(),
        "features above 1": (activations > 1).sum(-1).numpy(),
    }


def in_jax(model, transcoder, ids: list[int], layer: int) -> dict[str, np.ndarray]:
    """The same with jaxtc; the notebook reads ``mlp_in``, with the norm's gain."""
    made = jaxtc.generate(model, ids, 2, stop=())
    sites = [f"layers.{layer}.mlp_in", f"layers.{layer}.mlp_out"]
    result = jaxtc.run(model, ids, capture=sites, logits=None)
    x, target = (result.activations[site] for site in sites)
    activations = transcoder.encode(x)
    recon = transcoder.decode(activations)
    numbers = {
        "generated": made.sequences[0],
        "threshold shape": transcoder.threshold.shape,
        "encoder column norms": jnp.linalg.norm(transcoder.W_enc[...], axis=0),
        "activations shape": activations.shape,
        "reconstruction": recon,
        "target": target,
        "score": notebook_score(target, recon),
        "features above 1": (activations > 1).sum(-1),
    }
    return {key: np.asarray(value) for key, value in numbers.items()}


def test_every_number(oracle, models, transcoder_file, transcoders_of):
    model, torch_model = models(oracle)
    layer, file = transcoder_file(oracle)
    ours, theirs = transcoders_of(oracle)
    ids = oracle.prompts[0]
    assert ids[0] == torch_model.config.bos_token_id
    assert ours.layer == layer
    mine = in_jax(model, ours, ids, layer)
    expected = in_torch(torch_model, theirs, ids, layer)
    assert mine.keys() == expected.keys()
    assert expected["features above 1"].sum() > 0
    for key, value in expected.items():
        assert mine[key].shape == value.shape, key
        if value.dtype.kind in "iu":
            assert (mine[key] == value).all(), key
            continue
        error = reference.relative([mine[key]], [torch.from_numpy(np.asarray(value))])
        note("float32", f"notebook's {key}", error, oracle.name)
        assert error <= TOLERANCE, f"{key}: {error:.2e}"


def test_tokens_begin_with_bos(make_oracle):
    """The notebook's first step, on the embedded model's own tokenizer."""
    from transformers import AutoTokenizer

    oracle = make_oracle(oracles.EMBEDDED)
    theirs = AutoTokenizer.from_pretrained(oracle.folder)
    ours = jaxtc.load_tokenizer(oracle.source)
    for text in oracles.SENTENCES:
        ids = theirs(text).input_ids
        assert ids[0] == theirs.bos_token_id and theirs.unk_token_id not in ids
        assert list(ours(text).input_ids) == ids

"""Skip connections, ReLU, other files, autoencoders: each spliced in both frameworks."""

import numpy as np
import pytest
import safetensors.numpy
import torch

import jaxtc
from jaxtc.tap.sites import BY_NAME
from tests.parity import oracles
from tests.parity.figures import note
from tests.parity.reference import relative
from tests.parity.torch_transcoder import imitate, spliced
from tests.support.unspared import SetFeature, Splice

TOLERANCE = 1e-5
LAYER, M = 2, 96
SETTINGS = oracles.SHAPES["9b"]
D = SETTINGS["hidden_size"]
JOINED = SETTINGS["num_attention_heads"] * SETTINGS["head_dim"]

# By name: format, reads, writes, with a threshold, with a skip connection.
CASES = {
    "JumpReLU and skip": ("circuit-tracer", "mlp_in_normed", "mlp_out", True, True),
    "ReLU and skip": ("circuit-tracer", "mlp_in", "mlp_out", False, True),
    "ReLU": ("circuit-tracer", "mlp_in", "mlp_out", False, False),
    "affine skip": ("gemma-scope-2", "mlp_in", "mlp_out", True, True),
    "res": ("gemma-scope", "resid_post", "resid_post", True, False),
    "mlp": ("gemma-scope", "mlp_out", "mlp_out", True, False),
    "att": ("gemma-scope", "attn_heads", "attn_heads", True, False),
}


def write(folder, case):
    """A random file of a case, as its publishers write it: keys and orientations by hand."""
    format, reads, _, threshold, skip = CASES[case]
    draw = np.random.default_rng(len(case)).standard_normal
    d = JOINED if reads == "attn_heads" else D
    encoder, decoder = draw((d, M)) / d**0.5, draw((M, d)) / M**0.5 * 4
    biases = {"b_enc": draw(M) * 0.3, "b_dec": draw(d) * 0.5}
    jump, direct = np.abs(draw(M)) * 0.3, draw((d, d)) / d**0.5
    if format == "circuit-tracer":
        arrays = {"W_enc": encoder.T, "W_dec": decoder, **biases}
        arrays |= {"activation_function.threshold": jump} if threshold else {}
        arrays |= {"W_skip": direct} if skip else {}
        path = folder / f"layer_{LAYER}.safetensors"
    elif format == "gemma-scope-2":
        arrays = {"w_enc": encoder, "w_dec": decoder, **biases, "threshold": jump}
        arrays |= {"affine_skip_connection": direct}
        place = f"transcoder_all/layer_{LAYER}_width_96_l0_small_affine"
        path = folder / place / "params.safetensors"
    else:
        arrays = {"W_enc": encoder, "W_dec": decoder, **biases, "threshold": jump}
        repository = f"gemma-scope-9b-pt-{case}"
        path = folder / repository / f"layer_{LAYER}/width_96/average_l0_9/params.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays = {key: np.ascontiguousarray(value, np.float32) for key, value in arrays.items()}
    np.savez(path, **arrays) if path.suffix == ".npz" else safetensors.numpy.save_file(arrays, path)
    return path


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_spliced_in_both(make_oracle, models, tmp_path, case):
    format, reads, writes, _, skip = CASES[case]
    path = write(tmp_path, case)
    bare = format == "circuit-tracer"
    told = {"input_site": reads, "output_site": writes, "format": format} if bare else {}
    ours = jaxtc.load_transcoder(path, **told)
    assert (ours.input_site, ours.output_site, ours.layer) == (reads, writes, LAYER)
    oracle = make_oracle("9b")
    model, reference = models(oracle)
    address, changes = f"layers.{LAYER}.{writes}", {5: 2.0, 17: 0.0}
    features = SetFeature(ours, [*changes], [*changes.values()])
    edits = [Splice(ours)] if case == "ReLU" else [Splice(ours), features]
    result = jaxtc.run(model, oracle.prompts, edits=edits, capture=address)
    made, logits, expected_made, expected_logits = [], [], [], []
    for row, prompt in enumerate(oracle.prompts):
        set_to = {} if case == "ReLU" else changes
        with spliced(
            reference, LAYER, reads, writes, lambda x, some=set_to: imitate(path, x, some)
        ) as held:
            ids = torch.tensor([prompt])
            expected_logits.append(reference(ids, use_cache=False).logits[0])
        expected_made.append(held["made"][0])
        got = BY_NAME[writes].join(np.asarray(result.activations[address][row]))
        made.append(got[: len(prompt)])
        logits.append(np.asarray(result.logits[row])[: len(prompt)])
    clean = reference(torch.tensor([oracle.prompts[0]]), use_cache=False).logits[0]
    assert relative([expected_logits[0]], [clean]) > 1e-2  # the splice matters
    for name, a, b in (("output", made, expected_made), ("logits", logits, expected_logits)):
        error = note("float32", f"{case}: {name}", relative(a, b), oracle.name)
        assert error <= TOLERANCE
    if skip:
        part = np.asarray(ours.W_skip[...]) @ held[reads][0].numpy().T
        assert np.abs(part).max() > 1e-2

"""The formats of transcoders' files: what others write is read, what we write others read."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxtc
from jaxtc.errors import InputError, SiteError, SourceError, WeightsError
from jaxtc.parity import flow
from tests.support import tiny
from tests.support.weights_files import CONFIG, available_layers, compose, parse, same, write_tier

D, M, O = 24, 60, 16  # noqa: E741
SITES = {"input_site": "mlp_in", "output_site": "mlp_out"}


def draw(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def circuit_tracer(out=D, threshold=True, skip=True) -> dict[str, np.ndarray]:
    made = {"W_enc": draw(M, D), "W_dec": draw(M, out), "b_enc": draw(M), "b_dec": draw(out)}
    made |= {"activation_function.threshold": np.abs(draw(M))} if threshold else {}
    return made | ({"W_skip": draw(out, D)} if skip else {})


def gemma_scope_2(out=D, skip=True) -> dict[str, np.ndarray]:
    made = {"w_enc": draw(D, M), "w_dec": draw(M, out), "b_enc": draw(M), "b_dec": draw(out)}
    made |= {"threshold": draw(M)}
    return made | ({"affine_skip_connection": draw(D, out)} if skip else {})


def write(path, arrays, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.numpy.save_file(arrays, path, **options)
    return path


def by_hand(x, w_enc, b_enc, threshold, w_dec, b_dec, skip):
    """float64: w_enc (D, M), w_dec (M, O), skip (D, O)."""
    z = x @ w_enc + b_enc
    return (z * (z > threshold) * (z > 0)) @ w_dec + b_dec + x @ skip


@pytest.mark.parametrize("out", [D, O])
@pytest.mark.parametrize("threshold", [True, False])
@pytest.mark.parametrize("skip", [True, False])
def test_circuit_tracers(tmp_path, out, threshold, skip):
    arrays = circuit_tracer(out, threshold, skip)
    path = write(tmp_path / "layer_7.safetensors", arrays)
    loaded = jaxtc.load_transcoder(path, format="circuit-tracer", **SITES)
    assert (loaded.layer, loaded.input_site, loaded.d_out) == (7, "mlp_in", out)
    x = draw(5, D).astype(np.float64)
    should = by_hand(
        x, arrays["W_enc"].T, arrays["b_enc"], arrays.get("activation_function.threshold", 0),
        arrays["W_dec"], arrays["b_dec"], arrays["W_skip"].T if skip else np.zeros((D, out)),
    )  # fmt: skip
    np.testing.assert_allclose(loaded(x), should, rtol=1e-4, atol=1e-4)
    assert (loaded.threshold is None, loaded.W_skip is None) == (not threshold, not skip)
    written = jaxtc.save_transcoder(loaded, tmp_path / "again", format="circuit-tracer")
    assert written == tmp_path / "again/layer_7.safetensors"
    again = safetensors.numpy.load_file(written)
    assert set(again) == set(arrays)
    assert all(np.array_equal(again[key], arrays[key]) for key in arrays)
    reloaded = jaxtc.load_transcoder(tmp_path / "again")  # its sites are in the file
    loaded.source = reloaded.source
    assert same(reloaded, loaded) and reloaded.source.endswith("again/layer_7.safetensors")


@pytest.mark.parametrize("skip", [True, False])
def test_gemma_scope_2s(tmp_path, skip):
    arrays = gemma_scope_2(O, skip)
    folder = tmp_path / "transcoder_all" / "layer_5_width_16k_l0_small_affine"
    path = write(folder / "params.safetensors", arrays)
    loaded = jaxtc.load_transcoder(path)
    assert (loaded.layer, loaded.input_site, loaded.output_site) == (5, "mlp_in", "mlp_out")
    x = draw(5, D).astype(np.float64)
    should = by_hand(
        x, arrays["w_enc"], arrays["b_enc"], arrays["threshold"], arrays["w_dec"],
        arrays["b_dec"], arrays["affine_skip_connection"] if skip else np.zeros((D, O)),
    )  # fmt: skip
    np.testing.assert_allclose(loaded(x), should, rtol=1e-4, atol=1e-4)
    for source in (folder, tmp_path):
        assert same(_named(jaxtc.load_transcoder(source, 5), loaded), loaded)
    written = jaxtc.save_transcoder(loaded, tmp_path / "again", format="gemma-scope-2")
    again = safetensors.numpy.load_file(written)
    assert all(np.array_equal(again[key], arrays[key]) for key in arrays)


def _named(transcoder, other):
    transcoder.source, transcoder.layer = other.source, other.layer
    return transcoder


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("format", ["circuit-tracer", "gemma-scope-2"])
def test_what_is_written_keeps_dtype_sites_and_bits(tmp_path, dtype, format):
    made = jaxtc.Transcoder(
        D, M, O, skip=True, layer=3, input_site="resid_mid", output_site="attn_out", dtype=dtype,
        rngs=nnx.Rngs(2),
    )  # fmt: skip
    made.threshold[...] = jnp.abs(jnp.asarray(draw(M), dtype))
    path = jaxtc.save_transcoder(made, tmp_path / "layer_3.safetensors", format=format)
    loaded = jaxtc.load_transcoder(path, dtype=dtype)
    made.source = loaded.source
    assert same(made, loaded)
    first = path.read_bytes()
    assert jaxtc.save_transcoder(made, path, format=format).read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["layer_3.safetensors"]
    explicit = jaxtc.load_transcoder(path, input_site="mlp_in")
    assert (explicit.input_site, explicit.output_site) == ("mlp_in", "attn_out")


@pytest.mark.parametrize("layer", [0, 3, 25, None])
@pytest.mark.parametrize("name", ["mine.safetensors", "mine.npz"])
def test_its_layer_comes_back_from_a_name_that_does_not_say_it(tmp_path, name, layer):
    made = jaxtc.Transcoder(
        D, M, O, layer=layer, input_site="resid_mid", output_site="attn_out", rngs=nnx.Rngs(2)
    )
    path = jaxtc.save_transcoder(made, tmp_path / name)
    assert jaxtc.load_transcoder(path).layer == layer
    assert jaxtc.load_transcoder(path, 3 if layer is None else layer).layer in (3, layer)
    if layer is not None:
        with pytest.raises(SourceError, match=rf"says that it is of layer {layer}.*layer 7"):
            jaxtc.load_transcoder(path, 7)
        (tmp_path / "layer_7").mkdir()
        moved = path.rename(tmp_path / "layer_7" / path.name)
        with pytest.raises(SourceError, match=rf"says that it is of layer {layer}.*layer 7"):
            jaxtc.load_transcoder(moved)


@pytest.mark.parametrize("layer", ["-1", "x", "3.0", "9" * 5000])
def test_a_layer_in_a_header_that_is_none(tmp_path, layer):
    path = jaxtc.save_transcoder(tiny.transcoder(1), tmp_path / "mine.safetensors")
    with safetensors.safe_open(path, "np") as file:
        said = file.metadata()
    save_file(load_file(path), path, said | {"layer": layer})
    with pytest.raises(WeightsError, match="its layer is .*expected a whole number"):
        jaxtc.load_transcoder(path)


def test_a_folder_of_circuit_tracers(tmp_path):
    for layer in (0, 3, 12):
        write(tmp_path / f"layer_{layer}.safetensors", circuit_tracer())
    assert available_layers(tmp_path) == [0, 3, 12]
    loaded = jaxtc.load_transcoders(tmp_path, **SITES)
    assert [t.layer for t in loaded.values()] == [0, 3, 12]
    with pytest.raises(SourceError, match="no transcoder for layer 5; it has layers 0, 3, 12"):
        jaxtc.load_transcoder(tmp_path, 5)
    one = jaxtc.load_transcoder(tmp_path, path="layer_3.safetensors", **SITES)
    assert one.source == f"{tmp_path}/layer_3.safetensors"
    with pytest.raises(SourceError, match="layer=3 was asked for, but .* is of layer 12"):
        jaxtc.load_transcoder(tmp_path / "layer_12.safetensors", 3)


def test_sites_that_nothing_tells_are_asked_for(tmp_path):
    path = write(tmp_path / "layer_1.safetensors", circuit_tracer())
    with pytest.raises(SiteError, match="Give input_site and output_site"):
        jaxtc.load_transcoder(path)
    with pytest.raises(SiteError, match="Give output_site: "):
        jaxtc.load_transcoder(path, input_site="mlp_in")
    for site in ("logits", "attn_pattern", "layers.0.mlp_in"):
        with pytest.raises(SiteError, match=f"'{site}' .* is not a vector for each token"):
            jaxtc.load_transcoder(path, input_site=site, output_site="mlp_out")
    with pytest.raises(SiteError, match="read 'embed' and write 'mlp_out': one of them is a layer"):
        jaxtc.load_transcoder(path, input_site="embed", output_site="mlp_out")
    write(path, circuit_tracer(), metadata={"input_site": "mlp_inn", "output_site": "mlp_out"})
    with pytest.raises(WeightsError, match="its input_site is 'mlp_inn', which is not a site. Did"):
        jaxtc.load_transcoder(path)


def transposed(arrays, key):
    return {**arrays, key: np.ascontiguousarray(arrays[key].T)}


@pytest.mark.parametrize(
    ("arrays", "messages"),
    [
        ({**circuit_tracer(), "affine_skip_connection": draw(D, D)},
         ["affine_skip_connection is not part of", "'circuit-tracer', which has", "W_skip (D, D)"]),
        ({**gemma_scope_2(), "W_skip": draw(D, D)},
         ["W_skip is not part of", "'gemma-scope-2', which has", "affine_skip_connection (D, D)"]),
        ({**circuit_tracer(), "scale": draw(3)}, ["scale is not part of a transcoder"]),
        ({**gemma_scope_2(), "W_enc": draw(D, M)}, ["W_enc is not part", "'gemma-scope-2'"]),
        (transposed(circuit_tracer(), "W_enc"),
         ["W_dec has shape (60, 24), not (24, 60)", "W_enc may be transposed", "(M, D)"]),
        (transposed(gemma_scope_2(), "w_enc"), ["w_enc may be transposed", "(D, M)"]),
        (transposed(circuit_tracer(O), "W_dec"), ["W_dec has shape (16, 60), not (60, 24)"]),
        (transposed(circuit_tracer(O), "W_skip"), ["W_skip has shape (24, 16), not (16, 24)"]),
        (transposed(gemma_scope_2(O), "affine_skip_connection"),
         ["affine_skip_connection has shape (16, 24), not (24, 16)"]),
        ({**circuit_tracer(), "activation_function.threshold": draw(1)},
         ["activation_function.threshold has shape (1,), not (60,)"]),
        ({**gemma_scope_2(), "w_dec": draw(M, 3, D)},
         ["it is of a cross-layer transcoder", "W_dec_N files"]),
        ({**circuit_tracer(), "b_enc": np.ones(M, np.int32)}, ["b_enc has dtype I32"]),
        ({k: v for k, v in circuit_tracer().items() if k != "b_dec"}, ["b_dec is missing"]),
        ({**circuit_tracer(), "W_dec": draw(M, 0), "b_dec": draw(0), "W_skip": draw(0, D)},
         ["W_dec has shape (60, 0)"]),
        ({}, ["W_enc is missing"]),
    ],
)  # fmt: skip
def test_arrays_that_are_no_transcoder(tmp_path, arrays, messages):
    path = write(tmp_path / "layer_1.safetensors", arrays)
    with pytest.raises(WeightsError) as error:
        jaxtc.load_transcoder(path, **SITES)
    assert all(part in str(error.value) for part in [*messages, str(path)]), str(error.value)


def test_values_that_cannot_be_used(tmp_path):
    arrays = circuit_tracer()
    arrays["W_skip"][3, 4] = np.nan
    arrays["activation_function.threshold"][0] = -1
    path = write(tmp_path / "layer_1.safetensors", arrays)
    with pytest.raises(WeightsError) as error:
        jaxtc.load_transcoder(path, **SITES)
    assert "W_skip holds NaN" in str(error.value)
    assert "activation_function.threshold is below 0" in str(error.value)


def test_negative_thresholds_are_written_for_circuit_tracer_as_what_they_do(tmp_path):
    made = jaxtc.Transcoder(D, M, layer=0, rngs=nnx.Rngs(1))
    made.threshold[...] = jnp.asarray(draw(M))
    path = jaxtc.save_transcoder(made, tmp_path, format="circuit-tracer")
    stored = safetensors.numpy.load_file(path)["activation_function.threshold"]
    assert (stored == np.maximum(draw(M), 0)).all() and (draw(M) < 0).any()
    x = draw(9, D)
    np.testing.assert_array_equal(jaxtc.load_transcoder(path).encode(x), made.encode(x))


def test_what_an_npz_cannot_hold(tmp_path):
    made = jaxtc.Transcoder(D, M, skip=True, rngs=nnx.Rngs(1))
    with pytest.raises(SourceError, match="'gemma-scope' has no skip connection.*circuit-tracer"):
        jaxtc.save_transcoder(made, tmp_path)
    with pytest.raises(SourceError, match="does not know its layer"):
        jaxtc.save_transcoder(made, tmp_path, format="circuit-tracer")
    with pytest.raises(SourceError, match="no format called 'circuit_tracer'.*Did you mean"):
        jaxtc.save_transcoder(made, tmp_path, format="circuit_tracer")
    with pytest.raises(SourceError, match="cannot be of the format 'gemma-scope'"):
        jaxtc.save_transcoder(made, tmp_path / "x.safetensors", format="gemma-scope")
    assert not list(tmp_path.iterdir())
    relu = jaxtc.Transcoder(D, M, activation="relu", rngs=nnx.Rngs(1))
    loaded = jaxtc.load_transcoder(jaxtc.save_transcoder(relu, tmp_path))
    x = draw(9, D)
    np.testing.assert_array_equal(loaded.encode(x), relu.encode(x))


@pytest.mark.parametrize("metadata", [[], "x", {"a": 1}, {"a": None}, None, False])
def test_metadata_that_is_no_text(tmp_path, metadata):
    path = write(tmp_path / "layer_1.safetensors", circuit_tracer())
    header, data = parse(path)
    compose(path, {**header, "__metadata__": metadata}, data)
    with pytest.raises(WeightsError, match="expected a (map|string)|__metadata__ is null"):
        jaxtc.load_transcoder(path, **SITES)
    compose(path, {**header, "__metadata__": {"a": json.dumps(metadata)}}, data)
    assert jaxtc.load_transcoder(path, **SITES).layer == 1


def test_the_certificate_is_of_gemma_scopes_transcoders(tmp_path):
    sae = write_tier(tmp_path, "gemma-scope-2b-pt-res/layer_1/width_1k/average_l0_9")
    other = write(tmp_path / "layer_1.safetensors", circuit_tracer())
    for file, kind in ((sae, "an autoencoder of resid_post"), (other, "of the format 'circuit-tr")):
        with pytest.raises(InputError, match=kind):
            flow._transcoder(file, None, CONFIG)

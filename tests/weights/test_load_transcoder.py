"""Transcoders from files, folders and layouts; damaged npz files; which one a layer means."""

import io
import pickle
import zipfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

import jaxtc
from jaxtc.errors import SiteError, SourceError, WeightsError
from jaxtc.weights.files import layout
from jaxtc.weights.sources import resolve
from tests.support.weights_files import available_layers, params, same, write_tier

KEYS = ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")


def matches(transcoder, arrays) -> bool:
    return all(np.array_equal(np.asarray(getattr(transcoder, k)[...]), arrays[k]) for k in KEYS)


def npy(array) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, allow_pickle=False)
    return stream.getvalue()


def write_zip(path, members: dict[str, bytes], compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def refused(path, match):
    with pytest.raises(WeightsError, match=match) as error:
        jaxtc.load_transcoder(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture
def tmp_path(tmp_path):
    """A folder whose name says that what is in it are Gemma Scope's transcoders."""
    folder = tmp_path / "gemma-scope-2b-pt-transcoders"
    folder.mkdir()
    return folder


@pytest.fixture
def path(tmp_path):
    np.savez(tmp_path / "params.npz", **params())
    return tmp_path / "params.npz"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_reads_what_numpy_writes(tmp_path, save):
    save(tmp_path / "params.npz", **params())
    loaded = jaxtc.load_transcoder(tmp_path / "params.npz")
    assert matches(loaded, params()) and loaded.layer is None
    built = jaxtc.Transcoder(24, 60, source=loaded.source, rngs=nnx.Rngs(0))
    assert jax.tree.structure(loaded) == jax.tree.structure(built)


def test_order_and_byte_order_of_storage_do_not_matter(tmp_path):
    arrays = params()
    stored = {key: np.asfortranarray(value).astype(">f8") for key, value in arrays.items()}
    np.savez(tmp_path / "params.npz", **stored)
    assert matches(jaxtc.load_transcoder(tmp_path / "params.npz"), arrays)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_dtype(path, dtype):
    loaded = jaxtc.load_transcoder(path, dtype=dtype)
    assert matches(loaded, {k: v.astype(dtype) for k, v in params().items()})
    assert loaded.W_enc.dtype == dtype


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("d_out", [24, 16])
def test_round_trip_is_exact(tmp_path, dtype, d_out):
    made = jaxtc.Transcoder(24, 60, d_out, dtype=dtype, rngs=nnx.Rngs(3))
    made.threshold[...] = jax.random.uniform(jax.random.key(0), (60,), dtype)
    file = jaxtc.save_transcoder(made, tmp_path / "deep" / "folder")
    assert file == tmp_path / "deep/folder/params.npz"
    loaded = jaxtc.load_transcoder(file, dtype=dtype)
    assert matches(loaded, {key: np.asarray(getattr(made, key)[...]) for key in KEYS})
    made.source = loaded.source
    assert same(made, loaded)
    with np.load(file, allow_pickle=False) as stored:
        assert set(stored) == set(KEYS) and stored["W_enc"].dtype == np.float32
    first = file.read_bytes()
    assert jaxtc.save_transcoder(made, tmp_path / "again.npz").read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.npz", "deep"]


def test_saving_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    made = jaxtc.Transcoder(2, 3, rngs=nnx.Rngs(0))
    with pytest.raises(SourceError, match="cannot be written"):
        jaxtc.save_transcoder(made, tmp_path / "file" / "params.npz")


def test_truncated_anywhere(path):
    raw = path.read_bytes()
    for length in (*range(0, len(raw), 97), len(raw) - 1):
        path.write_bytes(raw[:length])
        refused(path, "not a sound npz file")


def test_a_flipped_bit_in_the_data_is_found(path):
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        starts = [info.header_offset for info in archive.infolist()]
    for start in starts:
        damaged = bytearray(raw)
        damaged[start + 30 + len("W_enc.npy") + 20 + 128 + 40] ^= 4
        path.write_bytes(damaged)
        refused(path, "not a sound npz file")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_wrong_checksum_is_found(path, save):
    save(path, **params(64, 128))  # more than zipfile reads ahead
    raw = bytearray(path.read_bytes())
    raw[raw.index(b"PK\1\2") + 16] ^= 1
    path.write_bytes(raw)
    refused(path, "Bad CRC-32")


@pytest.mark.parametrize("content", [b"", b"PK", b"not a zip at all", b"\0" * 100])
def test_file_that_is_no_zip(path, content):
    path.write_bytes(content)
    refused(path, "not a sound npz file")


def test_object_arrays_are_never_unpickled(path, tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    # numpy's array of objects has pointers by its header, a pickle in its bytes.
    evil = io.BytesIO()
    header = {"descr": "|O", "fortran_order": False, "shape": (60,)}
    np.lib.format.write_array_header_1_0(evil, header)
    evil.write(pickle.dumps([Bomb()] * 60))
    members = {f"{k}.npy": npy(v) for k, v in params().items()}
    write_zip(path, {**members, "threshold.npy": evil.getvalue()})
    refused(path, "threshold holds pickled Python objects")
    assert not (tmp_path / "exploded").exists()


def test_all_that_is_wrong_with_the_arrays_is_one_error(path):
    arrays = params()
    del arrays["threshold"]
    arrays["W_dec"] = np.ascontiguousarray(arrays["W_dec"].T)
    arrays["b_enc"] = arrays["b_enc"].astype(np.int32)
    arrays["scale"] = np.zeros(3, np.float32)
    np.savez(path, **arrays)
    message = refused(path, "not a transcoder")
    assert "threshold is missing" in message
    assert "W_dec has shape (24, 60), not (60, 24) (W_enc says D=24, M=60)" in message
    assert "b_enc has dtype int32" in message
    assert "scale is not part of a transcoder" in message


@pytest.mark.parametrize("shape", [(24,), (24, 0), (2, 3, 4), ()])
def test_encoder_that_is_no_matrix(path, shape):
    np.savez(path, **{**params(), "W_enc": np.zeros(shape, np.float32)})
    refused(path, "W_enc has shape")


def test_bfloat16_as_numpy_stores_it_is_not_guessed(path):
    arrays = {k: v.astype(ml_dtypes.bfloat16) for k, v in params().items()}
    np.savez(path, **arrays)
    refused(path, "W_enc has dtype")


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("order", ["C", "F"])
def test_values_that_are_not_finite(path, bad, order):
    arrays = params()
    arrays["W_dec"][3, 4] = arrays["threshold"][0] = bad
    np.savez(path, **{key: np.asarray(value, order=order) for key, value in arrays.items()})
    message = refused(path, "cannot be used")
    assert "W_dec holds NaN" in message and "threshold holds NaN" in message
    assert "W_enc" not in message


def header(shape, descr="<f4") -> bytes:
    stream = io.BytesIO()
    fields = {"descr": descr, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, fields)
    return stream.getvalue()


@pytest.mark.parametrize("shape", [(10**9, 10**6), (24, 61), (-24, -60), (24,)])
def test_header_that_claims_another_size(path, shape):
    members = {f"{k}.npy": npy(v) for k, v in params().items()}
    members["W_enc.npy"] = header(shape) + params()["W_enc"].tobytes()
    write_zip(path, members)
    refused(path, r"W_enc\.npy has \d+ bytes, its header of shape")


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_directory_that_claims_more_than_is_there(path, compression):
    size = 4 * 10**9 // 2
    members = {f"{k}.npy": npy(v) for k, v in params().items()}
    members["W_enc.npy"] = header((size // 4 // 100, 100)) + b"\1" * 4000
    write_zip(path, members, compression)
    raw = bytearray(path.read_bytes())
    entry = raw.index(b"W_enc.npy", raw.index(b"PK\1\2")) - 46
    claimed = size + len(header((size // 4 // 100, 100)))
    raw[entry + 24 : entry + 28] = claimed.to_bytes(4, "little")
    if compression == zipfile.ZIP_STORED:
        raw[entry + 20 : entry + 24] = claimed.to_bytes(4, "little")
    path.write_bytes(raw)
    refused(path, r"W_enc\.npy claims 20\d+ bytes")


def test_a_bomb_is_not_unpacked(path):
    many = np.zeros((2_000_000, 24), np.float32)  # 192 MB of zeros in 200 kB
    arrays = {**params(), "W_enc": many.T, "W_dec": many}
    np.savez_compressed(path, **{key: arrays[key] for key in ("W_enc", "b_dec")})
    refused(path, r"its \d+ bytes claim to unpack to 192\d+, which no weights do")


def test_something_before_the_zip(path):
    path.write_bytes(b"#!/bin/sh\n" + path.read_bytes())
    refused(path, "does not begin as a zip file does")


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"\x93NUMPY\x03\0", b"hello" * 50])
def test_member_that_is_no_npy(path, content):
    members = {f"{k}.npy": npy(v) for k, v in params().items()}
    write_zip(path, {**members, "b_dec.npy": content})
    refused(path, r"b_dec\.npy")


def test_other_compressions_are_refused(path):
    write_zip(path, {f"{k}.npy": npy(v) for k, v in params().items()}, zipfile.ZIP_LZMA)
    refused(path, "compressed in a way")


@pytest.fixture
def scope(tmp_path):
    """Layers 0, 1 and 20 of a folder like Gemma Scope's; layer 20 has its usual L0 and another."""
    root = tmp_path / "scope"
    for number, place in enumerate(
        ["layer_0/width_1k/average_l0_9", "layer_1/width_1k/average_l0_7",
         "layer_20/width_16k/average_l0_11", "layer_20/width_16k/average_l0_117",
         "layer_20/width_65k/average_l0_11"]
    ):  # fmt: skip
        arrays = params()
        arrays["b_dec"][0] = number
        write_tier(root, place, arrays)
    return root


@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        ("", {"layer": 0}, ("layer_0/width_1k/average_l0_9", 0)),
        ("", {"layer": 20}, ("layer_20/width_16k/average_l0_11", 2)),
        ("", {"path": "layer_20/width_16k/average_l0_117"},
         ("layer_20/width_16k/average_l0_117", 3)),
        ("", {"path": "layer_20/width_16k/average_l0_117/params.npz"},
         ("layer_20/width_16k/average_l0_117", 3)),
        ("", {"path": "layer_1"}, ("layer_1/width_1k/average_l0_7", 1)),
        ("layer_1", {}, ("layer_1/width_1k/average_l0_7", 1)),
        ("layer_20", {}, ("layer_20/width_16k/average_l0_11", 2)),
        ("layer_20/width_16k/average_l0_117", {"layer": 20},
         ("layer_20/width_16k/average_l0_117", 3)),
    ],
)  # fmt: skip
def test_which_one_of_a_folder(scope, source, options, expected):
    name, mark = expected
    loaded = jaxtc.load_transcoder(f"{scope}/{source}".rstrip("/"), **options)
    assert loaded.source == f"{scope}/{name}" and loaded.b_dec[0] == mark
    assert loaded.layer == int(name.split("/")[0].removeprefix("layer_"))
    assert (loaded.input_site, loaded.output_site) == ("mlp_in_normed", "mlp_out")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({}, ["layers 0, 1, 20", "say which layer"]),
        ({"layer": 2}, ["no transcoder for layer 2", "0, 1, 20"]),
        ({"layer": -1}, ["layer is -1"]),
        ({"path": "layer_3/width_1k/average_l0_9"}, ["no transcoder for layer 3", "0, 1, 20"]),
        ({"path": "layer_20/width_16k/average_l0_12"}, ["average_l0_11", "average_l0_117"]),
        ({"path": "layer_1/width_1k/average_l0_7", "layer": 0}, ["layer=0", "layer 1"]),
        ({"path": "../scope/layer_1"}, ["leaves"]),
        ({"path": "/layer_1"}, ["leaves"]),
        ({"layer": 0, "revision": "main"}, ["revision='main'"]),
    ],
)
def test_requests_that_a_folder_cannot_answer(scope, options, named):
    with pytest.raises(SourceError) as error:
        jaxtc.load_transcoder(scope, **options)
    assert all(part in str(error.value) for part in named), str(error.value)


def test_several_tiers_without_a_usual_one_are_listed(scope):
    write_tier(scope, "layer_0/width_1k/average_l0_30")
    with pytest.raises(SourceError) as error:
        jaxtc.load_transcoder(scope, 0)
    for tier in ("layer_0/width_1k/average_l0_9", "layer_0/width_1k/average_l0_30"):
        assert tier in str(error.value)


def test_every_layer_of_a_folder(scope):
    loaded = jaxtc.load_transcoders(scope)
    assert list(loaded) == [0, 1, 20] and [t.layer for t in loaded.values()] == [0, 1, 20]
    assert list(jaxtc.load_transcoders(scope, [20, 0])) == [20, 0]
    with pytest.raises(SourceError, match="no transcoder for layer 5"):
        jaxtc.load_transcoders(scope, [0, 5])
    with pytest.raises(SourceError, match="expected 'all'"):
        jaxtc.load_transcoders(scope, "every")


def test_folder_without_transcoders(tmp_path):
    for call in (jaxtc.load_transcoder, jaxtc.load_transcoders):
        with pytest.raises(SourceError, match="holds no transcoders; expected layer_N"):
            call(tmp_path)


def test_embedded_is_a_folder_of_that_layout(scope, monkeypatch, tmp_path):
    scope.rename(tmp_path / "transcoders")
    monkeypatch.setattr(resolve, "EMBEDDED_DATA", tmp_path)
    loaded = jaxtc.load_transcoder(layer=1)
    assert loaded.source == "embedded/layer_1/width_1k/average_l0_7" and loaded.b_dec[0] == 1
    assert list(jaxtc.load_transcoders()) == [0, 1, 20]


def test_input_site(scope):
    assert jaxtc.load_transcoder(scope, 1, input_site="mlp_in").input_site == "mlp_in"
    with pytest.raises(SiteError, match="Did you mean 'mlp_in'"):
        jaxtc.load_transcoder(scope, 1, input_site="mlp_inn")
    with pytest.raises(SiteError, match="Did you mean 'mlp_out'"):
        jaxtc.load_transcoder(scope, 1, output_site="mlp_outt")


@pytest.mark.parametrize(
    "sites", [{}, {"input_site": "mlp_in"}, {"output_site": "attn_out"}, {"input_site": "mlp_out"}]
)
def test_an_npz_of_ours_says_its_sites(tmp_path, sites):
    made = jaxtc.Transcoder(24, 60, rngs=nnx.Rngs(3), **sites)
    file = jaxtc.save_transcoder(made, tmp_path.parent / "elsewhere")
    made.source = str(file)
    assert same(made, jaxtc.load_transcoder(file))
    with np.load(file) as stored:
        assert sorted(stored) == sorted(KEYS)
    # Another program that rewrites the arrays drops what they said.
    with np.load(file) as stored:
        np.savez(file, **stored)
    with pytest.raises(SiteError, match="Give input_site and output_site"):
        jaxtc.load_transcoder(file)


@pytest.mark.parametrize(
    "comment", [b"", b"made by hand", b"{", b"[1]", b'{"variant": 1}', b'{"input_site": "embed"}',
                b"[" * 9999, b"\xff{}", b'{"variant": "sae"}'],
)  # fmt: skip
def test_comments_of_others_say_nothing(tmp_path, comment):
    file = tmp_path.parent / "params.npz"
    np.savez(file, **params())
    with zipfile.ZipFile(file, "a") as archive:
        archive.comment = comment
    with pytest.raises(SiteError, match="Nothing says which sites"):
        jaxtc.load_transcoder(file)
    given = {"input_site": "resid_post", "output_site": "resid_post"}
    assert matches(jaxtc.load_transcoder(file, **given), params())
    with zipfile.ZipFile(file, "a") as archive:
        archive.comment = b'{"variant": "sae", "input_site": "mlp_inn", "output_site": "mlp_out"}'
    with pytest.raises(WeightsError, match="its input_site is 'mlp_inn', which is not a site"):
        jaxtc.load_transcoder(file)


@pytest.mark.parametrize(
    "folder", ["saes", "gemma-scope", "res", "my-transcoders", "gemma-scope-2"]
)
def test_an_npz_in_a_folder_that_says_nothing_asks_for_its_sites(tmp_path, folder):
    root = tmp_path.parent / folder
    file = write_tier(root, "layer_1/width_16k/average_l0_71")
    for source in (root, file):
        for call in (jaxtc.load_transcoder, jaxtc.load_transcoders):
            with pytest.raises(SiteError, match="Give input_site and output_site.*'resid_post'"):
                call(source)
    with pytest.raises(SiteError, match="Give output_site"):
        jaxtc.load_transcoder(root, 1, input_site="mlp_in")
    sites = {"input_site": "mlp_in_normed", "output_site": "mlp_out"}
    assert jaxtc.load_transcoder(root, **sites).layer == 1


def test_a_path_in_the_place_of_the_layer(scope):
    with pytest.raises(SourceError, match="path='layer_1/width_1k/average_l0_7'"):
        jaxtc.load_transcoder(scope, "layer_1/width_1k/average_l0_7")
    with pytest.raises(SourceError, match="layer is 1.5, expected"):
        jaxtc.load_transcoder(scope, 1.5)
    with pytest.raises(SourceError, match="layers is 1, expected 'all' or several, such as .20."):
        jaxtc.load_transcoders(scope, 1)
    assert jaxtc.load_transcoder(scope, np.int64(1)).layer == 1


@pytest.mark.parametrize(
    ("folder", "layer"),
    [
        ("player_2", None),
        ("layer_12_ablation", None),
        ("layer_3", 3),
        ("layer_3/layer_12_ablation", 3),
        ("layer_3/layer_5", 5),
        ("layer_3/player_2", 3),
    ],
)
def test_only_a_whole_folder_name_tells_the_layer(tmp_path, folder, layer):
    (tmp_path / folder).mkdir(parents=True)
    np.savez(tmp_path / folder / "params.npz", **params())
    assert jaxtc.load_transcoder(tmp_path / folder / "params.npz").layer == layer
    assert jaxtc.load_transcoder(tmp_path / folder).layer == layer
    assert layout.layer_of(folder) == layer


def test_the_layer_of_one_file(scope, tmp_path):
    file = scope / "layer_20/width_65k/average_l0_11/params.npz"
    assert available_layers(file) == [20]
    assert jaxtc.load_transcoders(file)[20].b_dec[0] == 4
    np.savez(tmp_path / "mine.npz", **params())
    with pytest.raises(SourceError, match="is one transcoder.*say which layer"):
        available_layers(tmp_path / "mine.npz")


@pytest.mark.parametrize("source", ["nothing", "./nothing/there", "/nothing", "dir/params.npz"])
def test_source_that_is_nothing(source):
    with pytest.raises(SourceError, match="no file or folder"):
        jaxtc.load_transcoder(source, 0)


@pytest.mark.parametrize(
    ("folder", "site"),
    [
        ("gemma-scope-9b-it-res", "resid_post"),
        ("gemma-scope-2b-pt-mlp-canonical", "mlp_out"),
        ("models--google--gemma-scope-2b-pt-att/snapshots/0a", "attn_heads"),
    ],
)
def test_autoencoders_are_told_by_their_folder(tmp_path, folder, site, monkeypatch):
    tier = "layer_20/width_16k/average_l0_11"
    file = write_tier(tmp_path, f"{folder}/{tier}")
    monkeypatch.chdir(tmp_path / folder)
    places = [(tmp_path / folder, None), (file, None), (tmp_path, f"{folder}/{tier}"), (tier, None)]
    for source, path in places:
        loaded = jaxtc.load_transcoder(source, path=path)
        assert (loaded.input_site, loaded.output_site, loaded.layer) == (site, site, 20)
    other = jaxtc.load_transcoder(file, input_site="resid_mid", output_site="attn_out")
    assert (other.input_site, other.output_site) == ("resid_mid", "attn_out")
    # The file tells its site, wherever it is.
    again = jaxtc.load_transcoder(jaxtc.save_transcoder(loaded, tmp_path / "layer_20"))
    assert same(loaded, _named(again, loaded))


def _named(transcoder, other):
    transcoder.source = other.source
    return transcoder


def test_which_autoencoder(tmp_path):
    root = tmp_path / "gemma-scope-2b-pt-res"
    for place in ("width_16k/average_l0_11", "width_16k/average_l0_71", "width_65k/average_l0_50",
                  "width_65k/average_l0_9"):  # fmt: skip
        write_tier(root, f"layer_20/{place}")
    write_tier(root, "embedding/width_4k/average_l0_6")
    write_tier(root, "layer_3/width_16k/canonical")
    load = jaxtc.load_transcoder
    assert load(root, 3).source.endswith("width_16k/canonical")
    assert load(root, 20, width="16k", l0=71).source.endswith("width_16k/average_l0_71")
    assert load(root, 20, width="width_65k", l0="average_l0_9").source.endswith("average_l0_9")
    assert load(root, 20, l0=50).source.endswith("width_65k/average_l0_50")
    for options, message in [
        ({}, "has 4 transcoders for layer 20; choose one by its path, or by width and l0"),
        ({"width": "65k"}, "has 2 transcoders.*average_l0_9, .*average_l0_50"),
        ({"width": "1m"}, "no transcoder with width='1m' for layer 20; there is '16k', '65k'"),
        ({"width": "16k", "l0": 50}, "with l0='50' for layer 20; there is '11', '71'"),
    ]:
        with pytest.raises(SourceError, match=message):
            load(root, 20, **options)
    embedding = load(root / "embedding/width_4k/average_l0_6")
    assert (embedding.input_site, embedding.output_site, embedding.layer) == (
        "embed",
        "embed",
        None,
    )
    assert available_layers(root) == [3, 20]


def test_transcoders_on_disk_are_not_taken_for_autoencoders(tmp_path):
    for name in ("gemma-scope-2b-pt-transcoders", "gemma-scope-transcoders-mlp-copy"):
        assert jaxtc.load_transcoder(write_tier(tmp_path, f"{name}/layer_1")).layer == 1


def test_default_tiers_are_the_published_ones():
    assert len(layout.DEFAULTS) == 26
    assert layout.DEFAULTS[20].path == "layer_20/width_16k/average_l0_11/params.npz"
    assert [layout.DEFAULTS[layer].l0 for layer in (0, 10, 11, 25)] == ["76", "88", "5", "41"]
    assert layout.tiers_of(tier.path for tier in layout.DEFAULTS) == layout.DEFAULTS


def test_a_path_may_be_a_path():
    place = "layer_1/width_1k/average_l0_16"
    one, two = (jaxtc.load_transcoder("embedded", path=kind(place)) for kind in (str, Path))
    assert same(one, two) and two.layer == 1
    with pytest.raises(SourceError, match="path is 3, expected a path below embedded"):
        jaxtc.load_transcoder("embedded", path=3)
    with pytest.raises(SourceError, match="leaves"):
        jaxtc.load_transcoder("embedded", path=Path("../elsewhere"))

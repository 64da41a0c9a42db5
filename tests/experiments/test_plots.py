"""Heat maps: what can be said of a picture without looking at it."""

import sys

import jax.numpy as jnp
import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")

import matplotlib.pyplot as plt

import jaxtc
from jaxtc import plots
from jaxtc.errors import InputError, JaxtcError
from jaxtc.experiments.patching import Patching
from jaxtc.experiments.sweep import Sweep

TOKENS = ["<bos>", "▁The", "▁New▁York", "▁is"]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def patching(values, clean=(3.0,), corrupted=(1.0,), **axes):
    axes = axes or {"layer": 2, "position": 4}
    given = {name: np.arange(size) for name, size in axes.items()}
    return Patching(jnp.asarray(values), given, jnp.asarray(clean), jnp.asarray(corrupted), "v")


def drawn(ax):
    return np.ma.filled(ax.images[0].get_array(), np.nan)


def bar(ax):
    return ax.images[0].colorbar


def words(labels):
    return [label.get_text() for label in labels]


def test_patching_is_drawn_as_the_share_recovered_with_its_convention():
    values = np.array([[1, 1, 3, 1], [1, 2, 1, 0]], np.float32)[..., None]
    ax = plots.heat_map(patching(values), TOKENS)
    np.testing.assert_allclose(drawn(ax), [[0, 0, 1, 0], [0, 0.5, 0, -0.5]], atol=1e-6)
    assert words(ax.get_xticklabels()) == ["<bos> 0", "The 1", "New York 2", "is 3"]
    assert words(ax.get_yticklabels()) == ["0", "1"]
    assert ax.get_ylabel() == "layer" and ax.get_title() == "v patched"
    assert "0 as corrupted, 1 as clean" in bar(ax).ax.get_ylabel()
    assert ax.images[0].get_clim() == (-1, 1)  # centred at 0, whatever the signs
    assert not ax.yaxis_inverted()  # layers go up


def test_a_batch_is_averaged_over_its_recovered_shares():
    values = np.array([[[3.0, 1.0]] * 4] * 2)
    ax = plots.heat_map(patching(values, clean=(3.0, 2.0), corrupted=(1.0, 0.0)))
    np.testing.assert_allclose(drawn(ax), np.full((2, 4), (1 + 0.5) / 2))


def test_heads_are_rows_of_their_own():
    values = np.arange(2 * 4 * 3, dtype=float).reshape(2, 4, 3, 1)
    found = patching(values, clean=(1.0,), corrupted=(0.0,), layer=2, position=4, head=3)
    ax = plots.heat_map(found, TOKENS)
    assert words(ax.get_yticklabels()) == ["0.0", "0.1", "0.2", "1.0", "1.1", "1.2"]
    assert ax.get_ylabel() == "layer.head"
    assert drawn(ax)[4, 2] == values[1, 2, 1, 0]


@pytest.mark.parametrize(
    ("values", "clim", "cmap"),
    [
        ([[-1.0, 0.0], [4.0, 1.0]], (-4, 4), "RdBu_r"),
        ([[2.0, 9.0], [4.0, 3.0]], (2, 9), "viridis"),
        ([[-2.0, -9.0], [-4.0, -3.0]], (-9, -2), "viridis"),
    ],
)
def test_colours_are_centred_at_zero_only_where_values_have_both_signs(values, clim, cmap):
    image = plots.heat_map(np.array(values)).images[0]
    assert image.get_clim() == clim
    assert image.cmap.name == cmap


@pytest.mark.parametrize(
    ("values", "clim"),
    [([[-1.0, 4.0]], (-10, 10)), ([[1.0, 4.0]], (0, 10)), ([[-1.0, -4.0]], (-10, 10))],
)
def test_a_limit_makes_pictures_comparable(values, clim):
    assert plots.heat_map(np.array(values), limit=10).images[0].get_clim() == clim


def test_a_sweep_has_tokens_along_its_positions_only():
    positions = np.array([3, 1, -2])
    values = jnp.arange(6.0).reshape(3, 2)
    found = Sweep(values, {"position": positions, "factor": np.array([0.5, 2.0])})
    ax = plots.heat_map(found, TOKENS, label="logit of ▁is")
    np.testing.assert_array_equal(drawn(ax), values.T)
    assert words(ax.get_xticklabels()) == ["is 3", "The 1", "New York -2"]
    assert words(ax.get_yticklabels()) == ["0.5", "2"] and ax.get_ylabel() == "factor"
    assert bar(ax).ax.get_ylabel() == "logit of ▁is"
    other = Sweep(values, {"seed": np.arange(3), "factor": np.array([0.5, 2.0])})
    ax = plots.heat_map(other, TOKENS)
    assert words(ax.get_xticklabels()) == ["0.5", "2"] and ax.get_xlabel() == "factor"


def test_an_axis_of_arrays_is_numbered():
    found = Sweep(jnp.ones((2, 3)), {"layer": np.arange(2), "direction": np.ones((3, 8))})
    assert words(plots.heat_map(found).get_xticklabels()) == ["0", "1", "2"]
    pairs = Sweep(jnp.ones((2, 2)), {"layer": np.arange(2), "position": np.array([[2, 3], [0, 1]])})
    ax = plots.heat_map(pairs, TOKENS)  # entry 0 is not token 0
    assert words(ax.get_xticklabels()) == ["0", "1"]
    assert ax.get_xlabel() == "position, by number"


def test_what_is_not_there_is_gray():
    ax = plots.heat_map(np.array([[1.0, np.nan], [3.0, 2.0]]))
    assert ax.images[0].get_clim() == (1, 3)
    shown = ax.images[0].to_rgba(ax.images[0].get_array())[0, 1]
    infinite = plots.heat_map(np.array([[1.0, np.inf], [3.0, -np.inf]]))
    assert infinite.images[0].get_clim() == (1, 3)
    np.testing.assert_allclose(shown, matplotlib.colors.to_rgba("lightgray"))


def test_it_draws_where_it_is_told_and_gives_that_back():
    figure, (left, right) = plt.subplots(1, 2)
    assert plots.heat_map(np.ones((2, 4)), TOKENS, ax=right, title="here") is right
    assert right.get_title() == "here" and not left.images
    assert plt.get_fignums() == [figure.number]


def test_labels_of_many_rows_are_thinned():
    ax = plots.heat_map(np.ones((208, 4)))
    assert words(ax.get_yticklabels())[:3] == ["0", "6", "12"]


def test_nothing_is_cut_and_no_two_labels_overlap_in_thirty_tokens():
    ax = plots.heat_map(np.ones((26, 30)), ["▁Rhode▁Island"] * 30, title="resid_pre")
    figure = ax.figure
    figure.canvas.draw()
    box = figure.bbox
    for part in (*ax.get_xticklabels(), *ax.get_yticklabels(), ax.title, bar(ax).ax.yaxis.label):
        extent = part.get_window_extent()
        assert box.x0 <= extent.x0 and extent.x1 <= box.x1, part
        assert box.y0 <= extent.y0 and extent.y1 <= box.y1, part
    rows = [label.get_window_extent() for label in ax.get_yticklabels()]
    assert all(a.y1 <= b.y0 for a, b in zip(rows, rows[1:], strict=False))
    # Along a slant of 60 degrees a line of text needs its height over sin 60 of room.
    columns = ax.get_xticks()
    pixels = ax.transData.transform([(x, 0) for x in columns[:2]])[:, 0]
    height = ax.get_xticklabels()[0].get_fontsize() * figure.dpi / 72
    assert pixels[1] - pixels[0] > height / np.sin(np.pi / 3)


def test_a_real_sweep_and_a_real_patching_are_one_call_each():
    model, tokenizer = jaxtc.load_model(), jaxtc.load_tokenizer()
    clean, corrupted = (tokenizer(f"{city} is in").input_ids for city in ("Dallas", "Oakland"))
    texas, california = tokenizer.convert_tokens_to_ids(["▁Texas", "▁California"])
    score = jaxtc.scores.LogitDifference(texas, california)
    pieces = tokenizer.convert_ids_to_tokens(clean)
    ax = plots.heat_map(jaxtc.activation_patching(model, clean, corrupted, score), pieces)
    assert drawn(ax).shape == (model.config.num_hidden_layers, len(clean))
    assert drawn(ax)[0, 1] == pytest.approx(1, abs=1e-3)  # the city's embedding is all there is
    edit = jaxtc.Zero(site="mlp_out", layer=jaxtc.Over(range(2)), position=jaxtc.Over(range(4)))
    ax = plots.heat_map(jaxtc.sweep(model, clean, [edit], of=score), pieces)
    assert drawn(ax).shape == (2, 4)


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (np.ones(4), r"two axes.*shape \(4,\)"),
        (Sweep(jnp.ones(3), {"layer": np.arange(3)}), r"the axes layer"),
        (Sweep({"a": jnp.ones((2, 3))}, {"x": np.arange(2), "y": np.arange(3)}), "draw the array"),
        (np.full((2, 4), np.nan), "all are NaN"),
        (patching(np.ones((2, 4, 1)), clean=(1.0,), corrupted=(1.0,)), "score the same"),
        (np.ones((0, 4)), r"the shape is \(0, 4\)"),
        (np.ones((2, 4, 8)), r"draws two axes, \(L, T\); got shape \(2, 4, 8\).*array.mean"),
        (np.ones((3, 1, 2, 4, 4)), r"got shape \(3, 1, 2, 4, 4\)"),
        (np.ones((2, 4)) + 1j, "real numbers over two axes, got complex128"),
        ([[1.0, 2.0], [3.0]], "real numbers over two axes, got list"),
        ([["a", "b"]], "real numbers over two axes, got <U1"),
        ({"a": np.ones((2, 4))}, r"got dict.*found.values\['name'\]"),
        (3.0, r"got shape \(\)"),
        (Sweep(jnp.ones((3, 2)), {"layer": np.arange(2), "row": np.arange(3)}),
         r"shape \(3, 2\), but their axes are layer of 2, row of 3"),
        (Sweep(jnp.ones((2, 3, 5, 7)), {"x": np.arange(2), "y": np.arange(3)}),
         r"two axes.*\(2, 3, 5, 7\) with the axes x, y"),
    ],
)  # fmt: skip
def test_what_cannot_be_drawn_says_why(found, message):
    with pytest.raises(InputError, match=message):
        plots.heat_map(found)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (TOKENS[1:], r"3 tokens, but positions from 0 to 3"),
        ([*TOKENS, "<pad>"], r"5 tokens, but positions from 0 to 3.*padding left out"),
        ([2, 5, 7, 9], "convert_ids_to_tokens"),
        ("▁The", "convert_ids_to_tokens"),
    ],
)
def test_tokens_of_another_prompt_are_refused(tokens, message):
    for found in (np.ones((2, 4)), patching(np.ones((2, 4, 1)), clean=(2.0,), corrupted=(1.0,))):
        with pytest.raises(InputError, match=message):
            plots.heat_map(found, tokens)


def test_places_of_a_prompt_have_their_own_tokens():
    found = patching(np.ones((2, 2, 1)), clean=(2.0,), corrupted=(1.0,), layer=2, position=2)
    found.axes["position"] = np.array([2, -1])
    assert words(plots.heat_map(found, TOKENS).get_xticklabels()) == ["New York 2", "is -1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit": 0}, "limit is 0, expected the number above 0"),
        ({"limit": -2.0}, "limit is -2.0"),
        ({"limit": np.nan}, "limit is nan"),
        ({"limit": "3"}, "limit is '3'"),
        ({"ax": np.array([None, None])}, r"ax is ndarray.*axes\[0\]"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        plots.heat_map(np.ones((2, 4)), **options)
    assert not plt.get_fignums()


def test_one_row_behind_an_array_is_dropped():
    values = np.arange(8.0).reshape(2, 4, 1)
    np.testing.assert_array_equal(drawn(plots.heat_map(values, TOKENS)), values[..., 0])


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(JaxtcError, match=r"pip install 'jaxtc\[notebooks\]'"):
        plots.heat_map(np.ones((2, 4)))

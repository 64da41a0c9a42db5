"""The table of sites, and the forward pass that must agree with it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxtc.edits.values import Scale
from jaxtc.errors import SiteError
from jaxtc.model.gemma2 import Gemma2
from jaxtc.tap.sites import BY_NAME, NORM_SCALES, SITES, Address, parse, resolve
from jaxtc.tap.tap import Tap
from tests.support import tiny
from tests.support.batch import run

LAYERS = tiny.config().num_hidden_layers


class Recorder(Tap):
    """Writes down what passes, and asks for all of it."""

    def __init__(self):
        super().__init__(captures=[one for name in BY_NAME for one in resolve(name, LAYERS)])
        self.seen: list[tuple[Address, tuple[int, ...], jnp.dtype]] = []

    def __call__(self, site, x):
        self.seen.append((Address(site, self.layer), x.shape, x.dtype))
        return x


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def record(request):
    model = Gemma2(tiny.config(), dtype=jnp.dtype(request.param), rngs=nnx.Rngs(0))
    recorder = Recorder()
    model(jnp.ones((2, 5), jnp.int32), tap=recorder)
    return jnp.dtype(request.param), recorder.seen


def test_every_site_is_tapped_once_in_the_order_of_the_table(record):
    first, *after = [site.name for site in SITES if not site.per_layer]
    inside = [site.name for site in SITES if site.per_layer]
    assert [first, *inside, *after] == [site.name for site in SITES]
    expected = [Address(name, layer) for layer in range(LAYERS) for name in inside]
    expected = [Address(first), *expected, *map(Address, after)]
    assert [address for address, _, _ in record[1]] == expected


def test_shapes_and_dtypes_are_those_of_the_table(record):
    dtype, seen = record
    sizes = {"B": 2, "T": 5, "S": 5, **tiny.config().sizes}
    for address, shape, found in seen:
        site = BY_NAME[address.site]
        assert shape == site.shape(sizes), address
        assert found == (jnp.float32 if site.float32 else dtype), address


def test_names_are_unique():
    for names in (
        [site.name for site in SITES],
        [(site.per_layer, site.hf) for site in SITES if site.hf],
        [(site.per_layer, site.tl) for site in SITES if site.tl],
    ):
        assert len(names) == len(set(names))


def test_norm_scales_are_the_five_norms():
    assert len(NORM_SCALES) == 5 and all(BY_NAME[name].axes == "B T 1" for name in NORM_SCALES)


@pytest.mark.parametrize("site", SITES, ids=lambda site: site.name)
def test_own_names(site):
    if site.per_layer:
        assert parse(site.name) == parse(f"layers.*.{site.name}") == (site.name, None)
        assert parse(f"layers.2.{site.name}") == (site.name, 2)
        assert resolve(site.name, 3) == tuple(Address(site.name, layer) for layer in range(3))
        assert resolve(f"layers.-1.{site.name}", 3) == (Address(site.name, 2),)
    else:
        assert resolve(site.name, 3) == (Address(site.name),)
    for address in resolve(site.name, 3):
        assert resolve(str(address), 3) == (address,) == resolve(address, 3)


FOREIGN = [
    (site, alias, dict(site.unlike))
    for site in SITES
    for alias in site.aliases(1).values()
]  # fmt: skip


@pytest.mark.parametrize(("site", "alias", "unlike"), FOREIGN, ids=lambda x: str(x)[:40])
def test_foreign_names(site, alias, unlike):
    refused = [reason for name, reason in unlike.items() if alias.endswith(name)]
    if refused:
        with pytest.raises(SiteError, match="not an alias here") as caught:
            parse(alias)
        assert refused[0] in str(caught.value)
    else:
        assert parse(alias) == (site.name, 1 if site.per_layer else None)


@pytest.mark.parametrize(
    ("alias", "expected"),
    [
        ("model.layers.1.mlp", ("mlp_proj", 1)),
        ("model.layers.1", ("resid_post", 1)),
        ("model.layers.1.self_attn", ("attn_proj", 1)),
        ("layers.1.mlp.output", ("mlp_proj", 1)),
        ("model.embed_tokens", ("embed", None)),
        ("model.norm", ("final_norm", None)),
        ("lm_head", ("logits_uncapped", None)),
        ("blocks.1.mlp.hook_pre", ("mlp_gate", 1)),
        ("blocks.0.hook_mlp_out", ("mlp_out", 0)),
        ("blocks.*.hook_resid_mid", ("resid_mid", None)),
        ("hook_embed", ("embed", None)),
    ],
)
def test_short_foreign_names(alias, expected):
    assert parse(alias) == expected


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("layers.1.mlp_outt", "no site called 'mlp_outt'.*Did you mean 'mlp_out'"),
        ("reside_post", "Did you mean 'resid_post'"),
        ("layers.3.mlp_out", "asks for layer 3, but this model has 3 layers: 0 to 2"),
        ("layers.-4.mlp_out", "asks for layer -4"),
        ("layers.1.logits", "once, not per layer; ask for 'logits'"),
        ("blocks.1.ln1.hook_scale", "keeps the rms itself"),
        ("ln_final.hook_normalized", "before the gain"),
        ("layers.1.5.mlp_out", "no site called"),
        ("", "no site called"),
        (7, "named by a string, got int"),
        (Address("mlp_oot", 1), "no site called 'mlp_oot'"),
    ],
)
def test_refused(address, message):
    with pytest.raises(SiteError, match=message):
        resolve(address, LAYERS)


def test_sequence_axis():
    for site in SITES:
        assert site.letters[site.sequence_axis] == ("T" if "T" in site.letters else "S")
    assert BY_NAME["attn_pattern"].sequence_axis == 2 and np.all(BY_NAME["k"].sequence_axis == 1)


def test_head_out_is_computed_only_when_asked_for():
    def shapes(**options):
        tap = Tap(positions=jnp.arange(5)[None], lengths=jnp.array([5]), **options)
        made = jax.make_jaxpr(lambda ids: tiny.model()(ids, tap=tap)[0])(jnp.ones((1, 5), int))
        N, D = (tiny.config().sizes[letter] for letter in "ND")
        return str(made).count(f":f32[1,5,{N},{D}] = ")

    assert not shapes()
    assert (
        0
        < shapes(captures=[Address("head_out", 1)]) * LAYERS
        == shapes(captures=resolve("head_out", LAYERS))
    )


def test_head_out_adds_up_to_attn_proj():
    """A capture leaves every bit as it was; an edit's heads add up."""
    sites = ["head_out", "attn_proj", "attn_heads"]
    plain = run(capture=sites[1:])
    found = run(capture=sites)
    assert (found.logits == plain.logits).all()
    each, proj = found.activations["head_out"], found.activations["attn_proj"]
    np.testing.assert_allclose(each.sum(3), proj, atol=2e-6)
    halved = run(edits=[Scale(0.5, site="head_out", head=1, layer=1)], capture=sites).activations
    expected = np.array(each[1])
    expected[:, :, 1] *= 0.5
    np.testing.assert_allclose(halved["layers.1.head_out"], expected, atol=2e-6)
    np.testing.assert_allclose(halved["layers.1.attn_proj"], expected.sum(2), atol=2e-6)
    # Of a head, the same as of what it mixes.
    same = run(edits=[Scale(0.5, site="attn_heads", head=1, layer=1)], capture=sites).activations
    np.testing.assert_allclose(halved["attn_proj"], same["attn_proj"], atol=5e-6)

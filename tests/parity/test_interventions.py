"""Every kind of edit at every site, against the same edit done with hooks on transformers' model.

Each site has two rows of a batch, edited at that site only, in layers and at positions that differ
from site to site and from kind to kind.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxtc
from jaxtc.tap.sites import BY_NAME, Site
from tests.parity import reference, torch_edits
from tests.parity.figures import note
from tests.parity.lab import (
    LAYERS,
    ORACLES,
    SITES,
    TOLERANCE,
    VISIBLE,
    At,
    Lab,
    cut,
    number,
    on_each_oracle,
)  # fmt: skip
from tests.parity.torch_hooks import Hooked, Where


def add(at: At):
    ours, hooks = at.pair(*at.token)
    return functools.partial(jaxtc.Add, ours), torch_edits.add(hooks)


def add_per_layer(at: At):
    if not at.site.per_layer:
        return add(at)
    ours, hooks = at.pair(LAYERS, *at.token)
    return functools.partial(jaxtc.Add, jaxtc.PerLayer(ours)), torch_edits.add(list(hooks))


def set_to(at: At):
    ours, hooks = at.pair(*at.shape[1:])
    return functools.partial(jaxtc.SetTo, ours), torch_edits.set_to(hooks)


def zero(at: At):
    return jaxtc.Zero, torch_edits.zero


def scale(at: At):
    shape = () if at.site.name == "attn_scores" else at.token
    factor = at.draw.uniform(0.2, 0.9, shape).astype(np.float32)
    return functools.partial(jaxtc.Scale, factor), torch_edits.scale(torch.from_numpy(factor))


def interpolate(at: At):
    ours, hooks = at.pair(*at.token)
    return functools.partial(jaxtc.Interpolate, ours, 0.3), torch_edits.interpolate(hooks, 0.3)


def interpolate_from(at: At):
    (end, t_end), (start, t_start) = at.pair(*at.token), at.pair(*at.shape[1:])
    edit = functools.partial(jaxtc.Interpolate, end, 1.2, start)
    return edit, torch_edits.interpolate(t_end, 1.2, t_start)


def mean_of_dataset(at: At):
    ours, hooks = at.pair(*at.token)
    return functools.partial(jaxtc.MeanAblate, ours), torch_edits.set_to(hooks)


def mean(over: str):
    change = getattr(torch_edits, f"mean_of_{over}")
    return lambda at: (functools.partial(jaxtc.MeanAblate, over=over), change)


def project_out_one(at: At):
    ours, hooks = at.pair(at.token[-1])
    return functools.partial(jaxtc.ProjectOut, ours), torch_edits.project_out(hooks[None])


def project_out_several(at: At):
    """A quarter of the space, up to 16 directions: one holds little of many dimensions."""
    ours, hooks = at.pair(min(at.token[-1] // 4, 16), at.token[-1])
    return functools.partial(jaxtc.ProjectOut, ours), torch_edits.project_out(hooks)


def copy_row(at: At):
    """Positions named row by row: the first comes from where the other row's first is."""
    sources, named = at.lab.sources, at.there["position"]
    pairs = isinstance(named, list) and isinstance(named[0], tuple)

    def source(row, position):
        other = int(sources[row])
        tokens = range(len(at.lab.prompts[row]))
        mine = [tokens[place] for place in named[row]] if pairs else []
        if position in mine:
            position = tokens[named[other][mine.index(position)]]
        return other, position

    return functools.partial(jaxtc.Copy, from_row=sources), torch_edits.copy(source)


def copy_position(at: At):
    edit = functools.partial(jaxtc.Copy, from_position=1)
    # Where position 1 itself is named it stays as it is, which other positions make up for.
    return edit, torch_edits.copy(lambda row, position: (row, 1))


def freeze(at: At):
    ours, hooks = at.lab.stored
    hooks = hooks[at.site.name]
    return functools.partial(jaxtc.Freeze, ours), torch_edits.freeze(hooks)


def fold(x):
    """A plain function for :class:`jaxtc.Apply`; both frameworks have ``abs``."""
    return 0.5 * abs(x) - x


def bend(weight, x):
    return x * weight + fold(x)


def apply_function(at: At):
    return functools.partial(jaxtc.Apply, fold), lambda x, now: fold(x)


def apply_pytree(at: At):
    ours, hooks = at.pair()
    edit = functools.partial(jaxtc.Apply, jax.tree_util.Partial(bend, jnp.asarray(ours)))
    return edit, lambda x, now: bend(hooks, x)


# Of each kind its forms, which take turns over the sites, on the two models in another order.
KINDS = {
    "Add": {"": add, ", per layer": add_per_layer},
    "SetTo": {"": set_to},
    "Zero": {"": zero},
    "Scale": {"": scale},
    "Interpolate": {"": interpolate, " from a start": interpolate_from},
    "MeanAblate": {", dataset": mean_of_dataset, ", prompt": mean("prompt")},
    "MeanAblate over": {" batch": mean("batch"), " rows": mean("rows")},
    "ProjectOut": {", several": project_out_several, ", one": project_out_one},
    "Copy": {", row": copy_row, ", position": copy_position},
    "Freeze": {"": freeze},
    "Apply": {", function": apply_function, ", pytree": apply_pytree},
}


def form(kind: str, name: str, site: str) -> str:
    """The form of a kind that a site of an oracle sees."""
    forms = list(KINDS[kind])
    return forms[(number(site) + ORACLES.index(name)) % len(forms)]


def makes_sense(kind: str, site: Site) -> bool:
    """Whether an edit of this kind is one at this site."""
    if site.name == "attn_scores":
        # Masked scores must stay so, or the two models' masks would be compared.
        return kind in ("Add", "Scale")
    # One number, or a number for each key: no space with directions.
    return kind != "ProjectOut" or site.kind == "vector"


CELLS = [
    (kind, site.name)
    for kind, site in itertools.product(KINDS, BY_NAME.values())
    if makes_sense(kind, site)
]


@pytest.fixture(scope="module")
def compared(labs) -> Callable[[str, str], dict[str, tuple[float, float, float]]]:
    """``(oracle, kind)`` to what :func:`compare` finds, once."""
    return functools.cache(lambda name, kind: compare(labs(name), kind))


def compare(model: Lab, kind: str) -> dict[str, tuple[float, float, float]]:
    """Of each site: error, error against the left-padded reference, how far logits moved."""
    seed = list(KINDS).index(kind)
    edits, hooks = [], []
    for name in SITES:
        if not makes_sense(kind, BY_NAME[name]):
            continue
        at = model.at(name, seed)
        make, change = KINDS[kind][form(kind, model.name, name)](at)
        rows = model.rows(name)
        edits.append(make(site=name, row=rows, **at.here))
        hooks.append(Hooked(name, change, Where(row=rows, **at.there)))
    ours = cut(jaxtc.run(model.ours, model.prompts, edits=edits).logits, model.prompts)
    right, left = (cut(model.hooked(hooks, side=s), model.prompts) for s in ("right", "left"))
    base = cut(model.base, model.prompts)
    found = {}
    for name in SITES:
        first, last = model.rows(name)
        rows = slice(first, last + 1)
        found[name] = (
            reference.relative(ours[rows], right[rows]),
            reference.relative(ours[rows], left[rows]),
            reference.relative(right[rows], base[rows]),
        )
    return found


@pytest.mark.parametrize(("kind", "site"), CELLS)
@on_each_oracle
def test_kind_at_site(name, kind, site, compared):
    right, left, moved = compared(name, kind)[site]
    what = kind + form(kind, name, site)
    note("float32", what, max(right, left), f"{name} {site}")
    assert moved > VISIBLE, f"{what} moved the logits by {moved:.1e} only"
    assert max(right, left) <= TOLERANCE, f"{right:.2e} right-padded, {left:.2e} left-padded"


def test_edits_follow_one_another(labs):
    """At one site in the order given; at several, as the pass comes to them."""
    here = labs("9b")
    vector, t_vector = here.at("mlp_out", 0).pair(here.ours.config.hidden_size)
    listed = [
        ("mlp_out", jaxtc.Add, (vector,), torch_edits.add(t_vector), 0),
        ("mlp_out", jaxtc.Scale, (3.0,), torch_edits.scale(3.0), (0, 1)),
        ("mlp_out", jaxtc.Add, (vector,), torch_edits.add(t_vector), (1, 2)),
        ("resid_mid", jaxtc.Scale, (0.5,), torch_edits.scale(0.5), 2),
        ("attn_out", jaxtc.Add, (vector,), torch_edits.add(t_vector), 2),
        ("mlp_in_scale", jaxtc.Scale, (2.0,), torch_edits.scale(2.0), 2),
        ("resid_mid", jaxtc.Add, (vector,), torch_edits.add(t_vector), 2),
        ("resid_post", jaxtc.Zero, (), torch_edits.zero, 2),
        ("resid_post", jaxtc.Add, (vector,), torch_edits.add(t_vector), 2),
    ]
    edits, hooks = [], []
    for site, kind, values, change, row in listed:
        fields = {"row": row, "layer": 1, "position": slice(2, None)}
        if site == "resid_post":
            fields["position"] = -2
        edits.append(kind(*values, site=site, **fields))
        hooks.append(Hooked(site, change, Where(**fields)))
    here.check_rows("edits one after another", here.prompts[:3], edits, hooks)


NOISY = ("embed", "attn_heads", "mlp_out_scale", "resid_post")


def test_noise(labs):
    """The hooks set the site to what ours has there; the rest follows."""
    here, layer = labs("9b"), 2
    prompts = here.prompts[: len(NOISY)]
    at = [{} if name == "embed" else {"layer": layer} for name in NOISY]
    edits = [
        jaxtc.Noise(
            row, 0.3 * here.size[name], site=name, row=row, position=slice(2, None), **at[row]
        )
        for row, name in enumerate(NOISY)
    ]
    wanted = [
        f"layers.{layer}.{name}" if fields else name for name, fields in zip(NOISY, at, strict=True)
    ]
    kept = jaxtc.run(here.ours, prompts, capture=wanted, edits=edits, logits=None).activations
    hooks = [
        Hooked(
            name,
            torch_edits.set_to(torch.from_numpy(np.array(kept[address]))),
            Where(row=row, **at[row]),
        )
        for row, (name, address) in enumerate(zip(NOISY, wanted, strict=True))
    ]
    here.check_rows("Noise", prompts, edits, hooks)

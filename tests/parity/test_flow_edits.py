"""Edits of where information flows, and through transcoders, against hooks on transformers' model.

Each row of a batch is edited in a way of its own.
"""

import numpy as np
import pytest

import jaxtc
from tests.parity import oracles, reference, torch_edits
from tests.parity.figures import note
from tests.parity.lab import LAYERS, TOLERANCE, VISIBLE, both, cut, on_each_oracle
from tests.parity.torch_hooks import Hooked, Where
from tests.support import unspared

# (prompt, targets). Some queries have nothing left to attend to: the first token, and those whose
# window holds only what is cut.
CUTS = [
    (0, both(key=1, position=-1)),
    (1, both(key=(0, 2), position=slice(3, None), layer=1)),
    (2, both(key=slice(0, 3), head=1, layer=(0, 2))),
    (0, both(head=(0, 2), layer=3)),
    (1, both(key=0, position=0, layer=1)),
    (2, both(key=-2, position=(-1, -2), layer=(1, 3))),
    (0, both(key=slice(None), head=(1, 3), position=(2, -1), layer=-1)),
    (1, ({"key": jaxtc.Token(oracles.BOS, offset=1)}, {"key": 1})),
    (2, both(head=0, position=slice(2, None), layer=(0, 1))),
]


@on_each_oracle
def test_attention_knocked_out(name, labs):
    """As masked scores are: the hooks put the edges into the attention mask."""
    here = labs(name)
    edits = [jaxtc.KnockOut(row=row, **ours) for row, (_, (ours, _)) in enumerate(CUTS)]
    hooks = [
        Hooked("attn_pattern", None, Where(row=row, **theirs))
        for row, (_, (_, theirs)) in enumerate(CUTS)
    ]
    here.check_rows("KnockOut", [here.prompts[index] for index, _ in CUTS], edits, hooks)


# (source and changed prompt, fields, where position t comes from in a source of n tokens). The
# first three prompts differ in length; the fifth is as long as the second.
COPIES = [
    ((0, 1), {"position": -1}, lambda t, n: n - 1),
    ((1, 0), {"position": (2, -2)}, lambda t, n: t if t == 2 else n - 2),
    ((2, 0), {"position": (1, -1), "from_position": (3, 2)}, lambda t, n: 3 if t == 1 else 2),
    ((0, 2), {"from_position": -3}, lambda t, n: n - 3),
    ((1, 4), {"position": slice(1, 3)}, lambda t, n: t),
]


@pytest.mark.parametrize("site", ["resid_post", "attn_pattern"])
def test_copies_between_prompts_of_different_lengths(site, labs):
    """Positions from the end are counted in the prompt that they belong to."""
    here = labs("9b")
    prompts, edits, hooks = [], [], []
    for (source, into), fields, origin in COPIES:
        row = len(prompts) + 1
        prompts += [here.prompts[source], here.prompts[into]]
        n = len(here.prompts[source])
        edits.append(jaxtc.Copy(from_row=row - 1, site=site, layer=1, row=row, **fields))

        def change(_, position, row=row, origin=origin, n=n):
            return row - 1, min(origin(position, n), n - 1)

        where = Where(layer=1, row=row, position=fields.get("position"))
        hooks.append(Hooked(site, torch_edits.copy(change), where))
    rows = range(1, len(prompts), 2)
    here.check_rows("Copy between lengths", prompts, edits, hooks, rows)


# Edits that put a transcoder in place of the MLP on every token, so that no MLP is computed.
SPLICES = {
    "own layer": (lambda t: unspared.Splice(t), None),
    "some layers": (lambda t: unspared.Splice(t, layer=(0, -1)), (0, LAYERS - 1)),
    "all layers": (lambda t: unspared.Splice(dict.fromkeys(range(LAYERS), t)), range(LAYERS)),
    "of a mapping": (lambda t: unspared.Splice({0: t, 2: t, 3: t}, layer=(0, 2)), (0, 2)),
}


@pytest.mark.parametrize("case", SPLICES)
@on_each_oracle
def test_spliced(name, case, labs, make_oracle, transcoders_of):
    here = labs(name)
    ours, theirs = transcoders_of(make_oracle(name))
    edit, layers = SPLICES[case]
    where = Where(layer=ours.layer if layers is None else tuple(layers))
    hooks = [Hooked("mlp_out", torch_edits.splice(theirs), where)]
    here.check_rows("Splice", here.prompts[:3], [edit(ours)], hooks)


@on_each_oracle
def test_features(name, labs, make_oracle, transcoders_of):
    """Set, scaled and clamped, on the MLP's own output and on a spliced transcoder's."""
    here = labs(name)
    ours, theirs = transcoders_of(make_oracle(name))
    (f, g), peak = here.lively(theirs, ours.layer, 2)

    def of(index, change):
        return torch_edits.feature(theirs, index, change)

    doubled = [of(f, lambda a: 3.0 * a)]
    spliced, with_error = torch_edits.splice(theirs), torch_edits.splice(theirs, error=True)
    variants = [
        ([unspared.SetFeature], (f, 2 * peak), [of(f, lambda a: 2 * peak)]),
        (
            [unspared.SetFeature],
            ((f, g), (peak, 3 * peak)),
            [of(f, lambda a: peak), of(g, lambda a: 3 * peak)],
        ),
        ([unspared.ScaleFeature], (f, 3.0), doubled),
        ([unspared.ScaleFeature], ((f, g), 0.0), [of(i, lambda a: 0 * a) for i in (f, g)]),
        (
            [unspared.ClampFeature],
            (f, None, 0.2 * peak),
            [of(f, lambda a: a.clamp(max=0.2 * peak))],
        ),
        ([unspared.ClampFeature], (g, 0.7 * peak), [of(g, lambda a: a.clamp(min=0.7 * peak))]),
        (
            [unspared.ClampFeature],
            ((f, g), 0.4 * peak, 0.5 * peak),
            [of(i, lambda a: a.clamp(0.4 * peak, 0.5 * peak)) for i in (f, g)],
        ),
        ([unspared.Splice, unspared.SetFeature], (g, peak), [spliced, of(g, lambda a: peak)]),
        ([unspared.Splice, unspared.ScaleFeature], (f, 3.0), [spliced, *doubled]),
        ([unspared.Splice, True, unspared.ScaleFeature], (f, 3.0), [with_error, *doubled]),
        ([unspared.Splice], (), [spliced]),
    ]
    edits, hooks, prompts = [], [], []
    for row, (kinds, values, changes) in enumerate(variants):
        prompts.append(here.prompts[row % 3])
        # Elsewhere than where it was trained, and at some positions: data, both.
        layer = 1 if row % 4 == 3 else ours.layer
        fields = {"row": row, "layer": layer, "position": slice(1, None) if row % 2 else None}
        if kinds[0] is unspared.Splice:
            edits.append(unspared.Splice(ours, error=True in kinds, **fields))
        if kinds[-1] is not unspared.Splice:
            values = [np.array(v) if isinstance(v, tuple) else v for v in values]
            edits.append(kinds[-1](ours, *values, **fields))
        hooks += [Hooked("mlp_out", change, Where(**fields)) for change in changes]
    here.check_rows("edits of features", prompts, edits, hooks)


@on_each_oracle
def test_special_tokens_are_left_alone(name, labs, make_oracle, transcoders_of):
    """<bos> in front, <eos> inside: both keep their MLP, whatever the prompt is."""
    here = labs(name)
    ours, theirs = transcoders_of(make_oracle(name))
    config = here.ours.config
    (f,), n = here.lively(theirs, ours.layer, 1)[0][:1], 7
    text = [i for i in range(config.vocab_size) if i not in config.special_ids][5 : 5 + n]
    prompts = [[config.bos_token_id, *text[:3], *np.ravel(config.eos_token_id)[:1], *text[3:]]] * 4
    where = dict(layer=ours.layer, position=np.array([1, 2, 3, *range(5, len(prompts[0]))]))
    edits = [
        jaxtc.Splice(ours, row=0), jaxtc.SetFeature(ours, f, 4.0, row=1),
        jaxtc.ScaleFeature(ours, f, 3.0, row=2), jaxtc.ClampFeature(ours, f, 2.0, 3.0, row=3),
    ]  # fmt: skip
    changes = [
        torch_edits.splice(theirs),
        torch_edits.feature(theirs, f, lambda a: 0 * a + 4.0),
        torch_edits.feature(theirs, f, lambda a: 3.0 * a),
        torch_edits.feature(theirs, f, lambda a: a.clamp(2.0, 3.0)),
    ]
    hooks = [Hooked("mlp_out", c, Where(row=row, **where)) for row, c in enumerate(changes)]
    here.check_rows("edits that spare special tokens", prompts, edits, hooks)


@on_each_oracle
def test_error_keeps_the_value(name, labs, make_oracle, transcoders_of):
    """A splice with its error leaves the logits as they were, though the transcoder misses much."""
    here = labs(name)
    ours, theirs = transcoders_of(make_oracle(name))
    prompts = here.prompts[:3]
    result = jaxtc.run(here.ours, prompts, edits=[unspared.Splice(ours, error=True)])
    base = cut(here.hooked((), prompts), prompts)
    without = cut(
        here.hooked(
            [Hooked("mlp_out", torch_edits.splice(theirs), Where(layer=ours.layer))], prompts
        ),
        prompts,
    )
    assert reference.relative(without, base) > VISIBLE
    error = reference.relative(cut(result.logits, prompts), base)
    note("float32", "Splice with its error", error, name)
    assert error <= TOLERANCE

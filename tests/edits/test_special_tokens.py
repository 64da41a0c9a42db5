"""Edits of transcoders leave <bos>, what ends texts and padding alone, unless asked."""

import dataclasses

import jax
import numpy as np
import pytest

import jaxtc
from jaxtc import ClampFeature, Over, ScaleFeature, SetFeature, Splice, Token
from jaxtc.errors import EditError
from tests.support import tiny
from tests.support.batch import run

PROMPTS = [[2, 5, 7, 1, 9, 4], [2, 6, 4], [5, 6, 2, 7]]
SPECIAL = np.array([[1, 0, 0, 1, 0, 0], [1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]], bool)
REAL = np.arange(6) < np.array([[6], [3], [4]])
T = tiny.transcoder(1)
SITE = "layers.1.mlp_out"
EDITS = {
    "splice": lambda **o: Splice(T, **o),
    "splice a mapping": lambda **o: Splice({1: T, 2: tiny.transcoder(2)}, **o),
    "splice with its error": lambda **o: [Splice(T, error=True, **o), SetFeature(T, 3, 9.0, **o)],
    "set": lambda **o: SetFeature(T, [3, 9], 4.0, **o),
    "scale": lambda **o: ScaleFeature(T, list(range(50)), 3.0, **o),
    "clamp": lambda **o: ClampFeature(T, 7, 2.0, 3.0, **o),
    "an autoencoder": lambda **o: Splice(autoencoder(), **o),
    "of one range": lambda **o: Splice(T, position=slice(0, 4), **o),
    "of a mask": lambda **o: SetFeature(T, 3, 9.0, position=REAL, **o),
    "of rows": lambda **o: SetFeature(T, 3, 9.0, row=[0, 2], **o),
}


def autoencoder():
    made = tiny.transcoder(1)
    made.input_site = made.output_site = "mlp_out"
    return made


def value(*edits):
    return np.asarray(run(PROMPTS, edits=edits, capture=SITE).activations[SITE])


@pytest.mark.parametrize("name", EDITS)
def test_left_alone(name):
    """The site keeps its value at special tokens, and elsewhere has that of editing all tokens."""
    spared, every = EDITS[name](), EDITS[name](special_tokens=True)
    spared, every = (x if isinstance(x, list) else [x] for x in (spared, every))
    clean, found, whole = value(), value(*spared), value(*every)
    np.testing.assert_array_equal(found[SPECIAL], clean[SPECIAL])
    np.testing.assert_allclose(found[REAL & ~SPECIAL], whole[REAL & ~SPECIAL], 1e-5, 1e-5)
    assert np.abs(whole[SPECIAL] - clean[SPECIAL]).max() > 1e-2
    result = run(PROMPTS, edits=spared, logits="last")
    np.testing.assert_array_equal(result.left_out, SPECIAL)
    assert not run(PROMPTS, edits=every, logits="last").left_out.any()
    assert not run(PROMPTS, logits="last").left_out.any()


def test_generated_special_tokens_too():
    """The step that reads a generated <eos> or <bos> is left alone, as in a full pass."""
    model, edits = tiny.model(), [Splice(T), SetFeature(T, 3, 9.0)]
    # A large logit for <bos> makes it come up.
    push = [jaxtc.SetTo(50.0, site="logits_uncapped", coordinate=2, position=4)]
    found = jaxtc.generate(model, [2, 5, 7], 5, edits=[*edits, *push], capture=SITE, stop=())
    assert found.tokens[0][2] == 2
    again = jaxtc.run(model, [found.sequences[0][:-1]], edits=edits, capture=SITE)
    np.testing.assert_allclose(
        found.activations[SITE], again.activations[SITE], rtol=1e-5, atol=1e-5
    )
    np.testing.assert_array_equal(found.left_out, again.left_out)
    assert found.left_out[0].nonzero()[0].tolist() == [0, 5]


def test_swept():
    edits = [SetFeature(T, Over([3, 9]), Over([2.0, 5.0]), position=Over([1, 2]))]
    with pytest.raises(EditError, match="id 2 at position 2 of prompt 2"):
        jaxtc.sweep(tiny.model(), PROMPTS, [Splice(T), *edits])
    found = jaxtc.sweep(tiny.model(), PROMPTS[:2], [Splice(T), *edits])
    np.testing.assert_array_equal(found.left_out, SPECIAL[:2])
    one = [Splice(T), SetFeature(T, 9, 5.0, position=2)]
    single = run(PROMPTS[:2], edits=one, logits="last").logits
    np.testing.assert_allclose(found.values[1, 1, 1], single, rtol=1e-5, atol=1e-5)


REFUSED = {
    "one by one": (
        dict(position=0),
        "it names a special token, id 2 at position 0 of prompt 0.*special_tokens=True",
    ),
    "several": (
        dict(position=[1, 3], row=0),
        "it names a special token, id 1 at position 3 of prompt 0",
    ),
    "a token": (dict(position=Token(2)), "it names a special token, id 2 at"),
    "a range": (
        dict(position=slice(0, 1), row=1),
        "every token that it names is special, such as id 2",
    ),
    "a mask": (dict(position=SPECIAL), "every token"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_named_ones_are_refused(case):
    """What would never fire is an error; NaN where that is only known inside a trace."""
    where, message = REFUSED[case]
    edit = SetFeature(T, 3, 9.0, **where)
    with pytest.raises(EditError, match=message):
        run(PROMPTS, edits=[edit])
    run(PROMPTS, edits=[dataclasses.replace(edit, special_tokens=True)])
    traced = jax.jit(lambda edit: run(PROMPTS, edits=[edit], logits="last").logits)
    assert np.isnan(traced(edit)).all()


def test_prompts_of_special_tokens_only():
    with pytest.raises(EditError, match="every token that it names is special, such as id 2"):
        jaxtc.run(tiny.model(), [2], edits=[Splice(T)])
    # In a batch the others are edited.
    jaxtc.run(tiny.model(), [[2], [2, 5]], edits=[Splice(T)])
    # Generated tokens will be.
    jaxtc.generate(tiny.model(), [2], 3, edits=[Splice(T)], stop=())


def test_an_argument_of_another_kind():
    with pytest.raises(EditError, match="special_tokens is 1, expected True or False"):
        Splice(T, special_tokens=1)

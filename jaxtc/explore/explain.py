"""``explain``: what the MLPs of a model did with a prompt, in terms of transcoder features.

Axis letters: T tokens of the prompt, D hidden, M features, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtc.errors import InputError, JaxtcError, SiteError
from jaxtc.explore.explanation import (
    ActiveFeature,
    Explanation,
    LayerReport,
    TokenReport,
    feature_url,
)
from jaxtc.helpers import check_unicode, explicit_transfers, is_whole, whole_number
from jaxtc.model.gemma2 import Gemma2
from jaxtc.model.prompts import bucket, prepare
from jaxtc.model.text import tokenized
from jaxtc.programs.generate import generate
from jaxtc.programs.run import run
from jaxtc.tap.sites import BY_NAME, Address, check_layer, parse
from jaxtc.transcoders.cross_layer import CrossLayerTranscoder, LayerFeatures
from jaxtc.transcoders.encoder import Encoder
from jaxtc.transcoders.metrics import FVU, Mean, notebook_score, relative_error, special_token_mask
from jaxtc.transcoders.promoted import pieces_of, promoted_pieces
from jaxtc.transcoders.transcoder import Transcoder, nameless

#: The site the Gemma Scope tutorial notebook feeds its transcoder: what the MLP reads, with the
#: norm's gain. Gemma Scope's weights were trained on ``mlp_in_normed``.
NOTEBOOK_SITE = "mlp_in"

_CHUNK = 1024  # tokens encoded at once: bounds the dense (tokens, M) array


@explicit_transfers
def explain(
    model: Gemma2,
    tokenizer: Any,
    prompt: str,
    transcoders: Transcoder
    | Sequence[Transcoder]
    | Mapping[int, Transcoder]
    | CrossLayerTranscoder
    | Mapping[int, LayerFeatures],
    *,
    input_site: str | None = None,
    top_features: int = 5,
    promoted: int = 5,
    max_new_tokens: int = 2,
    progress: Callable[[str], None] = lambda step: None,
) -> Explanation:
    """Run a prompt once and report which transcoder features each token's MLP output is made of.

    Args:
        model: from :func:`jaxtc.load_model`.
        tokenizer: the model's, from :func:`jaxtc.load_tokenizer`.
        prompt: text; the tokenizer puts <bos> in front.
        transcoders: one, several, or a mapping by layer. A mapping is read one layer at a time, so
            it may load them lazily. Or a cross-layer one: a layer's figures are those of the sum
            that its own and all earlier layers' features write there. Of that, too, a mapping of
            layers to their features, from 0 on, is read one layer at a time.
        input_site: what to feed instead of each transcoder's own input site; ``"mlp_in"`` is what
            the Gemma Scope tutorial feeds.
        top_features: how many features to report for each token, at most M.
        promoted: how many tokens to report for each feature.
        max_new_tokens: length of the continuation; 0 for none.
        progress: called with a few words at each long step.

    Raises:
        InputError: a prompt that is empty, not Unicode, or longer than the model's context; a count
            out of range.
        JaxtcError: a transcoder of another model (its D differs), or one without a layer; NaN or
            infinity in what the model or a transcoder computes (float16 overflows easily).
        SiteError: no such site or layer.
    """
    config = model.config
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError(
            "The prompt is empty. Give some text, for example "
            "'The capital of the state containing Dallas is'."
        )
    check_unicode("The prompt", prompt)
    counts = {"top_features": top_features, "promoted": promoted, "max_new_tokens": max_new_tokens}
    for name, count in counts.items():
        whole_number(name, count)
    transcoders = _by_layer(transcoders, config.num_hidden_layers)
    ids, warnings = tokenized(tokenizer, prompt, config.bos_token_id)
    prepare(ids, config, extra=max_new_tokens)  # refuses a long prompt before any long work

    # A mapping may load on demand, so the sites of its first transcoder stand for all.
    layers = sorted(transcoders)
    first = transcoders[layers[0]]
    fed = input_site and _input_site(input_site)
    sites = sorted({fed or first.input_site, first.output_site, NOTEBOOK_SITE})
    progress("Running the model")
    capture = [Address(site, layer) for layer in layers for site in sites]
    activations = run(model, ids, capture=capture, logits=None).activations
    for address in capture:
        _check_finite(activations[address], f"What the model has at {address}", model.dtype)
    # The model's, as edits and metrics have them, and the tokenizer's where it has others.
    of_tokenizer = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    special = {*config.special_ids, *of_tokenizer}
    pieces, masked = pieces_of(tokenizer, ids), special_token_mask(ids, special)
    reports, written = [], _Written()
    for layer in layers:
        progress(f"Explaining layer {layer}")
        transcoder = first if layer == layers[0] else transcoders[layer]
        site = fed or transcoder.input_site
        if not {site, transcoder.output_site} <= {*sites}:
            raise JaxtcError(
                f"The transcoder of layer {layer} reads {transcoder.input_site} and writes "
                f"{transcoder.output_site}, but that of layer {layers[0]} reads "
                f"{first.input_site} and writes {first.output_site}; explain one kind at a time."
            )
        _check_fit(transcoder, layer, site, model)
        if top_features > transcoder.features:
            raise InputError(
                f"top_features is {top_features}, but the transcoder of layer {layer} has "
                f"{transcoder.features} features."
            )
        read = {name: BY_NAME[name].join(activations[Address(name, layer)][0]) for name in sites}
        figures, got = _measure(transcoder, layer, site, read, ~masked, top_features, written)
        names = promoted_pieces(model, tokenizer, transcoder, got, promoted)
        features = [
            tuple(
                ActiveFeature(f, v, names[f], feature_url(transcoder.source, f))
                for f, v in zip(*pair, strict=True)
                if v > 0
            )
            for pair in zip(got["ids"].tolist(), got["values"].tolist(), strict=True)
        ]
        numbers = (got[name].tolist() for name in ("l0", "above_one", "relative_error"))
        columns = ids, pieces, masked.tolist(), *numbers, features
        rows = zip(range(len(ids)), *columns, strict=True)
        reports.append(LayerReport(**figures, tokens=tuple(TokenReport(*row) for row in rows)))

    new: list[int] = []
    if max_new_tokens:
        progress("Continuing the prompt")
        new = generate(model, ids, max_new_tokens).tokens[0]
    return Explanation(
        prompt=prompt,
        ids=tuple(ids),
        tokens=pieces,
        layers=tuple(reports),
        continuation=continuation(tokenizer, ids, new),
        continuation_ids=tuple(new),
        warnings=tuple(warnings),
    )


def _by_layer(given: Any, layers: int) -> Mapping[int, Encoder]:
    """Transcoders by layer; those of a mapping are not loaded yet."""
    if isinstance(given, CrossLayerTranscoder):
        given = given.layers
    if not isinstance(given, Mapping):
        several = [given] if isinstance(given, Encoder) else list(given)
        for one in several:
            if isinstance(one, Transcoder) and not BY_NAME[one.input_site].per_layer:
                raise JaxtcError(
                    f"The autoencoder from {one.source or 'memory'} is of {one.input_site!r}, "
                    "which the model has once; explain reports on layers. Its features on a "
                    "prompt: jaxtc.run(model, ids, capture=[jaxtc.reducers.Features("
                    "transcoder=..., capacity=...)])."
                )
        given = {one.layer: one for one in several}
        if None in given:
            raise JaxtcError(
                f"The transcoder from {given[None].source or 'memory'} does not know its layer; "
                "give a mapping such as {20: transcoder}."
            )
        if len(given) < len(several):
            named = ", ".join(str(one.layer) for one in several)
            raise JaxtcError(f"Two transcoders are for one layer ({named}); explain one at a time.")
    if not given:
        raise JaxtcError("No transcoder was given; explain needs at least one.")
    for layer in given:
        if not is_whole(layer, -math.inf):
            raise JaxtcError(
                f"A transcoder is under the key {layer!r}; keys are layers, whole numbers from 0: "
                "{20: transcoder}."
            )
        if check_layer(layer, layers, "A transcoder") != layer:
            raise SiteError(f"A transcoder is for layer {layer}; count layers from 0 here.")
    return given


def _check_finite(x: Any, what: str, dtype: Any) -> None:
    """Refuse overflow: comparisons with NaN are false, so L0 would be 0."""
    if np.isfinite(np.asarray(x)).all():
        return
    name = np.dtype(dtype).name
    wider = {"float16": "'float32' or 'bfloat16'", "bfloat16": "'float32'"}.get(name)
    remedy = wider and (
        f"{name} may be too narrow for it: load it with dtype={wider} (--dtype, for the model, on "
        "the command line)."
    )
    raise JaxtcError(
        f"{what} is NaN or infinite somewhere on this prompt, so its figures would mean nothing. "
        f"It was computed in {name}. {remedy or 'The weights are broken; load others.'}"
    )


def _input_site(name: str) -> str:
    site, layer = parse(name)
    if layer is not None:
        raise SiteError(f"input_site is {name!r}; leave the layer out: {site!r}.")
    if not BY_NAME[site].per_layer:
        raise SiteError(f"input_site is {name!r}, which the model has once; layers have mlp_in.")
    return site


def _check_fit(transcoder: Encoder, layer: int, site: str, model: Gemma2) -> None:
    """Refuse a transcoder whose widths are not those of the sites it reads and writes."""
    ends = {site: transcoder.d_in, transcoder.output_site: transcoder.d_out}
    for name, width in ends.items():
        size = BY_NAME[name].width(model.config.sizes)
        if size != width:
            axes = "·".join(BY_NAME[name].token_axes)
            holds = f"{axes}={size}" if size else f"no vector for each token ({BY_NAME[name].axes})"
            raise JaxtcError(
                f"The transcoder of layer {layer} ({transcoder.source or 'in memory'}) has width "
                f"D={width} at {name}, where this model has {holds}. It belongs to another model; "
                "give one that was trained on this model."
            )


def continuation(tokenizer: Any, ids: list[int], new: list[int]) -> str:
    """The text of ``new`` tokens after ``ids``, with the space that decoding them alone loses."""
    if None in tokenizer.convert_ids_to_tokens(new):  # decoding leaves them out
        return "".join(pieces_of(tokenizer, new)).replace("▁", " ")
    before = tokenizer.decode(ids, skip_special_tokens=True)
    after = tokenizer.decode([*ids, *new], skip_special_tokens=True)
    return after[len(before) :] if after.startswith(before) else tokenizer.decode(new)


@functools.partial(jax.jit, static_argnames=("top", "chunk"))
def _encode(transcoder: Encoder, x: jax.Array, top: int, chunk: int) -> dict[str, jax.Array]:
    def one(x):
        a = transcoder.encode(x)
        values, ids = jax.lax.top_k(a, top)
        counts = {"l0": (a > 0).sum(), "above_one": (a > 1).sum()}
        cross = isinstance(transcoder, LayerFeatures)
        y = jnp.moveaxis(transcoder.write_all(a), 0, -2) if cross else transcoder.decode(a, x)
        return {"values": values, "ids": ids, "y": y, **counts}

    return jax.lax.map(one, x, batch_size=chunk)


class _Written:
    """What a cross-layer transcoder's features write at each layer, added up layer by layer."""

    def __init__(self):
        self.layers, self.sums = 0, {}

    def add(self, features: LayerFeatures, layer: int, parts: np.ndarray, x: Any) -> np.ndarray:
        """(T, D) the reconstruction at this layer, once this one's ``parts`` (T, W, D) are added.

        ``x`` (T, D) is what it reads. Raises JaxtcError when earlier layers were left out.
        """
        if not layer == features.layer == self.layers:
            raise JaxtcError(
                f"The reconstruction at layer {layer} is made of the features of layers 0 to "
                f"{layer} of a cross-layer transcoder, and layer {self.layers} was not given. Give "
                "the whole: jaxtc.load_transcoders(folder)."
            )
        self.layers += 1
        for part, at in zip(np.moveaxis(parts, 1, 0), features.writes, strict=True):
            self.sums[at] = self.sums.get(at, 0) + part
        return np.asarray(features.finish(self.sums.pop(layer), x))


def _encoded(transcoder: Encoder, x: jax.Array, top: int) -> dict[str, np.ndarray]:
    """Strongest features, counts and reconstruction of (T, D) inputs, as (T, ...) on the host.

    In the place of the reconstruction, what one layer of a cross-layer transcoder writes at each.

    Padded, and without layer and source: few compiled programs serve all prompts and all layers.
    """
    T = len(x)
    padded = np.pad(np.asarray(x, np.float32), ((0, bucket(T) - T), (0, 0)))
    found = _encode(nameless(transcoder), padded, top, _CHUNK)
    return {name: np.asarray(value)[:T] for name, value in found.items()}


def _measure(
    transcoder: Encoder,
    layer: int,
    site: str,
    read: Mapping[str, Any],
    keep: np.ndarray,
    top: int,
    written: _Written,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Fields of a :class:`LayerReport`, from activations by site, and those of its tokens."""
    got, cross = _encoded(transcoder, read[site], top), isinstance(transcoder, LayerFeatures)
    if cross:
        got["y"] = written.add(transcoder, layer, got["y"], read[site])
    _check_finite(
        got["y"], f"What the transcoder of layer {layer} computes", transcoder.W_dec.dtype
    )
    target = read[transcoder.output_site]
    got["relative_error"] = relative_error(target, got["y"])
    fvu = FVU().update(target, got["y"], keep)
    score = math.nan
    imitates = transcoder.output_site == "mlp_out" and transcoder.input_site != "mlp_out"
    if imitates and not cross and transcoder.d_in == read[NOTEBOOK_SITE].shape[-1]:
        score = notebook_score(target, _encoded(transcoder, read[NOTEBOOK_SITE], top)["y"])
    figures = {
        "layer": layer,
        "transcoder": transcoder.source,
        "width": transcoder.features,
        "input_site": site,
        "output_site": transcoder.output_site,
        "fvu": fvu.fvu,
        "explained_variance": fvu.explained_variance,
        "notebook_score": score,
        **{name: Mean().update(got[name], keep).mean for name in ("l0", "relative_error")},
    }
    return figures, got

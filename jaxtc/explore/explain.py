"""``explain``: what the MLPs of a model did with a prompt, in terms of transcoder features.

Axis letters: T tokens of the prompt, D hidden, M features, V vocabulary.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxtc.errors import InputError, JaxtcError, SiteError
from jaxtc.explore.explanation import (
    ActiveFeature,
    Explanation,
    LayerReport,
    TokenReport,
    feature_url,
)
from jaxtc.explore.measure import NOTEBOOK_SITE, Written, check_finite, measure
from jaxtc.helpers import check_unicode, explicit_transfers, is_whole, whole_number
from jaxtc.model.gemma2 import Gemma2
from jaxtc.model.prompts import prepare
from jaxtc.model.text import tokenized
from jaxtc.programs.generate import generate
from jaxtc.programs.run import run
from jaxtc.tap.sites import BY_NAME, Address, check_layer, parse
from jaxtc.transcoders.cross_layer import CrossLayerTranscoder, LayerFeatures
from jaxtc.transcoders.encoder import Encoder
from jaxtc.transcoders.metrics import special_token_mask
from jaxtc.transcoders.promoted import pieces_of, promoted_pieces
from jaxtc.transcoders.transcoder import Transcoder


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
        check_finite(activations[address], f"What the model has at {address}", model.dtype)
    # The model's, as edits and metrics have them, and the tokenizer's where it has others.
    of_tokenizer = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    special = {*config.special_ids, *of_tokenizer}
    pieces, masked = pieces_of(tokenizer, ids), special_token_mask(ids, special)
    reports, written = [], Written()
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
        figures, got = measure(transcoder, layer, site, read, ~masked, top_features, written)
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

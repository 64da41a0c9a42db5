"""Edits of transcoders that spare no token, for expectations that know of no special ones."""

import functools

import jaxtc

Splice, SetFeature, ScaleFeature, ClampFeature = (
    functools.partial(kind, special_tokens=True)
    for kind in (jaxtc.Splice, jaxtc.SetFeature, jaxtc.ScaleFeature, jaxtc.ClampFeature)
)

"""Links to Neuronpedia's pages about features of Gemma Scope's transcoders."""

from jaxtc.weights.files.layout import GEMMA_SCOPE_2B, PARAMS, tiers_of


def feature_url(source: str, feature: int | str) -> str | None:
    """The page of a feature, or None when Neuronpedia has none.

    Args:
        source: the transcoder's :attr:`~jaxtc.Transcoder.source`. Pages exist for those of
            ``google/gemma-scope-2b-pt-transcoders``, 16k wide, at each layer's default L0; the
            denser tiers have none.
        feature: its index.
    """
    repo, slash, place = source.partition(GEMMA_SCOPE_2B + "/")
    tiers = [] if repo or not slash else tiers_of([f"{place}/{PARAMS}"])
    if not tiers or not tiers[0].is_default:
        return None
    layer = tiers[0].layer
    return f"https://www.neuronpedia.org/gemma-2-2b/{layer}-gemmascope-transcoder-16k/{feature}"

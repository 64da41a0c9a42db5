"""``certify``: the reference in a process of its own, then our model, then the comparison."""

import contextlib
import dataclasses
import datetime
import functools
import logging
import operator
import platform
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from jaxtc.errors import CapacityError, InputError, SourceError, WeightsError
from jaxtc.helpers import JAXTC_VERSION, whole_number
from jaxtc.model.config import Gemma2Config
from jaxtc.model.gemma2 import Gemma2
from jaxtc.parity import compare, job, verdict
from jaxtc.parity.certificate import Certificate, Prompt
from jaxtc.parity.compare import Features
from jaxtc.parity.job import Job
from jaxtc.parity.ours import Comparison, captured
from jaxtc.parity.texts import prompts_of
from jaxtc.parity.tolerances import tolerances
from jaxtc.programs.generate import generate
from jaxtc.tap.sites import check_layer
from jaxtc.weights.files.formats import SITES
from jaxtc.weights.files.layout import TRANSCODER_SITES
from jaxtc.weights.files.model import Checkpoint, open_checkpoint
from jaxtc.weights.files.transcoder import open_transcoder
from jaxtc.weights.load_model import load_model, load_tokenizer
from jaxtc.weights.load_transcoder import load_transcoder
from jaxtc.weights.names import HEAD
from jaxtc.weights.sources.cross_layer import refuse_cross_layer
from jaxtc.weights.sources.resolve import (
    ADAPTER,
    CONVERTED,
    EMBEDDED,
    GOOGLE,
    MODEL,
    TRANSCODERS,
    resolve,
)

# What the certificate's transcoders read and write.
_SITES = dict(zip(SITES, TRANSCODER_SITES, strict=True))


def certify(
    model: str | Path = EMBEDDED,
    *,
    prompts: Sequence[Any] | None = None,
    transcoder: str | Path | None = None,
    transcoder_layer: int | None = None,
    dtype: str = "float32",
    layers: Iterable[int] | None = None,
    truth: bool = False,
    new_tokens: int = 16,
    progress: Callable[[str], None] = lambda step: None,
    load: Callable[..., Gemma2] = load_model,
) -> Certificate:
    """Compare jaxtc with ``transformers``' PyTorch model, on the same weights and tokens.

    The two run one after the other, so that one of them is in memory at a time. The reference's
    activations wait in a private temporary folder, as float32 and, for ``truth``, float64, which
    must have room for them (2B: 10 MB a token).

    Args:
        model: a hub id, a local folder, or ``"embedded"``.
        prompts: texts, or rows of token ids; built-in sentences by default.
        transcoder: also compare the features of this source, as in
            :func:`jaxtc.load_transcoder`.
        transcoder_layer: whose MLP it imitates, where the source does not say.
        dtype: of both models' weights: "float32" or "bfloat16".
        layers: whose sites to compare; all by default.
        truth: also run the reference in float64, with the weights as ``dtype`` rounds them.
        new_tokens: greedy tokens to compare after each prompt.
        progress: called with a few words at each step.
        load: loads our model, as ``load(folder, dtype=dtype)``.

    Raises:
        SourceError, ConfigError, WeightsError: of the model or the transcoder.
        InputError: an option out of range, or prompts the model cannot run.
        SiteError: a layer the model lacks.
        CapacityError: prompts too long for the memory there is, or for the temporary folder.
        JaxtcError: PyTorch is not installed, or its process failed.
    """
    job.need_torch()
    if dtype not in ("float32", "bfloat16"):
        raise InputError(f"dtype is {dtype!r}, expected 'float32' or 'bfloat16'.")
    whole_number("new_tokens", new_tokens)
    progress(f"Looking for {model}")
    found = resolve(model, MODEL).fetched()
    kinds = {ADAPTER: "an adapter", GOOGLE: "Google's tree", CONVERTED: "a converted checkpoint"}
    if found.format in kinds:
        raise SourceError(
            f"{model} is {kinds[found.format]}, which transformers does not read. Compare the "
            f"checkpoint that it was made from, or `jaxtc convert {model} OUT --to safetensors` "
            "first, then `jaxtc parity OUT`."
        )
    folder = found.path
    with open_checkpoint(folder) as opened:
        config = opened.config
        _check_readable(opened)
    count = config.num_hidden_layers
    chosen = _layers(layers, count)
    limits = tolerances(dtype, count)
    file, of_layer = _transcoder(transcoder, transcoder_layer, config)
    if of_layer is not None:
        chosen = sorted({*chosen, of_layer})
    tokenizer = functools.cache(functools.partial(load_tokenizer, model))
    texts, ids, odd = prompts_of(prompts, model, config, tokenizer, new_tokens)
    # mkdtemp makes it private (mode 0700).
    with tempfile.TemporaryDirectory(prefix="jaxtc-parity-") as root:
        _check_room(Path(root), config, ids, chosen, truth)
        work = Job(
            name=dtype, root=root, model=str(folder.resolve()), dtype=dtype, truth=False,
            prompts=ids, layers=chosen, new_tokens=new_tokens, transcoder=file and str(file),
            transcoder_layer=of_layer, cpu=jax.config.jax_platforms == "cpu",
        )  # fmt: skip
        reports = {"theirs": job.run(work, progress)}
        changes = {"name": "float64", "truth": True, "new_tokens": 0, "transcoder": None}
        exact = dataclasses.replace(work, **changes) if truth else None
        if exact:
            reports["truth"] = job.run(exact, progress)
        began = time.monotonic()
        progress(f"Loading {model} into JAX")
        ours = load(folder, dtype=dtype)
        features = None
        if file:
            reference = load_transcoder(file, of_layer, **_SITES)
            features = Features(reference, limits, config.special_ids)
        side = Comparison(ours, work, exact, limits, features)
        new = [[] for _ in ids]
        with contextlib.ExitStack() as quietly:
            # No advice against compiling for each length: that is meant for users' own loops.
            log = logging.getLogger("jaxtc")
            quietly.callback(log.setLevel, log.level)
            log.setLevel(logging.ERROR)
            for index in range(len(ids)):
                progress(f"JAX, {dtype}: prompt {index + 1} of {len(ids)}")
                side.prompt(index)
            if new_tokens:
                progress("JAX: generating")
                new = [generate(ours, row, new_tokens, stop=()).tokens[0] for row in ids]
    seconds = {name: report["seconds"] for name, report in reports.items()}
    seconds["ours"] = time.monotonic() - began
    text = tokenizer() if any(text is not None for text in texts) else None
    held = [Prompt(text, len(row)) for text, row in zip(texts, ids, strict=True)]
    rows, truths, logits = side.rows(), side.truth_rows(), side.predictions.result()
    continued = compare.generation(new, reports["theirs"]["prompts"], text)
    compared = features and features.result(str(transcoder), of_layer)
    untested = features is not None and compared is None
    failures = [
        *verdict.of_sites(rows), *verdict.of_truth(truths, limits),
        *verdict.of_logits(logits, limits), *verdict.of_generation(continued, limits),
        *verdict.of_transcoder(compared),
    ]  # fmt: skip
    return Certificate(
        passed=not failures,
        failures=failures,
        notes=[*odd, *verdict.notes(config, held, chosen, limits, untested)],
        first_jump=verdict.first(rows),
        model=str(model),
        dtype=dtype,
        layers=chosen,
        config=config.to_dict(),
        prompts=held,
        sites=rows,
        logits=logits,
        generation=continued,
        transcoder=compared,
        truth=truths,
        tolerances=dataclasses.asdict(limits),
        versions={
            "jaxtc": JAXTC_VERSION,
            **{name: version(name) for name in ("jax", "flax", "numpy")},
            **reports["theirs"]["versions"],
            "python": platform.python_version(),
        },
        machine={
            "platform": platform.platform(),
            "ours": jax.local_devices()[0].device_kind,
            "theirs": reports["theirs"]["device"],
        },
        seconds=seconds,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    )


def _check_readable(opened: Checkpoint) -> None:
    """Refuse names of tensors that transformers would not find, and leave random, in silence."""
    odd = [
        name for hf, name in opened.stored.items() if name not in (hf, hf.removeprefix("model."))
    ]
    if set(odd) - {HEAD}:
        raise WeightsError(
            f"transformers does not find the weights in {opened.folder} under names such as "
            f"{odd[0]}, so there is nothing to compare with. Write them under the usual names "
            "first: `jaxtc convert --to safetensors`."
        )


def _layers(asked: Iterable[int] | None, count: int) -> list[int]:
    """Indices from 0, in order."""
    asked = range(count) if asked is None else asked
    try:
        found = sorted({check_layer(operator.index(one), count, "layers") for one in asked})
    except TypeError as error:
        raise InputError(f"layers is {asked!r}, expected whole numbers such as [0, 5].") from error
    if not found:
        raise InputError("layers is empty; leave it out to compare those of all layers.")
    return found


def _check_room(
    root: Path, config: Gemma2Config, prompts: list[list[int]], layers: list[int], truth: bool
) -> None:
    """Refuse what the temporary folder has no room for."""
    need = sum(
        len(layers) * captured(config, len(row)) + captured(config, len(row), per_layer=False)
        for row in prompts
    )
    need, free = need * (3 if truth else 1), shutil.disk_usage(root).free
    if need > free:
        raise CapacityError(
            f"What the reference computes for these prompts takes {need / 1e9:.1f} GB until it is "
            f"compared, and {root.parent} has {free / 1e9:.1f} GB left. Set TMPDIR to a folder "
            "with more room, or give fewer or shorter prompts or fewer layers."
        )


def _transcoder(
    source: str | Path | None, layer: int | None, config: Gemma2Config
) -> tuple[Path | None, int | None]:
    """The file and the layer of the transcoder that was asked for."""
    if source is None:
        if layer is not None:
            raise InputError("A transcoder's layer was given, but no transcoder; name one too.")
        return None, None
    found = resolve(source, TRANSCODERS)
    refuse_cross_layer(found)
    if layer is None:
        there = found.layers()
        if len(there) > 1:
            raise InputError(
                f"{source} has transcoders for layers {', '.join(map(str, there))}; say which "
                f"with --transcoder-layer {there[0]} (transcoder_layer={there[0]})."
            )
        [layer] = there
    layer = check_layer(layer, config.num_hidden_layers, "the transcoder")
    file = found.one(layer).file
    with open_transcoder(file) as opened:
        told = opened.sites
        other = {key: site for key, site in told.items() if site != _SITES[key]}
        if other or opened.format.name != "gemma-scope":
            kind = f"of the format {opened.format.name!r}"
            if other:
                sae = len(set(told.values())) == 1
                kind = (
                    f"an autoencoder of {told['input_site']}"
                    if sae
                    else f"of other sites ({other})"
                )
            raise InputError(
                f"{file} is {kind}; the certificate compares Gemma Scope's transcoders "
                "(params.npz), which read mlp_in_normed and write mlp_out."
            )
        widths = opened.shapes["W_enc"][0], opened.shapes["W_dec"][1]
    if widths != (config.hidden_size,) * 2:
        raise InputError(
            f"The transcoder {source} reads and writes {widths[0]} and {widths[1]} numbers a "
            f"token, but this model's D is {config.hidden_size}: it belongs to another model."
        )
    return file, layer

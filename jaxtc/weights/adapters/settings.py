"""``adapter_config.json``: what PEFT does with an adapter's tensors, or why we do not."""

import dataclasses
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import regex

from jaxtc.errors import WeightsError, did_you_mean, some
from jaxtc.helpers import is_whole
from jaxtc.weights.files.settings import read_json

SETTINGS = "adapter_config.json"
#: What PEFT takes for every linear layer but the output matrix.
ALL_LINEAR = "all-linear"

# Patterns are regular expressions from a file: a match that takes longer (seconds) is refused.
_PATIENCE = 0.5
_LONGEST = 10_000

# Kinds that change no weights: nothing can be merged.
_PROMPTS = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT",
    "CPT", "CARTRIDGE",
)  # fmt: skip

# Keys of a LoraConfig that change nothing in what is merged into a Gemma-2: those of training, and
# `bias` and `fan_in_fan_out`, as its layers have no biases and are no Conv1D.
_INERT = {
    "peft_type", "task_type", "peft_version", "auto_mapping", "inference_mode", "lora_dropout",
    "runtime_config", "megatron_core", "bias", "fan_in_fan_out", "loftq_config", "eva_config",
    "corda_config", "lora_ga_config", "qalora_group_size", "ensure_weight_tying",
}  # fmt: skip
# Ways to start the training that leave the base model as it is; others take something off it,
# which PEFT works out again from the base model when it loads the adapter.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_TASKS = (None, "CAUSAL_LM", "FEATURE_EXTRACTION")
# What a Gemma-2 is that PEFT chooses when no target is named.
_DEFAULT_TARGETS = ("q_proj", "v_proj")


@dataclasses.dataclass(frozen=True)
class LoraSettings:
    """A LoRA, as its ``adapter_config.json`` says. Modules are named as in the model that PEFT
    wrapped: ``model.layers.0.self_attn.q_proj``. Patterns match as PEFT has it.

    Raises nothing; :meth:`read` does.
    """

    path: Path
    base: str | None  # base_model_name_or_path
    revision: str | None  # of the base
    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rslora: bool
    dora: bool
    targets: tuple[str, ...] | str
    excluded: tuple[str, ...] | str
    saved: tuple[str, ...]  # modules_to_save
    layers: tuple[int, ...]
    layers_pattern: tuple[str, ...]
    tokens: Mapping[str, tuple[int, ...]]  # trainable_token_indices, by module

    @classmethod
    def read(cls, folder: Path, ignore: Sequence[str] = ()) -> "LoraSettings":
        """Of an adapter's folder; with ``ignore``, tensors to leave out, its head may be one.

        Raises:
            WeightsError: not PEFT's file; another kind of adapter, or a setting that is not merged
                here, each named, with the lines that merge it in PEFT.
        """
        path = folder / SETTINGS
        raw = read_json(path).whole
        kind = raw.get("peft_type")
        if kind is None and ("lora_parameters" in raw or "fine_tune_type" in raw):
            raise WeightsError(
                f"{folder} is an adapter of MLX, which jaxtc does not merge. Fuse it into its base "
                "model first, with `mlx_lm.fuse`, and load what that writes."
            )
        base = _known(path, "base_model_name_or_path", raw, (str, type(None)))
        if kind != "LORA":
            raise WeightsError(f"{folder} is {_other(kind)} {_merge_lines(folder, base, kind)}")
        if raw.get("task_type") not in _TASKS and not ignore:
            raise WeightsError(
                f"{folder} is a LoRA for the task {_short(raw['task_type'])}: it was trained with "
                "a head of its own, which jaxtc does not run. To have the Gemma-2 without that "
                "head: load_model(..., ignore='score.*'), or what its tensors are called."
            )
        fields = _Fields(path, raw)
        made = cls(
            path, base, _known(path, "revision", raw, (str, type(None))),
            fields.whole("r", 8, 1), fields.number("lora_alpha", 8),
            fields.patterns("rank_pattern", lambda v: is_whole(v, 1)),
            fields.patterns("alpha_pattern", _is_number),
            fields.flag("use_rslora"), fields.flag("use_dora"),
            fields.names("target_modules", _DEFAULT_TARGETS), fields.names("exclude_modules"),
            fields.listed("modules_to_save"), fields.layers("layers_to_transform"),
            fields.listed("layers_pattern"), fields.tokens("trainable_token_indices"),
        )  # fmt: skip
        start = raw.get("init_lora_weights", True)
        if start not in _STARTS:
            fields.others["init_lora_weights"] = start
        if fields.others:
            asked = [f"{key} = {_short(value)}" for key, value in fields.others.items()]
            raise WeightsError(
                f"{path} asks for {some(asked)}, which jaxtc does not merge; leaving it out would "
                f"give wrong numbers. {_merge_lines(folder, base)}"
            )
        return made

    def scale(self, module: str) -> float:
        """What B @ A is multiplied by: α / r, of rank-stabilised LoRA α / √r (2312.03732)."""
        rank = self.rank_of(module)
        alpha = self.alpha_pattern.get(self._pattern(self.alpha_pattern, module), self.alpha)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def rank_of(self, module: str) -> int:
        """r of a module."""
        return self.rank_pattern.get(self._pattern(self.rank_pattern, module), self.rank)

    def saves(self, module: str) -> bool:
        """Whether a whole module of this name is stored."""
        return any(module == one or module.endswith(f".{one}") for one in self.saved)

    def targeted(self, module: str) -> bool:
        """Whether PEFT puts a LoRA around this module."""
        excluded, targets = self.excluded, self.targets
        if isinstance(excluded, str):
            if excluded and self._match(excluded, module):
                return False
        elif _ends(module, excluded):
            return False
        if any(self._match(rf"(.*\.)?({one})(\..*)?", module) for one in self.saved):
            return False
        if isinstance(targets, str):
            if targets.lower() == ALL_LINEAR:
                return not module.endswith(("embed_tokens", "lm_head"))
            return self._match(targets, module)
        if module in targets:
            return True
        return _ends(module, targets) and self._transformed(module)

    def _transformed(self, module: str) -> bool:
        """Whether layers_to_transform takes the layer that the module is in."""
        if not self.layers:
            return True
        if self.layers_pattern:
            patterns = [rf"(?:^|.*?\.){one}\.(?P<layer>\d+)\..*" for one in self.layers_pattern]
        else:
            patterns = [r".*?\.[^.]*\.(?P<layer>\d+)\..*"]
        for pattern in patterns:
            if found := self._match(pattern, module):
                return int(found["layer"]) in self.layers
        return False

    def _pattern(self, patterns: Iterable[str], module: str) -> str:
        """The first of the patterns that the end of a module's name matches, or "" for none."""
        return next((one for one in patterns if self._match(rf"(.*\.)?({one})", module)), "")

    def _match(self, pattern: str, text: str) -> Any:
        try:
            if len(pattern) > _LONGEST:
                raise TimeoutError
            return regex.fullmatch(pattern, text, timeout=_PATIENCE)
        except (regex.error, TimeoutError, RecursionError, MemoryError, OverflowError) as error:
            why = f"is no regular expression ({error})"
            if isinstance(error, TimeoutError):
                why = "takes too long to match, or is too long"
            raise WeightsError(
                f"{self.path}: the pattern {_short(pattern)} {why}. Do not use this adapter unless "
                "you know where it comes from; name its modules in a list instead."
            ) from error


def _ends(module: str, names: Iterable[str]) -> bool:
    return any(module == name or module.endswith(f".{name}") for name in names)


def _is_number(value: Any) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


class _Fields:
    """The fields of a config, each checked when it is taken; ``others`` are those that ask for
    something that is neither known nor off."""

    def __init__(self, path: Path, raw: dict[str, Any]):
        self.path, self.raw = path, raw
        known = _KNOWN | _INERT
        self.others = {key: value for key, value in raw.items() if value and key not in known}

    def _wrong(self, key: str, expected: str) -> WeightsError:
        return WeightsError(
            f"{self.path}: {key} is {_short(self.raw[key])}, expected {expected}. It was damaged "
            "or changed by hand; fetch the adapter again."
        )

    def _take(self, key: str, default: Any) -> Any:
        value = self.raw.get(key)
        return default if value is None else value

    def whole(self, key: str, default: int, least: int) -> int:
        """A whole number."""
        if not is_whole(found := self._take(key, default), least):
            raise self._wrong(key, f"a whole number of at least {least}")
        return found

    def number(self, key: str, default: float) -> float:
        """A finite number."""
        if not _is_number(found := self._take(key, default)):
            raise self._wrong(key, "a finite number")
        return found

    def flag(self, key: str) -> bool:
        """True or false."""
        if not isinstance(found := self._take(key, False), bool):
            raise self._wrong(key, "true or false")
        return found

    def names(self, key: str, default: tuple[str, ...] = ()) -> tuple[str, ...] | str:
        """A list of names, or one regular expression."""
        found = self._take(key, default)
        return found if isinstance(found, str) else self.listed(key, default)

    def listed(self, key: str, default: tuple[str, ...] = ()) -> tuple[str, ...]:
        """A list of names; one alone stands for a list of it."""
        found = self._take(key, default)
        found = [found] if isinstance(found, str) else found
        if not isinstance(found, list | tuple) or not all(isinstance(x, str) for x in found):
            raise self._wrong(key, "names of modules")
        return tuple(found)

    def layers(self, key: str) -> tuple[int, ...]:
        """Numbers of layers."""
        found = self._take(key, [])
        found = [found] if is_whole(found, 0) else found
        if not isinstance(found, list) or not all(is_whole(one, 0) for one in found):
            raise self._wrong(key, "numbers of layers")
        return tuple(found)

    def patterns(self, key: str, fits: Any) -> dict[str, Any]:
        """Values by patterns of modules' names."""
        found = self._take(key, {})
        if not isinstance(found, dict) or not all(map(fits, found.values())):
            raise self._wrong(key, "numbers by the names of modules")
        return found

    def tokens(self, key: str) -> dict[str, tuple[int, ...]]:
        """Ids of tokens by the name of the embedding's module."""
        found = self._take(key, {})
        found = {"embed_tokens": found} if isinstance(found, list) else found
        lists = isinstance(found, dict) and all(isinstance(ids, list) for ids in found.values())
        if not lists or not all(is_whole(one, 0) for ids in found.values() for one in ids):
            raise self._wrong(key, "ids of tokens, or lists of them by the name of a module")
        return {name: tuple(ids) for name, ids in found.items()}


# The fields that are obeyed; the rest of the table is in LoraSettings.read.
_KNOWN = {
    "base_model_name_or_path", "revision", "r", "lora_alpha", "rank_pattern", "alpha_pattern",
    "use_rslora", "use_dora", "target_modules", "exclude_modules", "modules_to_save",
    "layers_to_transform", "layers_pattern", "trainable_token_indices", "init_lora_weights",
}  # fmt: skip


def _known(path: Path, key: str, raw: Mapping[str, Any], kinds: tuple[type, ...]) -> Any:
    value = raw.get(key)
    if not isinstance(value, kinds):
        raise WeightsError(f"{path}: {key} is {_short(value)}, expected text or null.")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


def _other(kind: Any) -> str:
    if not isinstance(kind, str):
        return f"no adapter that PEFT wrote: its {SETTINGS} says peft_type {_short(kind)}."
    near = "" if kind.isupper() else did_you_mean(kind.upper(), ["LORA"])
    return f"an adapter of the kind {_short(kind)}; jaxtc merges LORA only.{near}"


def _merge_lines(folder: Path, base: str | None, kind: Any = "LORA") -> str:
    """How to have it merged by PEFT."""
    if kind in _PROMPTS:
        return (
            "It changes no weights (it puts vectors before or into the prompt's activations), so "
            "it cannot be merged into a model at all; in jaxtc, such vectors are edits."
        )
    name = f"'{_short(base)[1:-1]}'" if base else "BASE"
    return (
        "Merge it with PEFT, then load the folder 'merged': "
        f"model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained({name}), "
        f"'{folder}'); model.merge_and_unload().save_pretrained('merged')"
    )

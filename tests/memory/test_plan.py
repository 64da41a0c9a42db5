"""The plan from shapes: what it counts, what it advises, what it refuses.

That it says what is really allocated is shown in tests/scale.
"""

import dataclasses
import importlib
import json
import math
import resource
import shlex
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxtc
from jaxtc import cli
from jaxtc.captures.reducers import At, Features, Norm, TopK
from jaxtc.errors import InputError, SiteError, SourceError, WeightsError
from jaxtc.helpers import gigabytes
from jaxtc.memory.account import bytes_of
from jaxtc.memory.advice import ACCELERATORS
from jaxtc.memory.needs import estimate
from jaxtc.memory.plan import WIDTHS, features_of, plan
from jaxtc.model.config import Gemma2Config
from jaxtc.model.released import RELEASED
from jaxtc.sharding.rules import RULES, ShardingError
from jaxtc.weights.load_model import load_config
from jaxtc.weights.sources import hub
from tests.support import tiny

PARAMETERS = {"2b": 2_614_341_888, "9b": 9_241_705_984, "27b": 27_227_128_320}
# facts.md's table would be the source, but the sizes are public: the releases' config.json.
SIZES = {
    "2b": (26, 2304, 9216, 8, 4, 256, 256),
    "9b": (42, 3584, 14336, 16, 8, 256, 256),
    "27b": (46, 4608, 36864, 32, 16, 128, 144),
}


# The tiny model's 19 tokens divide over no mesh.
WHOLE = RULES | {"vocab": None}


@pytest.fixture
def offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"the hub was asked for {args}")

    monkeypatch.setattr(hub, "hf_hub_download", refuse)


@pytest.mark.parametrize("size", RELEASED)
def test_released_sizes_are_known_offline(size, offline):
    config = load_config(size)
    layers, *rest, scalar = SIZES[size]
    assert (config.num_hidden_layers, config.query_pre_attn_scalar) == (layers, scalar)
    assert [config.sizes[letter] for letter in "DFNKH"] == rest
    assert config.vocab_size == 256000 and config.sliding_window == 4096
    for name in (f"google/gemma-2-{size}", f"google/gemma-2-{size}-it", f"gemma-2-{size}"):
        # The instruction-tuned ones end a turn, too.
        assert dataclasses.replace(load_config(name), eos_token_id=1) == config


@pytest.mark.parametrize("size", RELEASED)
@pytest.mark.parametrize(("dtype", "bytes_"), [("bfloat16", 2), ("float32", 4)])
def test_weights_of_released_models(size, dtype, bytes_):
    found = plan(size, dtype=dtype)["weights"]
    assert found.total == found.per_device == PARAMETERS[size] * bytes_


def test_one_layer_stands_for_all():
    config = tiny.config()
    leaves = jax.tree.leaves(jaxtc.Gemma2.abstract(config, jnp.bfloat16))
    held = sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)
    assert plan(config)["weights"].total == held


def test_a_mesh_divides_all_but_norms_and_biases():
    one, eight = plan("2b", "model=1"), plan("2b", "data=1,model=8")
    norms = (26 * 4 + 1) * 2304 * 2
    kv = 26 * 2 * 4 * 256 * 2304 * 2  # 4 heads over 8 devices: held whole
    whole = one["weights"].per_device
    assert eight["weights"].per_device == (whole - norms - kv) // 8 + norms + kv
    assert any("4 key/value heads" in note for note in eight.notes)
    assert plan("2b", "data=8")["weights"].per_device == whole
    four = plan("2b", "model=4")
    assert four["weights"].per_device == (whole - norms) // 4 + norms and not four.notes


def test_transcoders():
    found = plan("2b", "data=2,model=4", transcoders="all", width="16k")["transcoders"]
    big, features, d = 2 * 2304 * 16384, 2 * 16384, 2304
    assert found.total == 26 * 4 * (big + features + d)
    assert found.per_device == 26 * 4 * ((big + features) // 4 + d)
    three = plan("2b", transcoders=[0, -1, 5, 5], transcoder_dtype="bfloat16", skip=True)
    assert three.request.transcoders == (0, 5, 25)
    assert three["transcoders"].total == 3 * 2 * (big + features + d + d * d)


def test_a_cross_layer_transcoder():
    sizes = dict(width=64, transcoder_dtype="bfloat16", skip=True, length=16)
    config = tiny.config()
    found = plan(config, "model=4", rules=RULES | {"vocab": None}, cross_layer=True, **sizes)
    made = jaxtc.CrossLayerTranscoder.abstract(3, 24, 64, skip=True, dtype=jnp.bfloat16)
    assert found["transcoders"].total == bytes_of(made)
    (enc, dec), whole = (24 + 2, 24 * (3 + 2 + 1)), 3 * 24 * (24 + 1)
    divided = 64 * (3 * enc + dec) * 2
    assert found["transcoders"].total == divided + 2 * whole
    assert found["transcoders"].per_device == divided // 4 + 2 * whole
    assert "3 layers of 64 features in bfloat16, cross-layer" in str(found)
    # The features of all layers are there at the last.
    wide = dict(width=2**16, length=16)
    each = plan(config, transcoders="all", **wide)["workspace"].total
    assert 2.8 * each < plan(config, cross_layer=True, **wide)["workspace"].total < 3.2 * each
    big = plan("2b", cross_layer=True)
    assert not any("--transcoders" in str(one) for v in big.verdicts for one in v.suggestions)


def test_widths_have_gemma_scopes_names():
    assert [features_of(name) for name in WIDTHS] == [2**n for n in range(14, 21)]
    assert features_of("16K") == features_of(16384) == features_of("16384") == 16384
    for bad in ("17k", "0", 0, True, -1, "", "k"):
        with pytest.raises(InputError, match="width is"):
            features_of(bad)


def test_cache_and_what_a_generation_keeps():
    config = tiny.config()
    sizes = {"batch": 4, "length": 17, "new_tokens": 9}
    found = plan(config, "data=2,model=2", rules=WHOLE, capture="k", **sizes)
    assert found["kv cache"].total == 3 * 2 * (4 * 32 * 2 * 8) * 2
    assert found["kv cache"].per_device == found["kv cache"].total // 4
    # The last new token is never run.
    assert found["activations"].total == 3 * (4 * 25 * 2 * 8) * 2
    assert found["logits"].total == 0
    assert plan(config, length=17)["kv cache"].total == 0


@pytest.mark.parametrize("logits", ["all", "last", None])
@pytest.mark.parametrize(
    "capture",
    [
        ["mlp_out", "embed", "layers.1.attn_scores"],
        [At("resid_post", -1), Norm("q"), TopK("layers.0.mlp_act", 3), "final_norm"],
        [At("layers.2.k", [0, 2])],
    ],
)
def test_on_one_device_activations_are_what_estimate_says(capture, logits):
    model = jaxtc.Gemma2.abstract(tiny.config(), jnp.bfloat16)
    told = estimate(model, (3, 19), capture=capture, logits=logits)
    found = plan(tiny.config(), batch=3, length=19, capture=capture, logits=logits)
    assert found["activations"].total == found["activations"].per_device
    assert found["activations"].total == sum(told.activations.values())
    assert found["logits"].total == told.logits
    assert found["workspace"].total >= told.workspace


def test_captures_are_divided_as_their_axes_are():
    sites = {"mlp_out": 2, "mlp_act": 4, "q": 4, "attn_pattern": 4, "mlp_in_scale": 2}
    sizes = {"batch": 2, "length": 16, "rules": WHOLE}
    for site, ways in sites.items():
        found = plan(tiny.config(), "data=2,model=2", capture=site, **sizes)
        assert found["activations"].total == ways * found["activations"].per_device, site
    found = plan(tiny.config(), "data=2,model=4", capture="v", **sizes)
    assert found["activations"].total == 2 * found["activations"].per_device  # 2 heads, 4 devices


def test_prompts_that_do_not_divide_are_run_by_all():
    found = plan(tiny.config(), "data=2", batch=3, length=16, capture="mlp_out", new_tokens=2)
    assert found["activations"].total == found["activations"].per_device
    assert found["kv cache"].total == found["kv cache"].per_device
    assert any("3 prompts" in note for note in found.notes)


def test_features_need_room():
    made = tiny.transcoder(1)
    features = Features(transcoder=made, capacity=5)
    found = plan(tiny.config(), "data=2", batch=2, length=16, capture={"f": features})
    assert found["activations"].total == 2 * 16 * (5 * 4 + 5 * 4 + 4)
    assert found["activations"].per_device == found["activations"].total // 2
    wide = plan("2b", transcoders=[0], width="1m")["workspace"]
    assert wide.total > 1024 * 2**20 * 4 and "features" in wide.detail


HARD = [
    "27b --mesh data=2,model=4 --transcoders all --batch 8 --capture resid_post",
    "27b --dtype float32 --transcoders all --batch 32 --length 2048 --capture mlp_act "
    "--capture layers.3.resid_post",
    "27b --mesh data=8 --width 1m --transcoders 0-9,20 --dtype float32 --logits last",
    "2b --dtype float32 --transcoders all --new-tokens 1000 --batch 64 --length 2000",
    "9b --transcoders all --mesh model=2 --length 8192",
    "9b --transcoders all --dtype float32",
    "27b",
]


@pytest.mark.parametrize("line", HARD)
def test_what_is_advised_fits(line, capsys):
    """Each suggestion is given to the command line, and must fit and need what it said."""
    found = planned(line, capsys)
    advised = 0
    for verdict, device in zip(found["fits"], ACCELERATORS, strict=True):
        assert verdict["usable"] == int(device.memory * device.usable)
        assert verdict["fits"] == (found["per_device"] <= verdict["usable"])
        assert not (verdict["fits"] and verdict["suggestions"])
        assert len(verdict["suggestions"]) <= 3
        for one in verdict["suggestions"]:
            advised += 1
            if one["option"].startswith("XLA_CLIENT_MEM_FRACTION="):
                fraction = float(one["option"].split("=")[1])
                assert found["per_device"] == one["needed"] <= device.memory * fraction
                continue
            again = planned(changed(line, one["option"]), capsys)
            assert again["per_device"] == one["needed"] <= verdict["usable"], one
    assert advised


def changed(line, options):
    """The command line with these options in place of those of the same name."""
    old, new = shlex.split(line), shlex.split(options)
    kept, index = [], 0
    while index < len(old):
        if old[index].startswith("--") and old[index] in new:
            index += 2
            continue
        kept.append(old[index])
        index += 1
    return shlex.join([*kept, *new])


def planned(line, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["plan", *shlex.split(line), "--json", "-"])
    assert exit_.value.code == 0
    return json.loads(capsys.readouterr().out)


def test_the_smallest_change_comes_first():
    v5e, *_ = plan("27b", "data=2,model=8", batch=2).verdicts
    assert v5e.fits
    # Another arrangement of the same devices is enough.
    v5e, *_ = plan("27b", "data=8,model=1", logits="last").verdicts
    assert v5e.suggestions[0].option == "--mesh data=1,model=8"
    assert [one.option for one in v5e.suggestions[1:]] == ["--mesh data=1,model=16"]
    # As many transcoders as there is room for: one more would be too many.
    found = plan("2b", transcoders="all", width="262k", logits="last")
    h200 = found.verdicts[-1]
    named = [one for one in h200.suggestions if "--transcoders" in one.option]
    last = int(named[0].option.split("-")[-1])
    more = plan("2b", transcoders=range(last + 2), width="262k", logits="last")
    assert named[0].needed <= h200.usable < more.per_device
    # On a GPU JAX can be told to take more.
    found = plan("2b", transcoders="all", width="65k", dtype="float32", batch=12)
    assert found.verdicts[2].suggestions[0].option == "XLA_CLIENT_MEM_FRACTION=0.9"


def test_sizes_beyond_reason_take_no_longer():
    deep = Gemma2Config(num_hidden_layers=10_000, num_attention_heads=10**6, num_key_value_heads=1)
    found = plan(deep, "data=7", batch=10**12, transcoders="all", dtype="float32")
    assert found.per_device > 10**15
    json.dumps(found.to_dict())
    sizes = {"batch": np.int64(2), "length": np.int32(9), "width": np.int64(64)}
    json.dumps(plan("2b", transcoders=np.arange(3), **sizes).to_dict())


def test_nothing_helps_is_said_so():
    found = plan(Gemma2Config(hidden_size=2**16, intermediate_size=2**20, num_attention_heads=1,
                              num_key_value_heads=1), rules=RULES | {"mlp": None})  # fmt: skip
    assert not any(verdict.fits or verdict.suggestions for verdict in found.verdicts)
    assert "nothing that was tried would fit" in str(found)


@pytest.mark.parametrize(
    ("options", "error", "told"),
    [
        ({"mesh": "model=3"}, ShardingError, "model=1 or 2 or 4 or 8"),
        ({"mesh": "modle=2"}, ShardingError, "'model'"),
        ({"mesh": {"model": 0}}, ShardingError, "0 devices"),
        ({"batch": 0}, InputError, "batch is 0"),
        ({"length": 9000}, InputError, "context of 8192"),
        ({"length": 8000, "new_tokens": 200}, InputError, "200 new ones"),
        ({"new_tokens": True}, InputError, "new_tokens is True"),
        ({"new_tokens": 5, "logits": "all"}, InputError, "gives no logits"),
        ({"new_tokens": 5, "capture": At("mlp_out", -1)}, InputError, "reduces over"),
        ({"logits": "some"}, InputError, "logits is 'some'"),
        ({"transcoders": "some"}, InputError, "transcoders is 'some'"),
        ({"transcoders": 5}, InputError, "transcoders is 5"),
        ({"transcoders": [1.5]}, InputError, "1.5"),
        ({"transcoders": [26]}, SiteError, "26 layers"),
        ({"transcoders": [1], "cross_layer": True}, InputError, "is of all layers: leave it out"),
        ({"mesh": None}, ShardingError, "A mesh is None"),
        ({"dtype": "int8"}, WeightsError, "int8"),
        ({"capture": "resid_pst"}, SiteError, "resid_post"),
        ({"rules": {"vocb": None}}, ShardingError, "'vocb'"),
    ],
)
def test_errors_teach(options, error, told):
    with pytest.raises(error, match=told):
        plan("2b", **options)


def test_a_source_that_is_none():
    with pytest.raises(SourceError, match="'9b'"):
        plan("8b")


def test_a_folder_needs_only_its_config(tmp_path, offline):
    (tmp_path / "config.json").write_text(json.dumps(tiny.config().to_dict()))
    assert plan(str(tmp_path))["weights"].total == plan(tiny.config())["weights"].total


def test_a_plan_prints_itself():
    text = str(plan("2b", "model=4", transcoders="all"))
    assert "transcoders" in text and "TPU v5e" in text and "2,614,341,888" in text
    assert [gigabytes(n) for n in (0, 999, 1500, 99_960_000, 15_234_000_000)] == [
        "0 B", "999 B", "1.5 kB", "100 MB", "15.2 GB",
    ]  # fmt: skip


def test_the_command_line_draws_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "110")
    line = "9b --mesh data=2,model=16 --transcoders 0-3 --batch 3 --capture resid_post@-1"
    with pytest.raises(SystemExit) as exit_:
        cli.main(["plan", *line.split(), "--json", str(tmp_path / "plan.json")])
    assert exit_.value.code == 0
    out, err = capsys.readouterr()
    held = json.loads((tmp_path / "plan.json").read_text())
    assert (
        not err
        and held
        == plan(
            "9b", "data=2,model=16", transcoders=range(4), batch=3, capture=At("resid_post", -1)
        ).to_dict()
    )
    for words in ("9,241,705,984", "TPU v5e", "H200", "together", "8 key/value heads", "3 prompts"):
        assert words in out
    assert gigabytes(held["per_device"]) in out


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("2b --capture mlp_out@last", "'last' is not a position"),
        ("2b --transcoders 1,x", "--transcoders is '1,x'"),
        ("2b --replicate vocb", "--replicate vocb"),
        ("embedded --mesh model=2", "--replicate AXIS"),
        ("2b --json /nowhere/plan.json", "--json"),
        ("2b --logits some", "'some'"),
    ],
)
def test_the_command_line_refuses(line, told, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["plan", *line.split()])
    assert exit_.value.code == 2
    assert told in capsys.readouterr().err


def test_planning_takes_seconds_and_starts_no_backend():
    """The hardest case; the processor's time, since a busy machine's clock says nothing."""
    code = (
        "import sys; from jaxtc.cli import main\n"
        f"try: main(['plan', *{shlex.split(HARD[1])!r}])\n"
        "except SystemExit as end: assert not end.code\n"
        "from jax._src import xla_bridge\n"
        "sys.exit(xla_bridge.backends_are_initialized())"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 5


def test_it_is_public():
    assert jaxtc.plan is importlib.import_module("jaxtc.memory.plan").plan


def test_sites_of_a_released_model_need_no_network(offline, capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["sites", "--model", "google/gemma-2-27b", "--json"])
    shapes = {row["site"]: row["shape"] for row in json.loads(capsys.readouterr().out)}
    assert exit_.value.code == 0 and shapes["mlp_act"] == ["B", "T", 36864]

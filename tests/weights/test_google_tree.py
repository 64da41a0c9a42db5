"""Google's own Flax checkpoints: loaded and converted, with the numbers of the model in torch."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
import transformers

import jaxtc
from jaxtc.errors import ConfigError, JaxtcError, SourceError, WeightsError
from jaxtc.model.released import RELEASED
from jaxtc.sharding.rules import variables
from jaxtc.weights.load_model import load_config, load_tokenizer
from tests.support import tiny
from tests.support.google_tree import flat, tree_of
from tests.weights.adapters.cases import IDS, SIZES

CONFIG = jaxtc.Gemma2Config(**SIZES)


def torch_model(**sizes):
    torch.manual_seed(3)
    config = transformers.Gemma2Config(**{**SIZES, **sizes}, attn_implementation="eager")
    model = transformers.Gemma2ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model


@pytest.fixture(scope="module")
def theirs():
    return torch_model()


def save(folder, tree, **options):
    ocp.PyTreeCheckpointer(**options).save(folder, tree)
    return folder


@pytest.fixture(scope="module")
def folder(theirs, tmp_path_factory):
    return save(tmp_path_factory.mktemp("google") / "gemma2", tree_of(theirs))


def same_logits(model, theirs):
    with torch.no_grad():
        expected = theirs(torch.tensor([IDS])).logits[0].numpy()
    ours = np.asarray(jaxtc.run(model, jnp.asarray([IDS])).logits[0])
    assert np.linalg.norm(ours - expected) < 1e-5 * np.linalg.norm(expected)


KINDS = {
    "nested": lambda tree: tree,
    "flat": flat,
    "bare": lambda tree: tree["transformer"],
    "params": lambda tree: {"params": tree["transformer"]},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("database", [True, False])
def test_logits_are_those_of_torchs_model(theirs, kind, transposed, database, tmp_path):
    tree = KINDS[kind](tree_of(theirs, transposed))
    folder = save(tmp_path / "gemma2", tree, use_ocdbt=database)
    same_logits(jaxtc.load_model(folder, config=CONFIG, dtype="float32"), theirs)


def test_as_orbax_wrote_it_in_other_years(theirs, tmp_path):
    tree = tree_of(theirs)
    manager = ocp.CheckpointManager(tmp_path / "manager")
    manager.save(0, args=ocp.args.StandardSave(tree))
    manager.wait_until_finished()
    manager.close()
    old = save(tmp_path / "old", flat(tree))
    for name in ("_CHECKPOINT_METADATA", "_sharding", "commit_success.txt"):
        (old / name).unlink(missing_ok=True)
    for folder in (tmp_path / "manager", tmp_path / "manager/0", old):
        same_logits(jaxtc.load_model(folder, config=CONFIG, dtype="float32"), theirs)


def test_every_head_with_keys_of_its_own(tmp_path):
    theirs = torch_model(num_key_value_heads=4)
    folder = save(tmp_path / "gemma2", tree_of(theirs))
    config = jaxtc.Gemma2Config(**{**SIZES, "num_key_value_heads": 4})
    same_logits(jaxtc.load_model(folder, config=config, dtype="float32"), theirs)


@pytest.mark.parametrize("place", ["in it", "beside it", "given", "given folder"])
def test_a_config_where_no_release_has_these_sizes(theirs, folder, place, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "download/gemma2")
    with pytest.raises(ConfigError, match=r"no release has.*config="):
        jaxtc.load_model(copy)
    target = {"in it": copy, "beside it": copy.parent}.get(place, tmp_path)
    (target / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    given = {"given": tmp_path / "config.json", "given folder": tmp_path}.get(place)
    same_logits(jaxtc.load_model(copy, config=given, dtype="float32"), theirs)


@pytest.mark.parametrize("door", ["load", "convert"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ignore": "score.*"}, "ignore='?.*Google's Flax tree"),
        ({"ignore": ["a", "b"]}, "ignore=.*Google's Flax tree"),
        ({"ignore": 3}, "ignore is 3"),
        ({"base": "nowhere"}, "base='nowhere' is for an adapter"),
    ],
)
def test_arguments_that_mean_nothing_for_it_are_refused(folder, tmp_path, door, given, message):
    with pytest.raises(SourceError, match=message):
        if door == "load":
            jaxtc.load_model(folder, config=CONFIG, **given)
        else:
            jaxtc.convert(folder, tmp_path / "out", config=CONFIG, **given)
    assert not list(tmp_path.iterdir())


def test_the_folder_around_it_will_do(theirs, folder, tmp_path):
    shutil.copytree(folder, tmp_path / "1/gemma2-tiny")
    (tmp_path / "1/tokenizer.model").write_bytes(b"")
    same_logits(jaxtc.load_model(tmp_path / "1", config=CONFIG, dtype="float32"), theirs)


@pytest.mark.parametrize("size", RELEASED)
def test_sizes_of_a_release_have_its_config(size, tmp_path, monkeypatch):
    """Of a tree with that many layers and heads; widths are small, as are those of the releases."""
    small = {
        name: jaxtc.Gemma2Config(**{
            **{key: getattr(one, key) for key in SIZES},
            "vocab_size": 48, "hidden_size": 2 * one.num_attention_heads,
            "intermediate_size": one.intermediate_size // 512, "head_dim": one.head_dim // 64,
        })
        for name, one in RELEASED.items()
    }  # fmt: skip
    monkeypatch.setattr("jaxtc.weights.checkpoints.google.RELEASED", small)
    sizes = {key: getattr(small[size], key) for key in SIZES}
    theirs = torch_model(**(sizes | {"vocab_size": 50}))  # rows to spare
    last = theirs.model.layers[-1].mlp
    folder = save(tmp_path / "gemma2", flat(tree_of(theirs)))
    config = load_config(folder)
    assert config.vocab_size == 50
    assert config.query_pre_attn_scalar == RELEASED[size].query_pre_attn_scalar
    assert config.num_hidden_layers == RELEASED[size].num_hidden_layers
    made = jaxtc.load_model(folder, dtype="float32").layers[-1].mlp
    for ours, weight in ((made.gate, last.gate_proj.weight), (made.down, last.down_proj.weight)):
        assert np.array_equal(ours[...], weight.detach())


@pytest.mark.parametrize("to", ["safetensors", "orbax"])
def test_converted_it_is_the_same_model(theirs, to, tmp_path):
    tree = tree_of(theirs, dtype=jnp.bfloat16)
    folder = save(tmp_path / "1/gemma2", flat(tree))
    tiny.tokenizer().save_pretrained(tmp_path / "1")
    out = jaxtc.convert(folder, tmp_path / "out", to=to, config=CONFIG)
    assert (out / "tokenizer.json").exists()
    assert (
        load_tokenizer(folder)("the capital").input_ids
        == load_tokenizer(out)("the capital").input_ids
    )
    ours = jaxtc.load_model(out, dtype="bfloat16")
    assert ours.config == CONFIG
    direct = jaxtc.load_model(folder, config=CONFIG, dtype="bfloat16")
    for (name, a), (_, b) in zip(variables(direct), variables(ours), strict=True):
        assert np.array_equal(a[...], b[...]), name
    if to == "safetensors":
        model = transformers.Gemma2ForCausalLM.from_pretrained(out, attn_implementation="eager")
        assert model.dtype == torch.bfloat16
        assert torch.equal(
            model.model.layers[1].self_attn.v_proj.weight,
            theirs.model.layers[1].self_attn.v_proj.weight.to(torch.bfloat16),
        )


def refused(folder, match, error=WeightsError, **given):
    with pytest.raises(error, match=match) as raised:
        jaxtc.load_model(folder, **{"config": CONFIG, **given})
    assert "\n" not in str(raised.value)


def test_what_is_no_gemma_2_is_named(theirs, tmp_path):
    tree = tree_of(theirs)["transformer"]
    third = {**tree, "layer_0": {**tree["layer_0"]}}
    third["layer_0"]["attn"] = {**tree["layer_0"]["attn"], "_query_norm": {"scale": np.ones(6)}}
    refused(save(tmp_path / "3", third), "of Gemma 3")
    first = {name: dict(part) for name, part in tree.items()}
    for layer in range(3):
        del first[f"layer_{layer}"]["post_ffw_norm"]
    refused(save(tmp_path / "1", first), "Gemma 1")
    refused(save(tmp_path / "other", {"kernel": np.ones(3)}), "something else.*kernel")
    with pytest.raises(SourceError, match="base="):
        jaxtc.load_model(tmp_path / "3", base="google/gemma-2-2b")


def test_every_array_is_accounted_for(theirs, tmp_path):
    def changed(name, change):
        tree = tree_of(theirs)
        change(tree["transformer"])
        return save(tmp_path / name, tree)

    refused(
        changed("missing", lambda t: t["layer_1"]["mlp"].pop("linear")), "mlp/linear is missing"
    )
    refused(changed("layer", lambda t: t.pop("layer_1")), "layers up to layer_2")
    refused(changed("extra", lambda t: t["layer_0"].update(x=np.ones(3))), "layer_0/x is not")
    bad = {"w": np.ones((2, 2, 16, 7), np.float32)}
    refused(
        changed("shape", lambda t: t["layer_2"]["attn"].update(kv_einsum=bad)), r"\(2, 2, 16, 7\)"
    )
    refused(changed("nan", lambda t: t["final_norm"]["scale"].fill(np.nan)), "scale holds NaN")
    whole = {"scale": np.ones(16, np.int32)}
    refused(changed("integers", lambda t: t.update(final_norm=whole)), "floating-point")


def test_another_config_is_refused(folder):
    other = jaxtc.Gemma2Config(**{**SIZES, "num_hidden_layers": 2})
    refused(folder, "layers is 3, not 2", ConfigError, config=other)
    refused(folder, "expected a Gemma2Config", ConfigError, config=7)


def test_a_square_mlp_cannot_be_told(tmp_path):
    theirs = torch_model(intermediate_size=16)
    config = jaxtc.Gemma2Config(**{**SIZES, "intermediate_size": 16})
    refused(save(tmp_path / "square", tree_of(theirs)), "look the same", config=config)


def test_a_missing_chunk_is_no_zeros(theirs, tmp_path):
    folder = save(tmp_path / "gemma2", tree_of(theirs), use_ocdbt=False)
    next(folder.glob("*layer_1.mlp.linear/0*")).unlink()
    refused(folder, "cannot be read")


def test_plan_and_convert_know_what_it_is(folder, tmp_path):
    with pytest.raises(JaxtcError, match="no release has"):
        jaxtc.plan(str(folder))
    with pytest.raises(ConfigError, match="no release has"):
        jaxtc.convert(folder, tmp_path / "out", to="safetensors")
    assert not (tmp_path / "out").exists()
    with pytest.raises(SourceError, match="model"):
        jaxtc.convert(folder, tmp_path / "out", to="npz")

"""Every end of every module of transformers, and TransformerLens' hooks, under their own names.

Each holds what the site that it is an alias of holds, and an edit there does what an edit of the
site does; the others are refused, with a reason.
"""

import functools
import re

import numpy as np
import pytest
import torch

import jaxtc
from jaxtc.errors import SiteError
from jaxtc.tap.sites import SITES, parse, resolve
from tests.parity import oracles, reference

LAYER = 1
SHIFT = 0.3
# Gemma-2 in transformers gives its pattern back and never reads it again.
UNREAD = ("self_attn.output.1",)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """(ours, theirs, ids of prompts)."""
    folder = tmp_path_factory.mktemp("aliases")
    model = oracles.perturbed("9b")
    model.save_pretrained(folder)
    prompts = oracles.random_prompts(model.config.vocab_size, (12, 9), 0)
    return jaxtc.load_model(folder, dtype="float32"), model, prompts


def parts(name, found):
    """(end, tensor) of what a module takes or gives."""
    if torch.is_tensor(found):
        yield name, found
    elif isinstance(found, tuple):
        for index, part in enumerate(found):
            yield from parts(f"{name}.{index}", part)
    elif found is not None:
        for key, part in found.items():
            yield from parts(f"{name}.{key}", part)


def given(args, kwargs):
    return args[0] if args else kwargs.get("hidden_states", kwargs.get("input_ids"))


@pytest.fixture(scope="module")
def ends(pair):
    """What every end of every module holds, by name; of one layer."""
    found, handles, (_, model, prompts) = {}, [], pair
    for path, module in model.named_modules():
        if ".layers." in path and f".layers.{LAYER}" not in path or path == "model.layers":
            continue

        def keep(module, args, kwargs, out, path=path):
            dot = f"{path}." if path else ""
            found.update(parts(f"{dot}input", given(args, kwargs)))
            found.update(parts(f"{dot}output", out))

        handles.append(module.register_forward_hook(keep, with_kwargs=True))
    model(torch.tensor([prompts[0]]), use_cache=False)
    for handle in handles:
        handle.remove()
    return {name: x.detach() for name, x in found.items()}


def meaning(name):
    """The address that a name stands for, None where it is refused."""
    try:
        return resolve(name, oracles.COMMON["num_hidden_layers"])[0]
    except SiteError as error:
        assert "is not an alias here" in str(error), error
        return None


def test_every_end_is_an_alias_or_refused_with_a_reason(pair, ends):
    ours, _, prompts = pair
    assert len(ends) > 40
    means = {name: meaning(name) for name in ends}
    refused = {name for name, address in means.items() if address is None}
    assert refused == {
        "input", "model.input", "model.embed_tokens.input",
        "model.rotary_emb.input", "model.rotary_emb.output.0", "model.rotary_emb.output.1",
        f"model.layers.{LAYER}.mlp.act_fn.output",
    }  # fmt: skip
    kept = jaxtc.run(ours, prompts[0], capture=[n for n in means if n not in refused])
    for name in means.keys() - refused:
        theirs = ends[name].numpy()
        got = np.asarray(kept.activations[name]).reshape(theirs.shape)
        np.testing.assert_allclose(got, theirs, rtol=1e-4, atol=1e-4, err_msg=name)
    # What is refused is no site's, or no activation.
    sites = jaxtc.run(ours, prompts[0], capture=[s.name for s in SITES]).activations
    gelu = ends[f"model.layers.{LAYER}.mlp.act_fn.output"].numpy()
    same = [n for n in sites if sites[n].shape == gelu.shape and np.allclose(sites[n], gelu, 1e-3)]
    assert not same


def shifted(model, name, ids):
    """Logits with the tensor at one end of a module moved."""
    path, end, index = re.fullmatch(r"(?:(.*)\.)?(input|output)(?:\.(\w+))?", name).groups()
    module = model.get_submodule(path or "")

    def before(module, args, kwargs):
        if args:
            return (args[0] + SHIFT, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + SHIFT}

    def after(module, args, out):
        if torch.is_tensor(out):
            return out + SHIFT
        if isinstance(out, tuple):
            return tuple(x + SHIFT if i == int(index) else x for i, x in enumerate(out))
        out[index] = out[index] + SHIFT
        return out

    if end == "input":
        handle = module.register_forward_pre_hook(before, with_kwargs=True)
    else:
        handle = module.register_forward_hook(after)
    with torch.no_grad():
        found = model(torch.tensor([ids]), use_cache=False).logits.numpy()
    handle.remove()
    return found


@functools.cache
def editable(name):
    try:
        return parse(name, editing=True) is not None
    except SiteError:
        return False


def test_an_edit_under_an_alias_does_what_a_hook_there_does(pair, ends):
    """And where a hook would reach less, the alias is refused for edits."""
    ours, model, prompts = pair
    ids, kinds = prompts[0], {True: 0, False: 0}
    base = model(torch.tensor([ids]), use_cache=False).logits.detach().numpy()
    for name in ends:
        if meaning(name) is None or name.endswith(UNREAD):
            continue
        theirs = shifted(model, name, ids)
        if not editable(name):
            with pytest.raises(SiteError, match="one reader of"):
                jaxtc.Add(SHIFT, site=name)
            address = meaning(name)
            edit = jaxtc.Add(SHIFT, site=str(address))
        else:
            edit = jaxtc.Add(SHIFT, site=name)
        got = np.asarray(jaxtc.run(ours, ids, edits=[edit]).logits)
        alike = np.abs(got - theirs).max() < 1e-3 * np.abs(theirs).max()
        assert alike == editable(name), name
        assert np.abs(theirs - base).max() > 1e-3, name
        kinds[editable(name)] += 1
    assert kinds[True] > 20 and kinds[False] == 7


# As `bridge.hook_dict` of TransformerLens 4.3.0 lists them for a Gemma-2, and those that its older
# HookedTransformer has besides, with the site that holds the same; None for those that none does.
LENS = {
    "hook_embed": "embed", "embed.hook_out": "embed", "embed.hook_in": None,
    "hook_pos_embed": None, "hook_tokens": None, "rotary_emb.hook_in": None,
    "rotary_emb.hook_out": None, "rotary_emb.hook_cos": None, "rotary_emb.hook_sin": None,
    "blocks.1.hook_in": "layers.1.resid_pre", "blocks.1.hook_resid_pre": "layers.1.resid_pre",
    "blocks.1.ln1.hook_in": "layers.1.resid_pre", "blocks.1.ln1.hook_scale": None,
    "blocks.1.ln1.hook_normalized": None, "blocks.1.ln1.hook_out": "layers.1.attn_in",
    "blocks.1.attn.hook_in": "layers.1.attn_in", "blocks.1.attn.q.hook_in": "layers.1.attn_in",
    "blocks.1.attn.k.hook_in": "layers.1.attn_in", "blocks.1.attn.v.hook_in": "layers.1.attn_in",
    "blocks.1.attn.q.hook_out": "layers.1.q_unrotated",
    "blocks.1.attn.hook_q": "layers.1.q_unrotated",
    "blocks.1.attn.k.hook_out": "layers.1.k_unrotated",
    "blocks.1.attn.hook_k": "layers.1.k_unrotated",
    "blocks.1.attn.v.hook_out": "layers.1.v", "blocks.1.attn.hook_v": "layers.1.v",
    "blocks.1.attn.hook_cos": None, "blocks.1.attn.hook_sin": None,
    "blocks.1.attn.hook_rot_q": "layers.1.q", "blocks.1.attn.hook_rot_k": "layers.1.k",
    "blocks.1.attn.hook_attn_scores": "layers.1.attn_scores",
    "blocks.1.attn.hook_pattern": "layers.1.attn_pattern",
    "blocks.1.attn.o.hook_in": "layers.1.attn_heads",
    "blocks.1.attn.hook_z": "layers.1.attn_heads",
    "blocks.1.attn.hook_result": "layers.1.head_out",
    "blocks.1.attn.o.hook_out": "layers.1.attn_proj",
    "blocks.1.attn.hook_out": "layers.1.attn_proj",
    "blocks.1.hook_attn_in": None, "blocks.1.hook_q_input": None, "blocks.1.hook_k_input": None,
    "blocks.1.hook_v_input": None, "blocks.1.attn.hook_attn_in": None,
    "blocks.1.ln1_post.hook_in": "layers.1.attn_proj", "blocks.1.ln1_post.hook_scale": None,
    "blocks.1.ln1_post.hook_normalized": None, "blocks.1.ln1_post.hook_out": "layers.1.attn_out",
    "blocks.1.hook_attn_out": "layers.1.attn_out", "blocks.1.ln2.hook_in": "layers.1.resid_mid",
    "blocks.1.hook_resid_mid": "layers.1.resid_mid", "blocks.1.hook_mlp_in": "layers.1.resid_mid",
    "blocks.1.ln2.hook_scale": None, "blocks.1.ln2.hook_normalized": "layers.1.mlp_in_normed",
    "blocks.1.ln2.hook_out": "layers.1.mlp_in", "blocks.1.mlp.hook_in": "layers.1.mlp_in",
    "blocks.1.mlp.gate.hook_in": "layers.1.mlp_in", "blocks.1.mlp.in.hook_in": "layers.1.mlp_in",
    "blocks.1.mlp.gate.hook_out": "layers.1.mlp_gate", "blocks.1.mlp.hook_pre": "layers.1.mlp_gate",
    "blocks.1.mlp.in.hook_out": "layers.1.mlp_up",
    "blocks.1.mlp.hook_pre_linear": "layers.1.mlp_up",
    "blocks.1.mlp.out.hook_in": "layers.1.mlp_act", "blocks.1.mlp.hook_post": "layers.1.mlp_act",
    "blocks.1.mlp.out.hook_out": "layers.1.mlp_proj", "blocks.1.mlp.hook_out": "layers.1.mlp_proj",
    "blocks.1.ln2_post.hook_in": "layers.1.mlp_proj", "blocks.1.ln2_post.hook_scale": None,
    "blocks.1.ln2_post.hook_normalized": None, "blocks.1.ln2_post.hook_out": "layers.1.mlp_out",
    "blocks.1.hook_mlp_out": "layers.1.mlp_out", "blocks.1.hook_out": "layers.1.resid_post",
    "blocks.1.hook_resid_post": "layers.1.resid_post", "ln_final.hook_in": "layers.3.resid_post",
    "ln_final.hook_scale": None, "ln_final.hook_normalized": None,
    "ln_final.hook_out": "final_norm", "unembed.hook_in": "final_norm",
    "unembed.hook_out": "logits_uncapped", "hook_unembed": "logits_uncapped",
}  # fmt: skip


@pytest.mark.parametrize("name", LENS)
def test_hooks_of_transformer_lens(name):
    address = meaning(name)
    assert (address and str(address)) == LENS[name]


def test_numbers_of_transformer_lens(pair, tmp_path):
    """With the library installed: what its bridge's hooks hold."""
    pytest.importorskip("transformer_lens")
    from tokenizers import Tokenizer, models
    from transformer_lens.model_bridge.sources import transformers as source
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    ours, model, prompts = pair
    vocabulary = {f"t{i}": i for i in range(model.config.vocab_size)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="t3"))
    names = {"bos_token": "t2", "eos_token": "t1", "pad_token": "t0", "unk_token": "t3"}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    bridge = source.boot(str(tmp_path), hf_model=model, tokenizer=tokenizer)
    _, cache = bridge.run_with_cache(torch.tensor([prompts[0]]))
    seen = 0
    for name, array in cache.items():
        if ".1." not in name and "blocks." in name:
            continue
        assert name in LENS, name
        if LENS[name] is None:
            continue
        [got] = jaxtc.run(ours, prompts[0], capture=name).activations.values()
        # Masked scores are -inf there.
        array = array.detach().float().clamp(min=-1e30).numpy()
        got = np.clip(np.asarray(got), -1e30, None).reshape(array.shape)
        np.testing.assert_allclose(got, array, rtol=1e-3, atol=1e-3, err_msg=name)
        seen += 1
    assert seen > 40


@pytest.mark.parametrize(
    ("name", "expected"),
    {
        "model.model.layers[1].mlp.input": "layers.1.mlp_in",
        "model.layers[1].output[0]": "layers.1.resid_post",
        "model.layers[-1].self_attn.output[0]": "layers.3.attn_proj",
        "layers[1].mlp.down_proj.inputs[0][0]": "layers.1.mlp_act",
        "base_model.model.model.layers.1.self_attn.o_proj": "layers.1.attn_proj",
        "model.norm.input": "layers.3.resid_post",
        "model.output.last_hidden_state": "final_norm",
        "output.logits": "logits",
        "lm_head.input": "final_norm",
    }.items(),
)
def test_spellings(name, expected):
    assert str(meaning(name)) == expected


@pytest.mark.parametrize(
    ("name", "words"),
    {
        "model.output": "several parts.*final_norm",
        "output": "several parts",
        "model.input": "token ids",
        "hidden_states[2]": "resid_pre of layer l",
        "blocks.1.ln1_post.hook_scale": "the rms itself",
        "model.layers.1.mlp.act_fn": "gelu of mlp_gate",
        "blocks.1.attn.hook_q_input": "copy of the residual stream for each head",
        "blocks.1.ln1.hook_normalized": "before the gain",
        "model.layers.1.mlp.output[1]": "no site called",
        "model.layers.1.self_attn.output.2": "no site called",
    }.items(),
)
def test_refused(name, words):
    with pytest.raises(SiteError, match=words):
        parse(name)


def test_padded_rows_have_them_too(pair):
    ours, model, prompts = pair
    name = f"model.layers.{LAYER}.post_feedforward_layernorm.input"
    found = reference.capture(model, prompts, "left")
    got = np.asarray(jaxtc.run(ours, prompts, capture=name).activations[name])
    for row, theirs in enumerate(found[resolve(f"layers.{LAYER}.mlp_proj", 4)[0]]):
        np.testing.assert_allclose(got[row, : len(theirs)], theirs, rtol=1e-3, atol=1e-3)

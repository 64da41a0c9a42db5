"""Estimates against what runs really return; the machine's free memory against files made up."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxtc
from jaxtc.captures.reducers import At, Features, Mean, Norm, Project, TopK
from jaxtc.captures.request import understand
from jaxtc.errors import CapacityError, InputError, SiteError
from jaxtc.memory import available as machine
from jaxtc.memory import needs as memory
from jaxtc.memory.needs import check_fits, check_run, estimate
from jaxtc.model.prompts import prepare
from jaxtc.tap.sites import SITES
from tests.support import tiny, unspared
from tests.support.batch import LENGTHS, PROMPTS, D, run

B, T, W, V, LAYERS = 3, max(LENGTHS), 16, tiny.config().vocab_size, 3

CAPTURES = {
    "nothing": (),
    "one": "layers.1.attn_pattern",
    "every layer": ["mlp_act", "embed", "logits"],
    "every site": [site.name for site in SITES],
    "named": {"a": "layers.0.q", "b": "layers.0.q", "c": At("q", 0), "d": At("q", 1)},
    "reducers": [
        At("resid_post"), At("attn_pattern", [0, -1]), At("k", jaxtc.Token(2)),
        Mean("attn_pattern"), Mean("embed", slice(0, 2)), Norm("layers.2.q"), TopK("logits", 3),
        Project("mlp_out", np.ones((2, D))), Features(transcoder=tiny.transcoder(1), capacity=7),
    ],
}  # fmt: skip


def real_bytes(result):
    by_name = {
        name: sum(x.nbytes for x in jax.tree.leaves(kept))
        for name, kept in result.activations.items()
    }
    return by_name, 0 if result.logits is None else result.logits.nbytes


@pytest.mark.parametrize("prompts", [PROMPTS, (B, T)], ids=["tokens", "size"])
@pytest.mark.parametrize(
    ("capture", "logits"),
    [("nothing", "all"), ("one", None), ("every layer", "last"), ("every site", None),
     ("named", "all"), ("reducers", "last"), ("reducers", "all")],
)  # fmt: skip
def test_estimate_is_what_a_run_returns(capture, logits, prompts):
    found = estimate(tiny.model(), prompts, capture=CAPTURES[capture], logits=logits)
    by_name, of_logits = real_bytes(run(capture=CAPTURES[capture], logits=logits))
    assert found.activations == by_name and found.logits == of_logits
    assert found.kept == sum(by_name.values()) + of_logits
    assert found.needed >= 2 * found.kept  # held with the padding while it is cut


def test_shapes_and_dtypes():
    half = jaxtc.Gemma2(tiny.config(), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    capture = [
        "layers.1.resid_post",
        "layers.1.mlp_in_normed",
        Mean("layers.1.q"),
        TopK("embed", 2),
    ]
    shapes = estimate(half, PROMPTS, capture=capture).shapes
    result = jaxtc.run(half, PROMPTS, capture=capture)
    real = jax.tree.map(lambda x: (x.shape, x.dtype), dict(result.activations))
    assert jax.tree.map(lambda x: (x.shape, x.dtype), dict(shapes)) == real
    assert shapes["layers.1.resid_post"].dtype == jnp.bfloat16


def test_weights_are_those_of_the_model_a_config_or_an_abstract_one():
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(tiny.model()))
    abstract = jaxtc.Gemma2.abstract(tiny.config(), jnp.bfloat16)
    assert estimate(tiny.model(), PROMPTS).weights == weights
    assert estimate(tiny.config(), PROMPTS).weights == weights
    assert estimate(abstract, PROMPTS).weights == weights // 2


def test_a_model_that_no_machine_here_holds():
    """Sizes of the 27B model, worked out by hand; nothing is allocated."""
    config = jaxtc.Gemma2Config(
        hidden_size=4608, intermediate_size=36864, num_hidden_layers=46, num_attention_heads=32,
        num_key_value_heads=16, head_dim=128, query_pre_attn_scalar=144,
    )  # fmt: skip
    model = jaxtc.Gemma2.abstract(config, jnp.bfloat16)
    found = estimate(model, (64, 4096), capture=["resid_post", At("mlp_out")], logits="last")
    tokens = 64 * 4096
    assert found.activations["layers.45.resid_post"] == tokens * 4608 * 2
    assert found.activations["At(mlp_out)"] == 46 * 64 * 4608 * 2
    assert found.logits == 64 * 256000 * 4
    assert found.weights == 54_454_256_640  # 27.2 billion parameters, as published
    assert found.padding == 0 and found.workspace == 64 * 32 * 4096 * 4096 * 4
    with pytest.raises(CapacityError, match="needs at least"):
        check_fits(found.needed, "this run")


def test_workspace():
    """The largest of what a layer makes on the way."""

    def work(tokens=(B, 16), **options):
        return estimate(tiny.model(), tokens, **options).workspace

    assert work() == B * W * 4 * 16 * 4  # scores (B, N, W, W), above (B, W, F)
    assert work((B, 5)) == work()
    logits = B * 32 * V * 4
    assert work((B, 32), logits=None) == B * 4 * 32 * 32 * 4 > logits
    wide = dataclasses.replace(tiny.config(), vocab_size=5000)
    for options in ({"capture": TopK("logits", 2)}, {"capture": "logits"}, {}):
        edit = jaxtc.SetTo(0.0, site="logits")
        edits = [edit] if not options else []
        for kept, size in (("last", B * 16 * 5000 * 4), ("all", B * 4 * 16 * 16 * 4)):
            found = estimate(wide, (B, 16), logits=kept, edits=edits, **options)
            assert found.workspace == size
    zero = jaxtc.Zero(site="head_out", layer=1, head=0)
    small = dataclasses.replace(tiny.config(), hidden_size=500)
    assert estimate(small, (B, 16)).workspace == B * 4 * 16 * 16 * 4
    for options in ({"edits": [zero]}, {"capture": At("head_out", -1)}):
        assert estimate(small, (B, 16), **options).workspace == B * 16 * 4 * 500 * 4
    features = Features(transcoder=tiny.transcoder(1, 5000), capacity=2)
    assert work(capture=features) == B * 16 * 5000 * 4
    splice = unspared.Splice(tiny.transcoder(1, 5000))
    assert work(edits=[splice]) == B * 16 * 5000 * 4
    assert work(edits=[unspared.SetFeature(tiny.transcoder(1, 5000), 3, 1.0)]) == work()


def test_table():
    capture = ["mlp_out", "layers.0.q", At("resid_post")]
    lines = str(estimate(tiny.model(), PROMPTS, capture=capture)).splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        "q", "mlp_out, 3 layers", "At(resid_post)", "logits", "kept", "needed to run, at least",
        "weights (besides)",
    ]  # fmt: skip
    assert "float32[3, 9, 24]" in lines[1] and lines[1].endswith("  7.8 kB")
    assert len({len(line) for line in lines}) == 1


@pytest.mark.parametrize("prompts", [PROMPTS, [[2] * 16] * 3], ids=["padded", "full"])
@pytest.mark.parametrize("capture", CAPTURES)
def test_a_run_is_checked_for_what_the_estimate_says(capture, prompts, monkeypatch):
    capture = CAPTURES[capture]
    asked, given = understand(capture, LAYERS), prepare(prompts, tiny.config())
    reducers = asked.checked(tiny.config(), given)
    shape = (len(prompts), given.length)
    edits = [jaxtc.SetTo(0.0, site="logits")]
    checked = []
    monkeypatch.setattr(memory, "_SMALL", 0)
    monkeypatch.setattr(memory, "check_fits", lambda *args: checked.append(args))
    for logits in ("all", "last"):
        leaves = jax.tree.leaves(tiny.model())
        check_run(tiny.config(), leaves, shape, asked.addresses, reducers, logits, edits)
        whole = estimate(tiny.model(), prompts, capture=capture, logits=logits, edits=edits)
        assert checked.pop() == (whole.needed, "What this run keeps", set(jax.devices()[:1]))


def test_a_run_that_cannot_fit_is_refused_before_it_runs():
    """281 TB of logits and 4 of scores; in a trace too, where the weights are on no device."""
    config = dataclasses.replace(tiny.config(), vocab_size=2**24, max_position_embeddings=2**16)

    def check(leaf):
        check_run(config, [leaf], (64, 2**16), (), (), "all")

    for call in (check, jax.jit(check)):
        with pytest.raises(CapacityError, match="What this run keeps needs at least 286 TB"):
            call(jnp.ones(1))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tokens": (3,)}, InputError, r"\(B, T\)"),
        ({"tokens": (3, 0)}, InputError, r"\(B, T\)"),
        ({"tokens": (2, 5, 7)}, InputError, "token ids are given as lists"),
        ({"tokens": [[999]]}, InputError, "outside the model's vocabulary"),
        ({"logits": "some"}, InputError, "expected 'all', 'last' or None"),
        ({"capture": "resid_pots"}, SiteError, "no site called"),
        ({"capture": TopK("q", 9)}, InputError, "k is 9"),
        ({"capture": At("q", 20)}, jaxtc.JaxtcError, "lies outside"),
    ],
)
def test_refused(options, error, message):
    options = {"tokens": PROMPTS, **options}
    with pytest.raises(error, match=message):
        estimate(tiny.model(), options.pop("tokens"), **options)


# Whether it fits


@dataclasses.dataclass(eq=False)
class Accelerator:
    stats: dict | None
    platform: str = "gpu"
    id: int = 1
    process_index: int = 0

    def memory_stats(self):
        return self.stats


def test_check_fits(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 3 * 2**30)
    check_fits(3 * 2**30, "this run")
    with pytest.raises(CapacityError) as caught:
        check_fits(5 * 2**30, "What this run keeps")
    message = str(caught.value)
    assert message.startswith("What this run keeps needs at least 5.4 GB of memory, and 3.2 GB")
    for hint in ("jaxtc.reducers.At", "logits='last'", "fewer layers", "fewer or shorter prompts"):
        assert hint in message
    assert "\n" not in message
    monkeypatch.setattr(memory, "available", lambda device: None)
    check_fits(2**60, "this run")  # nobody knows


def test_devices_of_one_cpu_share_its_memory(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: 2**30)
    devices = [Accelerator(None, "cpu", index) for index in range(8)]
    check_fits(2**30, "this run", devices)
    with pytest.raises(CapacityError, match="on this machine"):
        check_fits(2**30 + 1, "this run", devices)


def test_small_needs_do_not_look_at_the_machine(monkeypatch):
    monkeypatch.setattr(memory, "available", lambda device: pytest.fail("looked"))
    check_fits(64 * 2**20 - 1, "this run")


def test_accelerators():
    device = Accelerator({"bytes_limit": 2**30, "bytes_in_use": 2**29})
    assert machine.available(device) == 2**29
    with pytest.raises(CapacityError, match="537 MB are available on gpu 1"):
        check_fits(2**29 + 1, "this run", {device})
    other = Accelerator(None, id=2, process_index=1)  # of another process: as full as ours
    check_fits(2**30, "this run", {device, other})
    with pytest.raises(CapacityError, match="537 MB"):
        check_fits(2**30 + 2, "this run", {device, other})
    check_fits(2**50, "this run", {other})
    for silent in (None, {}):
        assert machine.available(Accelerator(silent)) is None


def files(root, **contents):
    for name, text in contents.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def pretend(monkeypatch, tmp_path):
    """A machine of 1000 KiB available."""
    monkeypatch.setattr(machine, "_PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "_CGROUP", tmp_path / "cgroup")
    files(tmp_path, proc__meminfo="MemTotal:  2000 kB\nMemFree: 1 kB\nMemAvailable:  1000 kB\n")
    return tmp_path


def write(root, folder, names, limit, used, stat):
    place = root / "cgroup" / folder
    place.mkdir(parents=True, exist_ok=True)
    for name, text in zip(names, (limit, used, stat), strict=True):
        (place / name).write_text(f"{text}\n")


V2 = ("memory.max", "memory.current", "memory.stat")
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "memory.stat")


def test_the_machine_without_limits(pretend):
    assert machine.available() == 1000 * 1024
    files(pretend, proc__self__cgroup="0::/job\n")
    write(pretend, "job", V2, "max", 5, "")
    assert machine.available() == 1000 * 1024


@pytest.mark.parametrize("path", ["/job/step", "/../host/path/of/a/container"])
def test_limits_of_a_control_group(pretend, path):
    """Page cache can be dropped; the tightest of the groups counts."""
    files(pretend, proc__self__cgroup=f"0::{path}\n")
    folder = "job" if path.startswith("/job") else ""
    write(pretend, folder, V2, 5000, 3000, "anon 9\ninactive_file 200\nactive_file 40\nfile 900")
    assert machine.available() == 2240
    if folder:
        write(pretend, "job/step", V2, 1000, 900, "inactive_file 0")
        assert machine.available() == 100
        write(pretend, "job/step", V2, 1000, 1200, "")
        assert machine.available() == 0


def test_limits_of_the_older_kind(pretend):
    files(pretend, proc__self__cgroup="5:cpu,cpuacct:/\n4:memory:/job\n0::/\n")
    stat = "inactive_file 7\ntotal_inactive_file 200\ntotal_active_file 40"
    write(pretend, "memory/job", V1, 5000, 3000, stat)
    write(pretend, "memory", V1, 9223372036854771712, 4000, stat)
    assert machine.available() == 2240


def test_other_systems(pretend, monkeypatch):
    (pretend / "proc" / "meminfo").unlink()
    sizes = {"SC_PHYS_PAGES": 1000, "SC_PAGE_SIZE": 4096}
    monkeypatch.setattr(machine.os, "sysconf", sizes.__getitem__)
    assert machine.available() == 4096000
    monkeypatch.delattr(machine.os, "sysconf")
    assert machine.available() is None


def test_this_machine():
    assert 2**20 < machine.available() < 2**50

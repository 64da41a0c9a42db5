"""The hub: a small server on this machine answers as the real one does, headers and refusals."""

import contextlib
import hashlib
import http.server
import json
import shutil
import threading
from collections import Counter
from pathlib import Path
from urllib.parse import unquote

import huggingface_hub
import pytest
import safetensors.numpy
from flax import nnx

import jaxtc
from jaxtc.errors import ConfigError, SiteError, SourceError, WeightsError
from jaxtc.transcoders.activations import TopK
from jaxtc.weights.checkpoints.sidecar import read_sidecar
from jaxtc.weights.conversion.convert import convert
from jaxtc.weights.files.layout import GEMMA_SCOPE_2B
from jaxtc.weights.sources import hub
from tests.support import tiny
from tests.support.weights_files import params, random_model, same, write_tier

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """Repositories as folders below ``root``; names in ``refusals`` answer with an error."""

    def __init__(self, root):
        self.root, self.refusals, self.sent = root, {}, Counter()
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_HEAD(self):
                self.answer(head=True)

            def do_GET(self):
                self.answer(head=False)

            def answer(self, head):
                status, headers, body = fake.respond(unquote(self.path.split("?")[0]), head)
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if not head:
                    self.wfile.write(body)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    def respond(self, path, head):
        api = path.startswith("/api/models/")
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repo = "/".join(parts[:2])
        if repo in self.refusals:
            status, code = self.refusals[repo]
            return status, {"X-Error-Code": code, "X-Error-Message": "no."}, b""
        folder = self.root / repo
        if not folder.is_dir():
            return 401, {"X-Error-Code": "RepoNotFound"}, b""
        files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        if api:
            if parts[2] == "tree":
                body = [
                    {"type": "file", "path": name, "size": file.stat().st_size, "oid": "0"}
                    for name, file in files.items()
                ]
            else:
                body = {
                    "id": repo, "sha": COMMIT, "private": False, "downloads": 0, "tags": [],
                    "siblings": [{"rfilename": name} for name in files],
                }  # fmt: skip
            return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()
        revision, name = parts[3], "/".join(parts[4:])
        if revision not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        if name not in files:
            return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
        body = files[name].read_bytes()
        self.sent[name] += not head
        etag = f'"{hashlib.sha256(body).hexdigest()}"'  # as of the real one's large files
        return 200, {"ETag": etag, "X-Repo-Commit": COMMIT}, body


@pytest.fixture
def server(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path / "hub")
    constants = huggingface_hub.constants
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", fake.url)
    monkeypatch.setattr(
        constants,
        "HUGGINGFACE_CO_URL_TEMPLATE",
        fake.url + "/{repo_id}/resolve/{revision}/{filename}",
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", fake.url)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)  # its retries
    # A client made earlier in this process may have been told of a proxy.
    huggingface_hub.close_session()
    yield fake
    huggingface_hub.close_session()
    with contextlib.suppress(OSError):
        fake.close()


@pytest.fixture
def model():
    return random_model()


def fill(server, model, repo="google/gemma-2-tiny", **options):
    folder = server.root / repo
    folder.parent.mkdir(parents=True, exist_ok=True)
    return jaxtc.save_model(model, folder, **options)


@pytest.mark.parametrize("shard", [10**9, 6000])
def test_model_from_the_hub_then_from_the_cache(server, model, shard, monkeypatch):
    folder = fill(server, model, max_shard_size=shard)
    # What else lies in a repository is left there.
    for extra in ("consolidated.safetensors", "pytorch_model.bin", "modeling.py"):
        (folder / extra).write_bytes(b"huge")
    assert same(model, jaxtc.load_model("google/gemma-2-tiny", dtype="float32"))
    wanted = {p.name for p in folder.iterdir() if p.name.startswith(("model", "config"))}
    assert set(server.sent) == wanted - {"modeling.py"} and set(server.sent.values()) == {1}

    server.close()
    assert same(model, jaxtc.load_model("google/gemma-2-tiny", dtype="float32"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert same(model, jaxtc.load_model("google/gemma-2-tiny", dtype="float32"))
    assert same(model, jaxtc.load_model("google/gemma-2-tiny", dtype="float32", revision=COMMIT))


def test_other_architecture_is_found_before_its_weights_are_fetched(server, model):
    folder = fill(server, model)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError, match="llama"):
        jaxtc.load_model("google/gemma-2-tiny")
    assert set(server.sent) == {"config.json"}


@pytest.mark.parametrize("refusal", [(401, "GatedRepo"), (403, "GatedRepo"), (403, "")])
def test_gated_repository_without_access(server, refusal):
    server.refusals["google/gemma-2-2b"] = refusal
    for call in (jaxtc.load_model, jaxtc.load_tokenizer):
        with pytest.raises(SourceError) as error:
            call("google/gemma-2-2b")
        message = str(error.value)
        assert "https://huggingface.co/google/gemma-2-2b" in message and "licence" in message
        assert "hf auth login" in message and "HF_TOKEN" in message and "\n" not in message


def test_hub_that_is_out_of_order(server):
    server.refusals["google/gemma-2-2b"] = (500, "")
    with pytest.raises(SourceError, match="status 500. Try again later"):
        jaxtc.load_model("google/gemma-2-2b")


def test_repository_that_does_not_exist(server):
    with pytest.raises(SourceError, match="no repository 'google/gemma-22'.*spelling"):
        jaxtc.load_model("google/gemma-22")
    with pytest.raises(SourceError, match="no repository 'some/transcoders'"):
        jaxtc.load_transcoder("some/transcoders", 3)


def test_revision_that_does_not_exist(server, model):
    fill(server, model)
    with pytest.raises(SourceError, match="no revision 'v9'"):
        jaxtc.load_model("google/gemma-2-tiny", revision="v9")


def test_repository_without_the_files(server):
    (server.root / "some/data").mkdir(parents=True)
    with pytest.raises(SourceError, match="no file some/data/config.json"):
        jaxtc.load_model("some/data")
    with pytest.raises(SourceError, match="no file some/data/tokenizer_config.json"):
        jaxtc.load_tokenizer("some/data")


def test_missing_shard(server, model):
    folder = fill(server, model, max_shard_size=6000)
    lost = sorted(folder.glob("*.safetensors"))[2]
    lost.unlink()
    with pytest.raises(SourceError, match=f"no file google/gemma-2-tiny/{lost.name}"):
        jaxtc.load_model("google/gemma-2-tiny")


def test_hub_that_cannot_be_reached(server):
    server.close()
    with pytest.raises(SourceError, match="cannot be reached.*'embedded'"):
        jaxtc.load_model("google/gemma-2-2b")
    with pytest.raises(SourceError, match="cannot be reached"):
        jaxtc.load_transcoder("google/gemma-scope-2b-pt-transcoders", 20)
    with pytest.raises(SourceError, match="cannot be reached"):
        jaxtc.load_transcoders("some/transcoders")


def test_offline_mode(server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE"):
        jaxtc.load_model("google/gemma-2-2b")
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE"):
        jaxtc.load_transcoders("some/transcoders")


def test_model_id_with_a_path(server):
    with pytest.raises(SourceError, match="has two parts, such as 'google/gemma-2-2b'"):
        jaxtc.load_model("google/gemma-2-2b/layer_20")


def test_tokenizer(server, model, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"Texas": 0})))
    folder = fill(server, model, tokenizer=made)
    (folder / "tokenizer.py").write_text("raise SystemExit")
    for _ in range(2):  # fetched, then from the cache alone
        loaded = jaxtc.load_tokenizer("google/gemma-2-tiny")
        assert loaded.convert_tokens_to_ids("Texas") == 0
        shutil.rmtree(server.root)
        (server.root / "google/gemma-2-tiny").mkdir(parents=True)
        with contextlib.suppress(OSError):
            server.close()
    assert not any(name.endswith((".py", ".safetensors")) for name in server.sent)


@pytest.fixture
def scope(server):
    repo = server.root / "google/gemma-scope-2b-pt-transcoders"
    for place in ("layer_20/width_16k/average_l0_11", "layer_20/width_16k/average_l0_31",
                  "layer_3/width_16k/average_l0_54"):  # fmt: skip
        write_tier(repo, place)
    return "google/gemma-scope-2b-pt-transcoders"


@pytest.mark.parametrize(
    ("source", "options", "expected"),
    [
        ("", {"layer": 20}, "layer_20/width_16k/average_l0_11"),
        ("/layer_20/width_16k/average_l0_31", {}, "layer_20/width_16k/average_l0_31"),
        ("/layer_20/width_16k/average_l0_31/params.npz", {}, "layer_20/width_16k/average_l0_31"),
        ("", {"path": "layer_3/width_16k/average_l0_54"}, "layer_3/width_16k/average_l0_54"),
        ("/layer_20", {}, "layer_20/width_16k/average_l0_11"),
        ("", {"path": "layer_3"}, "layer_3/width_16k/average_l0_54"),
    ],
)
def test_transcoder_from_the_hub(server, scope, source, options, expected):
    loaded = jaxtc.load_transcoder(scope + source, **options)
    assert loaded.source == f"{scope}/{expected}"
    assert loaded.layer == int(expected.split("/")[0].removeprefix("layer_"))
    assert dict(server.sent) == {f"{expected}/params.npz": 1}


def test_transcoders_of_another_repository(server, scope):
    (server.root / scope).rename(server.root / "google/other")
    sites = {"input_site": "mlp_in", "output_site": "mlp_out"}
    assert list(jaxtc.load_transcoders("google/other", **sites)) == [3, 20]
    with pytest.raises(SiteError, match="Nothing says which sites google/other/layer_3"):
        jaxtc.load_transcoder("google/other", 3)
    with pytest.raises(SourceError, match="layer 4; it has layers 3, 20"):
        jaxtc.load_transcoder("google/other", 4)


@pytest.mark.parametrize(("kind", "site"), [("res", "resid_post"), ("att", "attn_heads")])
def test_autoencoders_from_the_hub(server, kind, site):
    repo = f"google/gemma-scope-9b-pt-{kind}"
    for place in ("layer_9/width_16k/average_l0_12", "layer_9/width_131k/average_l0_51",
                  "embedding/width_4k/average_l0_6"):  # fmt: skip
        write_tier(server.root / repo, place)
    loaded = jaxtc.load_transcoder(repo, 9, width="131k")
    assert (loaded.input_site, loaded.output_site, loaded.layer) == (site, site, 9)
    assert loaded.source == f"{repo}/layer_9/width_131k/average_l0_51"
    assert jaxtc.load_transcoder(f"{repo}/layer_9/width_16k/average_l0_12").input_site == site
    with pytest.raises(SourceError, match="has 2 transcoders for layer 9; choose one by its path"):
        jaxtc.load_transcoder(repo, 9)
    if kind == "res":
        embedding = jaxtc.load_transcoder(f"{repo}/embedding/width_4k/average_l0_6")
        assert (embedding.input_site, embedding.layer) == ("embed", None)
    assert jaxtc.load_transcoder(repo, 9, width="131k", l0="canonical").layer == 9


def test_what_is_cached_needs_no_hub(server, scope):
    places = [(scope, 20, {}), (f"{scope}/layer_20/width_16k/average_l0_31", None, {})]
    repo = server.root / "google/gemma-scope-2-1b-pt"
    name = "resid_post/layer_3_width_16k_l0_big"
    arrays = params()
    made = {"w_enc": arrays["W_enc"], "w_dec": arrays["W_dec"], "threshold": arrays["threshold"]}
    made |= {"b_enc": arrays["b_enc"], "b_dec": arrays["b_dec"]}
    (repo / name).mkdir(parents=True)
    safetensors.numpy.save_file(made, repo / name / "params.safetensors")
    places.append((f"google/gemma-scope-2-1b-pt/{name}", None, {}))
    first = [jaxtc.load_transcoder(source, layer, **more) for source, layer, more in places]
    server.close()
    again = [jaxtc.load_transcoder(source, layer, **more) for source, layer, more in places]
    assert all(map(same, first, again)) and again[2].input_site == "resid_post"


def test_folders_of_saelens_from_the_hub(server):
    made = Path(__file__).parent / "saelens"
    for repo, name in [
        ("me/one", ""),
        ("me/several", "blocks.1.hook_resid_post"),
        ("me/odd", "a/b"),
    ]:
        shutil.copytree(made / "topk_rescaled", server.root / repo / name)
    local = jaxtc.load_transcoder(made / "topk_rescaled")
    for load in (
        lambda: jaxtc.load_transcoder("me/one"),
        lambda: jaxtc.load_transcoders("me/one")[1],
        lambda: jaxtc.load_transcoder("me/several", 1),
        lambda: jaxtc.load_transcoders("me/several")[1],
        lambda: jaxtc.load_transcoder("me/odd/a/b"),
        lambda: jaxtc.load_transcoder("me/odd", path="a/b"),
    ):
        loaded = load()
        loaded.source = local.source
        assert same(loaded, local)
    with pytest.raises(SourceError, match="me/odd holds no transcoders"):
        jaxtc.load_transcoder("me/odd")


def test_sets_of_circuit_tracer_from_the_hub(server, scope):
    head = "model_kind: transcoder_set\nfeature_output_hook: hook_mlp_out\nfeature_input_hook: "
    listed = server.root / "me/listed"
    listed.mkdir(parents=True)
    places = [
        f"{scope}/layer_{n}/width_16k/average_l0_{m}/params.npz" for n, m in ((20, 31), (3, 54))
    ]
    lines = "".join(f"- hf://{place}?revision={COMMIT}\n" for place in places)
    (listed / "config.yaml").write_text(f"{head}ln2.hook_normalized\ntranscoders:\n{lines}")
    with pytest.raises(
        SourceError, match="in the place of layer 0, and by its name it is of layer 20"
    ):
        jaxtc.load_transcoder("me/listed", 0)
    (listed / "config.yaml").write_text(
        f"{head}ln2.hook_normalized\ntranscoders:\n{lines}".replace("layer_20", "layer_0")
    )
    (server.root / scope / "layer_20").rename(server.root / scope / "layer_0")
    (server.root / scope / "layer_3").rename(server.root / scope / "layer_1")
    (listed / "config.yaml").write_text(
        (listed / "config.yaml").read_text().replace("layer_3", "layer_1")
    )
    shutil.rmtree(huggingface_hub.constants.HF_HUB_CACHE)
    loaded = jaxtc.load_transcoders("me/listed")
    assert {n: (t.layer, t.input_site) for n, t in loaded.items()} == {
        0: (0, "mlp_in_normed"), 1: (1, "mlp_in_normed")
    }  # fmt: skip
    assert loaded[1].source == f"{scope}/layer_1/width_16k/average_l0_54"
    # And files that lie beside their config.
    own = server.root / "me/own/some"
    made = jaxtc.Transcoder(8, 24, layer=0, activation=TopK(3), rngs=nnx.Rngs(0))
    jaxtc.save_transcoder(made, own, format="circuit-tracer")
    (own / "config.yaml").write_text(f"{head}ln2.hook_normalized\nactivation: topk\nk: 3\n")
    for source in ("me/own", "me/own/some"):
        found = jaxtc.load_transcoder(source, 0)
        found.source = made.source
        assert same(found, made)


def test_transcoders_that_the_hub_does_not_have(server, scope):
    with pytest.raises(SourceError, match="no transcoder for layer 26; it has layers 0, 1"):
        jaxtc.load_transcoder(scope, 26)
    with pytest.raises(SourceError) as error:
        jaxtc.load_transcoder(f"{scope}/layer_20/width_16k/average_l0_12")
    assert "layer_20/width_16k/average_l0_11" in str(error.value)


def test_conversions_from_the_hub(server, model, scope, tmp_path):
    fill(server, model, tokenizer=tiny.tokenizer(), max_shard_size=6000)
    tree = convert("google/gemma-2-tiny", tmp_path / "model", verify=True)
    assert (read_sidecar(tree).kind, read_sidecar(tree).revision) == ("model", COMMIT)
    assert read_sidecar(tree).source == "google/gemma-2-tiny"
    assert same(model, jaxtc.load_model(tree, dtype="float32"))
    assert jaxtc.load_tokenizer(tree).encode("the city") == tiny.tokenizer().encode("the city")
    back = convert(tree, tmp_path / "back", "safetensors", max_shard_size=6000)
    original = server.root / "google/gemma-2-tiny"
    assert {p.name for p in back.iterdir()} == {p.name for p in original.iterdir()}
    assert all((back / p.name).read_bytes() == p.read_bytes() for p in original.iterdir())
    # The bytes of the cache are the hub's, until a disk fails.
    cached = next((tmp_path / "cache").rglob("snapshots/*/model-00002*")).resolve()
    cached.write_bytes(cached.read_bytes()[:-1] + b"x")
    with pytest.raises(WeightsError, match="model-00002.* is not what the Hugging Face hub has"):
        convert("google/gemma-2-tiny", tmp_path / "damaged", verify=True)

    tree = convert(GEMMA_SCOPE_2B, tmp_path / "scope", layers=[20], verify=True)
    assert (read_sidecar(tree).kind, read_sidecar(tree).revision) == ("transcoders", COMMIT)
    assert same(jaxtc.load_transcoder(tree), jaxtc.load_transcoder(GEMMA_SCOPE_2B, 20))


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        ("google/gemma-2-2b", ("google/gemma-2-2b", "")),
        ("google/x/layer_1/width_1k", ("google/x", "layer_1/width_1k")),
        ("/google/x", None),
        ("./google/x", None),
        ("google", None),
        ("google/../x", None),
        ("google//x", None),
        ("google/x//y", None),
        ("goo gle/x", None),
        ("", None),
    ],
)
def test_what_is_a_hub_id(source, parts):
    assert hub.split_id(source) == parts

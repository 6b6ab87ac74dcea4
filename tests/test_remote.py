"""Remote execution against a local stand-in: nnsight's own rehearsal of the wire format, with nothing of ours at hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from conformance import addresses, close, one, read
from families import make, prompt
from nnsight import TransformersModel
from nnsight.intervention.backends.local import LocalSimulationBackend
from nnsight.intervention.backends.remote import RemoteError
from reference import edit, edited, expected
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from analyses.cli import main
from probes.capture.needs import Need
from probes.capture.run import capture
from probes.errors import ModelError, OptionError, PointError
from probes.models import as_bridge, load_model
from probes.models.backends.remote import RemoteModel, server_client
from probes.points import POINTS, Address
from probes.reducers import Reducer
from probes.store import ActivationStore

GIVEN = [point for point in POINTS if point != "pattern"]


class Server:
    """Stands in for a server: counts the requests, and fails some of them."""

    def __init__(self) -> None:
        self.requests = 0
        self.failing: dict[int, BaseException] = {}

    def __call__(self, traced: Any) -> Callable[[Any], None]:
        run = LocalSimulationBackend(traced)

        def send(tracer: Any) -> None:
            self.requests += 1
            if error := self.failing.get(self.requests):
                raise error
            run(tracer)

        return send


def folder_of(family: str, folder: Path) -> Path:
    make(family).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2").save_pretrained(folder)
    return folder


def remote(family: str, folder: Path, server: Server) -> RemoteModel:
    path = folder_of(family, folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
    traced = TransformersModel(str(path), task="text-generation", tokenizer=tokenizer)
    return RemoteModel(traced, server, ref=f"tiny/{family}")


@pytest.fixture(scope="module")
def server() -> Server:
    return Server()


@pytest.fixture(scope="module")
def llama(server: Server, tmp_path_factory: pytest.TempPathFactory) -> RemoteModel:
    return remote("llama", tmp_path_factory.mktemp("llama"), server)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_neox", "opt"])
def test_every_point_is_the_right_tensor_or_refused(family: str, tmp_path: Path) -> None:
    model, right = remote(family, tmp_path, Server()), expected(family)
    assert model.faithfulness.holds
    assert "server" in model.faithfulness.refused["pattern"]
    readable = [a for name in GIVEN for a in addresses(name, model) if model.refusal(a) is None]
    assert len(readable) > 40
    for address, tensor in read(model, readable, prompt(rows=2)).items():
        close(tensor, right[str(address)])


@pytest.mark.parametrize("point", ["resid_pre", "resid_mid", "attn_in", "v", "z", "mlp_out", "resid_post", "logits"])
def test_an_edit_gives_what_plain_hooks_give(point: str, llama: RemoteModel) -> None:
    address = Address(point, 1 if POINTS[point].layered else None)
    logits = one(llama, Address("logits"), prompt(rows=2), {address: edit})
    close(logits, edited("llama", point, 1))


def test_several_edits_compose(llama: RemoteModel) -> None:
    edits = {Address(p, 1): (lambda old: old * 0) for p in ("attn_out", "mlp_out")}
    tensors = read(llama, [Address("resid_pre", 1), Address("resid_post", 1)], prompt(), edits)
    assert torch.equal(tensors[Address("resid_post", 1)], tensors[Address("resid_pre", 1)])


def test_a_forward_is_one_request_and_each_written_place_one_more(llama: RemoteModel, server: Server) -> None:
    before = server.requests
    read(llama, [Address("resid_post", layer) for layer in range(3)], prompt())
    assert server.requests == before + 1
    one(llama, Address("logits"), prompt(), {Address("mlp_out", 1): lambda old: old * 2})
    assert server.requests == before + 3


def test_what_stays_on_the_server_is_refused_by_name(llama: RemoteModel) -> None:
    with pytest.raises(PointError, match="weights stay on the server"):
        llama.unembedding()
    assert "weights" in llama.faithfulness.refused["lens"]
    with pytest.raises(PointError, match="keeps no cache"):
        llama.generate([5, 6], 2)
    with pytest.raises(PointError, match="attention function runs on the server"):
        llama.run(prompt(), {Address("pattern", 0): lambda _: None})
    with pytest.raises(ModelError, match="stay on the server"):
        as_bridge(llama)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            RemoteError("Traceback\nModel tiny/llama is not deployed"),
            "server refuses: Model tiny/llama is not deployed",
        ),
        (RemoteError("Failed to send request: invalid API key"), "server refuses: .*invalid API key"),
        (httpx.ConnectError("no route to host"), "cannot be reached .*no route to host.*goes on from there"),
        (ConnectionResetError("peer gone"), "broke off .*peer gone.*NDIF_HOST"),
    ],
)
def test_refusals_and_outages_are_clear_errors(
    error: BaseException, message: str, llama: RemoteModel, server: Server
) -> None:
    server.failing = {server.requests + 1: error}
    with pytest.raises(ModelError, match=message):
        one(llama, Address("logits"), prompt())
    server.failing = {}
    assert one(llama, Address("logits"), prompt()).shape == (1, 9, 97)


def test_a_store_goes_on_after_an_outage(llama: RemoteModel, server: Server, store: ActivationStore) -> None:
    sequences = [tuple(prompt(length, seed=length)[0].tolist()) for length in (3, 4, 5, 6, 7)]
    need = [Need(("resid_post.1",), Reducer("rows"))]

    def fill() -> int:
        return capture(llama, sequences, need, store, batch_tokens=1).done.forwards

    server.failing = {server.requests + 4: httpx.ReadTimeout("too slow")}
    with pytest.raises(ModelError, match="goes on from there"):
        fill()
    server.failing = {}
    before = server.requests
    assert fill() == 2, "three prompts came before the outage"
    assert server.requests == before + 2
    assert fill() == 0


def test_nnsight_s_own_client_carries_the_key_and_says_when_nobody_answers(
    llama: RemoteModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NDIF_HOST", "http://127.0.0.1:9")
    monkeypatch.setattr(type(llama.traced), "to_model_key", lambda self: "some.Class:key")
    client = server_client("from the environment")
    assert client(llama.traced).api_key == "from the environment"
    monkeypatch.setattr(llama, "client", client)
    with pytest.raises(ModelError, match=r"cannot be reached .*NDIF_HOST"):
        one(llama, Address("logits"), prompt())


def test_the_key_comes_from_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    with pytest.raises(OptionError, match="NDIF_API_KEY"):
        load_model("openai-community/gpt2", backend="nnsight", remote=True)
    monkeypatch.setenv("NDIF_API_KEY", "key")
    with pytest.raises(OptionError, match="backend nnsight"):
        load_model("openai-community/gpt2", remote=True)
    with pytest.raises(ModelError, match="hub id"):
        load_model("smollm2-135m", backend="nnsight", remote=True)


def test_the_flag_without_a_key_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NDIF_API_KEY", raising=False)
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"tokens": [5, 6]}\n')
    args = ["--model", "openai-community/gpt2", "--prompts", str(prompts), "--backend", "nnsight", "--remote"]
    assert main(["run", "voids", *args]) == 2
    assert "set the environment variable NDIF_API_KEY" in capsys.readouterr().err


def test_a_model_that_cannot_be_rehearsed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be told without its weights"):
        remote("gpt2", tmp_path, Server())

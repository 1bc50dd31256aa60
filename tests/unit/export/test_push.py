"""``--push`` against a stand-in for the Hub on loopback."""

import socket

import pytest
from huggingface_hub import constants

from megatron_attnedit.checkpoint import conversion
from megatron_attnedit.errors import UserError
from megatron_attnedit.export.push import check_push, push
from tests.support.conversions import make
from tests.support.inputs import make_student
from tests.support.models import tiny_hf_dir
from tests.unit.export.stand_in_hub import Hub


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    for module in ("hf_api", "_commit_api"):  # large files by LFS, which the stand-in has
        monkeypatch.setattr(f"huggingface_hub.{module}.is_xet_available", lambda: False)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def test_a_student_is_uploaded_whole(hub, tmp_path):
    tiny_hf_dir(tmp_path / "hf")
    make_student(tmp_path, "mla", "mla", {"kv_lora_rank": 16})
    folder = make(tmp_path / "mla", tmp_path / "student", "hf", push="org/student")
    written = {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert hub.files["org/student"] == written
    assert {"README.md", "config.json", "model.safetensors", "attnedit.json"} <= written.keys()
    assert hub.private["org/student"] is True
    assert "Bearer hf_stand_in" in hub.tokens


def test_refused_by_the_hub(hub, tmp_path):
    hub.refuse = True
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=f"^--push a/b: {tmp_path} is written.*403") as error:
        push(tmp_path, "a/b")
    assert "\n" not in str(error.value) and (tmp_path / "config.json").exists()


def test_no_network(hub, tmp_path, monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", nobody)
        with pytest.raises(UserError, match="^--push a/b: .* is written, but not uploaded: ") as e:
            push(tmp_path, "a/b")
    assert "\n" not in str(e.value)


def test_what_is_found_before_the_work(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(conversion, "open_checkpoint", lambda *a, **k: pytest.fail("opened"))

    def refused(repo):
        with pytest.raises(UserError, match=f"^--push {repo}: ") as error:
            make(tmp_path, tmp_path / "out", "hf", push=repo)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "epo" in refused("a/b/c")
    monkeypatch.setattr("megatron_attnedit.export.push.get_token", lambda: None)
    assert "no token" in refused("a/b")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refused("a/b")
    with pytest.raises(UserError, match="--push a/b: only hf directories"):
        make(tmp_path, tmp_path / "out", "torch_dist", push="a/b")
    monkeypatch.undo()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_stand_in")
    check_push("org/student")

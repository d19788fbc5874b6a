"""Uploading by itself: pull requests, what a Hub refuses, and what it only refuses for a while."""

import pytest
from huggingface_hub import HfApi

from transformers_moe_offload.hub import upload as upload_module
from transformers_moe_offload.hub.upload import Layout, UploadError, expect_pushable, upload

from .server import TOKEN, Hub, Repo

REPO = "somebody/mixture"
LAYOUT = Layout(last="config.json", replaced=("model*.safetensors",), message="A mixture")
FILES = {"config.json": b"{}", "model.safetensors": b"w" * 20_000, "README.md": b"# It\n"}


@pytest.fixture
def hub():
    with Hub() as hub:
        yield hub
    assert hub.unknown == []


@pytest.fixture
def api(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
    return HfApi(endpoint=hub.endpoint, token=TOKEN)


@pytest.fixture
def waits(monkeypatch):
    """How long was waited, without waiting; huggingface_hub's own waits are its own affair."""
    waited = []
    monkeypatch.setattr(upload_module.time, "sleep", waited.append)
    return waited


@pytest.fixture
def folder(tmp_path):
    for name, content in FILES.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "model.safetensors.partial").write_bytes(b"half")
    yield tmp_path
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir() if file.name in FILES} == FILES


def uploaded(hub, revision: str = "main") -> dict[str, bytes]:
    return {name: content for name, content in hub.files(REPO, revision).items() if name != ".gitattributes"}


def test_a_pull_request_holds_everything_and_main_nothing(hub, api, folder):
    url = upload(api, folder, REPO, LAYOUT, create_pr=True)
    assert url == f"{hub.endpoint}/{REPO}/discussions/1"
    assert uploaded(hub, "refs/pr/1") == FILES
    assert uploaded(hub) == {}


def test_a_second_pull_request_is_another_one(hub, api, folder):
    upload(api, folder, REPO, LAYOUT, create_pr=True)
    assert upload(api, folder, REPO, LAYOUT, create_pr=True).endswith("/discussions/2")
    assert uploaded(hub, "refs/pr/2") == FILES


def test_a_pull_request_against_a_branch_is_refused_before_anything_happens(hub, api, folder):
    with pytest.raises(UploadError, match="against main, but revision is 'v2'"):
        upload(api, folder, REPO, LAYOUT, create_pr=True, revision="v2")
    assert hub.repos == {}


def test_no_commit_in_between_has_the_file_that_makes_it_loadable(hub, api, folder):
    api.create_repo(REPO)
    old = {"config.json": b"old", "model-00001-of-00002.safetensors": b"old", "notes.txt": b"kept"}
    hub.repos[REPO].add_commit("main", hub.files(REPO) | old)
    upload(api, folder, REPO, LAYOUT)
    *between, last = [hub.repos[REPO].trees[commit] for commit in hub.repos[REPO].branches["main"][2:]]
    assert all("config.json" not in tree for tree in between)
    assert between
    assert last["config.json"] == b"{}"
    assert uploaded(hub) == FILES | {"notes.txt": b"kept"}


def test_a_token_that_is_none_of_ours_is_told_to_log_in(hub, folder):
    api = HfApi(endpoint=hub.endpoint, token="hf_of_somebody_else")
    with pytest.raises(
        UploadError, match=r"cannot upload .* to 'somebody/mixture': .*401.*log in with `hf auth login`"
    ):
        upload(api, folder, REPO, LAYOUT)
    with pytest.raises(UploadError, match="cannot upload to 'somebody/mixture': Invalid user token"):
        expect_pushable(api, REPO)


def test_without_write_access_it_says_so(hub, api, folder):
    hub.refuses = lambda method, path: method == "POST" and "/commit/" in path
    with pytest.raises(UploadError, match=r"403.*does the token allow to write there"):
        upload(api, folder, REPO, LAYOUT)


@pytest.mark.parametrize(
    ("status", "advice"), [(404, "does the token see it"), (409, "another commit is being written to it; run it again")]
)
def test_what_the_hub_refuses_is_one_error_with_what_to_do(hub, api, folder, waits, status, advice):
    hub.refuses = lambda method, path: status if "/commit/" in path else False
    with pytest.raises(UploadError, match=rf"cannot upload {folder} .*{status}.*{advice}.*folder is as it was"):
        upload(api, folder, REPO, LAYOUT)
    assert waits == []
    hub.refuses = lambda method, path: False
    upload(api, folder, REPO, LAYOUT)
    assert uploaded(hub) == FILES


@pytest.mark.parametrize("status", [429, 500, 503])
def test_trouble_that_passes_is_waited_for(hub, api, folder, waits, status, caplog):
    seen = []

    def refuse_twice(method, path):
        if "/commit/" in path and len(seen) < 2:
            seen.append(path)
            return status
        return False

    hub.refuses = refuse_twice
    upload(api, folder, REPO, LAYOUT)
    assert waits == [1, 2]
    assert f"The Hub answers {status}; trying again in 1 s." in caplog.text
    assert uploaded(hub) == FILES


def test_trouble_that_does_not_pass_is_given_up(hub, api, folder, waits):
    hub.refuses = lambda method, path: 502 if "/commit/" in path else False
    with pytest.raises(UploadError, match=r"502.*failed 5 times in a row; run it again later"):
        upload(api, folder, REPO, LAYOUT)
    assert waits == [1, 2, 4, 8]
    assert uploaded(hub) == {}


def test_a_hub_that_cannot_be_reached_is_tried_again_and_then_an_error(folder, waits):
    with pytest.raises(UploadError, match="cannot upload"):
        upload(HfApi(endpoint="http://127.0.0.1:9", token=TOKEN), folder, REPO, LAYOUT)
    assert waits[:4] == [1, 2, 4, 8]


def test_what_was_uploaded_before_a_failure_is_not_sent_again(hub, api, folder, waits):
    hub.refuses = lambda method, path: 404 if "/commit/" in path else False
    with pytest.raises(UploadError):
        upload(api, folder, REPO, LAYOUT)
    sent = []

    def watch(method, path):
        if method == "PUT":
            sent.append(path)
        return False

    hub.refuses = watch
    upload(api, folder, REPO, LAYOUT)
    assert sent == []
    assert uploaded(hub) == FILES


def test_a_name_that_cannot_be_a_repository_is_refused(api):
    with pytest.raises(UploadError, match="cannot upload to 'a/b/c'"):
        expect_pushable(api, "a/b/c")


def test_a_repository_that_is_there_is_used_as_it_is(hub, api, folder):
    hub.repos[REPO] = Repo(is_private=True)
    hub.repos[REPO].add_commit("main", {})
    upload(api, folder, REPO, LAYOUT, private=False)
    assert hub.repos[REPO].is_private

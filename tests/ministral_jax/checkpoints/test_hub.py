"""Folders, hub ids and published names become folders; huggingface_hub is replaced at its interface."""

import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import errors

import ministral_jax
from ministral_jax.checkpoints.hub import needed_files, resolve
from ministral_jax.errors import CheckpointError, ConfigError, MinistralError
from ministral_jax.parameters import parameters
from tests.checkpoint_files import tiny_config, write_tiny_checkpoint

SHARDS = [f"consolidated-0000{i}-of-00002.safetensors" for i in (1, 2)]
HF_SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
CONFIGS = ["params.json", "config.json"]
WORDS = ["tekken.json", "tokenizer.json", "tokenizer_config.json", "SYSTEM_PROMPT.txt"]
NOISE = [".gitattributes", "README.md", "assets/picture.png", "original/consolidated.00.pth", "pytorch_model.bin"]
INDICES = ["consolidated.safetensors.index.json", "model.safetensors.index.json"]


class TestWhatIsFetched:
    def test_of_both_layouts_only_the_mistral_one(self):
        names = [*SHARDS, *HF_SHARDS, *INDICES, *CONFIGS, *WORDS, *NOISE]
        assert set(needed_files(names, weights=True)) == {*SHARDS, INDICES[0], *CONFIGS, *WORDS}

    def test_the_hf_layout_where_there_is_no_other(self):
        names = [*HF_SHARDS, INDICES[1], *CONFIGS, *WORDS, *NOISE]
        assert set(needed_files(names, weights=True)) == {*HF_SHARDS, INDICES[1], *CONFIGS, *WORDS}

    def test_one_file_rather_than_the_same_in_parts(self):
        names = ["model.safetensors", *HF_SHARDS, INDICES[1], "config.json"]
        assert set(needed_files(names, weights=True)) == {"model.safetensors", "config.json"}

    def test_no_weights_where_only_words_are_wanted(self):
        names = [*SHARDS, INDICES[0], *CONFIGS, *WORDS, *NOISE]
        assert set(needed_files(names, weights=False)) == {*CONFIGS, *WORDS}

    def test_adapters_and_other_safetensors_files_stay(self):
        names = ["params.json", "consolidated.safetensors", "consolidated-eagle.safetensors", "lora.safetensors"]
        assert needed_files(names, weights=True) == ["params.json", "consolidated.safetensors"]

    @pytest.mark.parametrize(
        ("names", "reason"),
        [(["config.json", "pytorch_model.bin"], "never pickle"), (["model.safetensors"], "neither params.json nor")],
    )
    def test_repositories_without_what_we_read_are_refused_before_the_download(self, names, reason):
        with pytest.raises(CheckpointError, match=reason):
            needed_files(names, weights=True)


class FakeHub:
    """A repository whose files lie in a folder; `failure` is raised in place of any answer."""

    def __init__(self, folder: Path, cached: Path | None = None) -> None:
        self.folder, self.cached = folder, cached
        self.failure: Exception | None = None
        self.calls: list[dict[str, object]] = []

    def list_repo_files(self, repo_id: str, *, revision: str | None = None) -> list[str]:
        self.calls.append({"repo": repo_id, "revision": revision})
        if self.failure:
            raise self.failure
        return [path.name for path in self.folder.iterdir()]

    def snapshot_download(self, repo_id, *, revision=None, allow_patterns=None, local_files_only=False) -> str:
        self.calls.append({"repo": repo_id, "revision": revision, "local": local_files_only})
        if local_files_only:
            if self.cached is None:
                raise errors.LocalEntryNotFoundError("two\nlines")
            return str(self.cached)
        target = self.folder.parent / "snapshot"
        target.mkdir()
        for path in self.folder.iterdir():
            if any(fnmatch.fnmatchcase(path.name, pattern) for pattern in allow_patterns):
                (target / path.name).write_bytes(path.read_bytes())
        return str(target)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    write_tiny_checkpoint(tmp_path / "repository", tiny_config(), "mistral")
    write_tiny_checkpoint(tmp_path / "repository", tiny_config(), "hf", seed=9)
    fake = FakeHub(tmp_path / "repository")
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: fake)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fake.snapshot_download)
    monkeypatch.chdir(tmp_path)
    return fake


def test_a_folder_is_itself_and_asks_nobody(hub, tmp_path):
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert resolve("org/name") == Path("org/name")
    assert resolve(tmp_path / "org") == tmp_path / "org"
    assert hub.calls == []


def test_a_hub_id_is_fetched_at_its_revision_and_loads(hub, tmp_path):
    folder = resolve("org/name", "v1")
    assert {path.name for path in folder.iterdir()} == {"params.json", "config.json", "consolidated.safetensors"}
    assert [call["revision"] for call in hub.calls] == ["v1", "v1"]
    found = parameters(ministral_jax.load(folder))
    assert found.keys() == parameters(ministral_jax.load(tmp_path / "repository")).keys()


def test_the_name_of_a_published_model_is_its_repository(hub):
    resolve("ministral-8b-instruct-2410")
    assert hub.calls[0]["repo"] == "mistralai/Ministral-8B-Instruct-2410"


def test_a_revision_of_a_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="has no revision 'main'"):
        resolve(tmp_path, "main")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("./nowhere", "no such folder"),
        ("a/b/c", "no such folder"),
        ("/tmp/no/such/folder", "no such folder"),
        ("ministral-9b", "nearest are .* nor is there a folder called so"),
        ("ministral-3b-2410", "never published"),
    ],
)
def test_names_of_nothing_say_what_was_expected(hub, name, reason):
    with pytest.raises(MinistralError, match=reason) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)
    assert hub.calls == []


def test_a_file_in_place_of_a_folder_is_refused(hub, tmp_path):
    path = tmp_path / "repository" / "consolidated.safetensors"
    with pytest.raises(CheckpointError, match="is a file; expected the folder it is in"):
        resolve(path)


class Answer:
    def __init__(self, status: int) -> None:
        self.status_code, self.headers, self.request = status, {}, None


def http(kind: type[errors.HfHubHTTPError], status: int) -> Exception:
    return kind("a message\nof several lines", response=Answer(status))  # type: ignore[arg-type]


def transport_error() -> Exception:
    base = next(kind for kind in errors.HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
    return base("no route\nto host")


@pytest.mark.parametrize(
    ("failure", "reasons"),
    [
        (http(errors.GatedRepoError, 403), ["accept the terms at http", "org/name", "HF_TOKEN"]),
        (http(errors.RepositoryNotFoundError, 401), ["neither a folder here", "HF_TOKEN"]),
        (http(errors.RevisionNotFoundError, 404), ["has no revision 'v1'"]),
        (http(errors.HfHubHTTPError, 503), ["status 503", "try again"]),
        (errors.OfflineModeIsEnabled("offline"), ["not in the cache", "local folder"]),
        (transport_error(), ["the hub cannot be reached", "not in the cache"]),
        (ConnectionError("reset"), ["the hub cannot be reached"]),
        (OSError(28, "No space left on device"), ["No space left on device"]),
        (errors.HFValidationError("bad\nid"), ["not a hub id"]),
    ],
)
def test_each_failure_of_the_hub_is_one_line_that_says_what_to_do(hub, failure, reasons):
    hub.failure = failure
    with pytest.raises(CheckpointError) as caught:
        resolve("org/name", "v1")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("org/name: ")
    for reason in reasons:
        assert reason in message


def test_a_model_of_the_catalog_that_never_was_on_the_hub_is_said_to_be_so(hub):
    hub.failure = http(errors.RepositoryNotFoundError, 404)
    with pytest.raises(CheckpointError, match="were never published"):
        resolve("mistralai/Ministral-3B-2410")


@pytest.mark.parametrize("failure", [errors.OfflineModeIsEnabled("offline"), transport_error()])
def test_without_a_connection_the_cache_serves(hub, failure):
    hub.failure, hub.cached = failure, hub.folder
    assert resolve("org/name") == hub.folder
    assert hub.calls[-1]["local"] is True


def test_an_error_of_ours_is_not_dressed_up_as_the_hubs(hub):
    hub.failure = KeyError("a bug")
    with pytest.raises(KeyError):
        resolve("org/name")

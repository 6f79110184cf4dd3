"""`ministral merge` and `--adapter` as a person or a script calls them."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from ministral_jax.checkpoints.adapters import save_adapter
from ministral_jax.checkpoints.load import load_model
from ministral_jax.cli import main
from ministral_jax.lora import LoraConfig, attach
from ministral_jax.parameters import fill, parameters

RANK, SCALE = 4, 1.5


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    streams = capsys.readouterr()
    return code, streams.out, streams.err


@pytest.fixture(scope="session")
def adapter(checkpoint, tmp_path_factory):
    """A folder with a wide adapter of the checkpoint, as PEFT has it."""
    model = load_model(checkpoint)
    base = parameters(model)
    attach(model, LoraConfig(rank=RANK, scaling=SCALE))
    random = np.random.default_rng(5)

    def values(name, spec):
        return jnp.asarray(0.3 * random.standard_normal(spec.shape), jnp.float32) if spec.adapter else base[name]

    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(folder, fill(model, values), to="hf", base=str(checkpoint))
    return folder


def logprobs(capsys, *arguments):
    code, out, _ = run(capsys, "score", *arguments, "--ids", "1,9,40,77,3,21,60,5,13,88", "--json")
    assert code == 0
    return np.array(json.loads(out)["logprobs"][1:])


def test_the_merged_model_scores_as_the_base_with_the_adapter(capsys, checkpoint, adapter, tmp_path):
    code, out, err = run(capsys, "merge", checkpoint, adapter, tmp_path / "m", "--to", "hf", "--verify")
    assert (code, err) == (0, "")
    assert out.startswith(f"wrote {tmp_path / 'm'}: 39 tensors, ")
    assert "in the hf layout, with an adapter of rank 4, scaling 1.5, in 28 projections\n" in out
    assert (tmp_path / "m" / "tekken.json").is_file()
    apart = logprobs(capsys, checkpoint, "--adapter", adapter)
    assert np.abs(apart - logprobs(capsys, checkpoint)).max() > 0.5
    np.testing.assert_allclose(logprobs(capsys, tmp_path / "m"), apart, rtol=0, atol=1e-5 * np.ptp(apart))


def test_generate_and_chat_say_which_adapter_they_use(capsys, checkpoint, adapter):
    line = f"{adapter}: rank 4, scaling 1.5, 28 projections\n"
    ids = ("--ids", "1,9,40", "--max-tokens", "4", "--json", "--ignore-eos")
    code, out, err = run(capsys, "generate", checkpoint, "--adapter", adapter, *ids)
    assert (code, err.count(line)) == (0, 1)
    found = json.loads(out)["ids"]
    scored = run(
        capsys, "score", checkpoint, "--adapter", adapter, "--ids", f"1,9,40,{','.join(map(str, found))}", "--json"
    )
    assert [token for token, _ in json.loads(scored[1])["top"][2:-1]] == found  # greedy, with the adapter
    code, out, err = run(capsys, "chat", checkpoint, "--adapter", adapter, "--prompt", "hello", "--max-tokens", "2")
    assert (code, err.count(line)) == (0, 1)


def test_json_is_one_document(capsys, checkpoint, adapter, tmp_path):
    _, planned, _ = run(capsys, "merge", checkpoint, adapter, tmp_path / "m", "--json", "--dry-run")
    assert not (tmp_path / "m").exists()
    _, done, _ = run(capsys, "merge", checkpoint, adapter, tmp_path / "m", "--json")
    assert json.loads(planned) | {"dry_run": False} == json.loads(done)
    document = json.loads(done)
    assert {key: document[key] for key in ("from", "to", "rank", "scaling", "modules", "dequantized")} == {
        "from": "mistral", "to": "mistral", "rank": RANK, "scaling": SCALE, "modules": 28, "dequantized": None,
    }  # fmt: skip
    assert all((tmp_path / "m" / name).stat().st_size == size for name, size in document["files"].items())


def test_a_folder_that_exists_is_kept_without_force(capsys, checkpoint, adapter, tmp_path):
    assert run(capsys, "merge", checkpoint, adapter, tmp_path / "m")[0] == 0
    code, out, err = run(capsys, "merge", checkpoint, adapter, tmp_path / "m")
    assert (code, out) == (1, "")
    assert err == f"ministral: {tmp_path / 'm'}: exists; expected a new name, or --force to replace it\n"
    assert run(capsys, "merge", checkpoint, adapter, tmp_path / "m", "--force")[0] == 0


@pytest.mark.parametrize(
    "command", [("merge", "{m}", "{bad}", "{new}"), ("score", "{m}", "--adapter", "{bad}", "--ids", "1,2")]
)
def test_a_folder_without_an_adapter_is_one_line(capsys, checkpoint, tmp_path, command):
    names = {"m": checkpoint, "bad": tmp_path, "new": tmp_path / "new"}
    code, out, err = run(capsys, *(part.format(**names) for part in command))
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert f"{tmp_path}: no adapter; expected a folder with adapter_config.json" in err

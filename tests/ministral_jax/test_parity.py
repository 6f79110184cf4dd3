"""Live comparison with transformers and mistral-inference, through Python and the command line."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import ministral_jax
from ministral_jax.checkpoints.save import save_hf, save_mistral
from ministral_jax.cli import main
from ministral_jax.parameters import parameters
from tests.golden.mistral_inference_runner import run_mistral_inference
from tests.golden.models import MODELS, GoldenModel, by_name, token_ids
from tests.golden.values import CLOSE, MARGIN, write_native

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("default"),  # what other libraries warn about is not ours to fix
]
GOLDENS = pytest.mark.parametrize("golden", MODELS, ids=lambda golden: golden.name)


def torch_model(golden: GoldenModel) -> Any:
    """The transformers model with its random weights."""
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.golden.make_golden import transformers_model

    return transformers_model(golden)


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    from tests.golden.make_golden import run

    return run(model, tokens)


def read_by_transformers(golden: GoldenModel, folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    loader = getattr(transformers, golden.model_class)
    model, report = loader.from_pretrained(folder, attn_implementation="eager", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return model.float().eval()


@functools.cache
def live_logits(name: str) -> np.ndarray:
    return torch_logits(torch_model(by_name(name)), token_ids(by_name(name)))


def our_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    graph, weights = nnx.split(model)
    return np.asarray(jax.jit(lambda weights, tokens: nnx.merge(graph, weights)(tokens))(weights, tokens))


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= CLOSE * np.ptp(expected)


@GOLDENS
def test_a_checkpoint_that_transformers_saved_answers_the_same(golden: GoldenModel, tmp_path: Path) -> None:
    torch_model(golden).save_pretrained(tmp_path)
    assert_close(our_logits(ministral_jax.load(tmp_path), token_ids(golden)), live_logits(golden.name))


@GOLDENS
def test_transformers_reads_what_we_save(golden: GoldenModel, tmp_path: Path) -> None:
    model = ministral_jax.load(write_native(golden, tmp_path / "native"))
    save_hf(tmp_path / "hf", parameters(model), model.config)
    again = read_by_transformers(golden, tmp_path / "hf")
    np.testing.assert_array_equal(torch_logits(again, token_ids(golden)), live_logits(golden.name))


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    """What a command prints as JSON."""
    capsys.readouterr()
    assert main([*arguments, "--dtype", "float32", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@GOLDENS
@pytest.mark.parametrize("layout", ["hf", "mistral"])
def test_the_score_command_prints_transformers_log_probabilities(
    golden: GoldenModel, layout: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if layout == "hf":
        torch_model(golden).save_pretrained(tmp_path)
    else:
        write_native(golden, tmp_path)
    ids, logits = token_ids(golden)[0].tolist(), live_logits(golden.name)[0]
    found = command(capsys, "score", str(tmp_path), "--ids", ",".join(map(str, ids)))
    expected, allowed = log_softmax(logits), CLOSE * np.ptp(logits)
    assert found["ids"] == ids
    assert found["logprobs"][0] is None
    np.testing.assert_allclose(found["logprobs"][1:], expected[np.arange(len(ids) - 1), ids[1:]], rtol=0, atol=allowed)
    np.testing.assert_allclose([value for _, value in found["top"]], expected.max(axis=-1), rtol=0, atol=allowed)
    second, best = np.sort(logits, axis=-1)[:, -2:].T
    clear = best - second > MARGIN * np.ptp(logits)
    assert clear.mean() > 0.9
    assert np.array([token for token, _ in found["top"]])[clear].tolist() == logits.argmax(axis=-1)[clear].tolist()


@pytest.mark.parametrize(
    "name", ["mistral_window", "ministral", "ministral3_tied", "ministral3", "mixtral", "mistral4"]
)
def test_the_generate_command_continues_as_transformers_does(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Compared up to the first close call, or the end of sequence that only transformers' side looks at."""
    golden = by_name(name)
    model = torch_model(golden)
    model.save_pretrained(tmp_path)
    prompt = token_ids(golden)[0, :60].tolist()
    found = command(
        capsys,
        "generate",
        str(tmp_path),
        "--ids",
        ",".join(map(str, prompt)),
        "--max-tokens",
        "20",
        "--temperature",
        "0",
    )
    assert found["finish_reason"] == "length"
    ids = prompt + found["ids"]
    logits = torch_logits(model, np.array([ids], np.int32))[0, len(prompt) - 1 : -1]
    second, best = np.sort(logits, axis=-1)[:, -2:].T
    close_calls = np.flatnonzero(best - second <= MARGIN * np.ptp(logits))
    clear = int(close_calls[0]) if len(close_calls) else 20
    assert clear >= 5
    assert found["ids"][:clear] == logits.argmax(axis=-1)[:clear].tolist()


@pytest.mark.parametrize("era", ["new", "old"])
def test_the_text_decoder_of_a_vision_model_answers_the_same(era: str, tmp_path: Path) -> None:
    """Mistral3ForConditionalGeneration as transformers saves it now, and with the prefixes it used to have."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    golden = by_name("ministral3")
    text = transformers.Ministral3Config(**golden.transformers_arguments())
    vision = transformers.PixtralVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=56, patch_size=4,
        hidden_act="silu",
    )  # fmt: skip
    config = transformers.Mistral3Config(
        text_config=text, vision_config=vision, image_token_index=10, spatial_merge_size=2, vision_feature_layer=-1,
        multimodal_projector_bias=False, tie_word_embeddings=False,
    )  # fmt: skip
    config._attn_implementation = "eager"
    whole = transformers.Mistral3ForConditionalGeneration(config).float().eval()
    plain = torch_model(golden)
    whole.model.language_model.load_state_dict(plain.model.state_dict())
    whole.lm_head.load_state_dict(plain.lm_head.state_dict())
    whole.save_pretrained(tmp_path)
    if era == "old":
        file = tmp_path / "model.safetensors"
        save_file({old_name(name): array for name, array in load_file(file).items()}, file)
    tokens = np.where(token_ids(golden) == 10, 9, token_ids(golden))  # no image tokens
    assert_close(our_logits(ministral_jax.load(tmp_path), tokens), torch_logits(whole, tokens))


def old_name(name: str) -> str:
    """The name that a tensor had before transformers moved the language model under `model`."""
    if name.startswith("model.language_model."):
        return name.replace("model.language_model.", "language_model.model.", 1)
    return f"language_model.{name}" if name.startswith("lm_head") else name.removeprefix("model.")


@pytest.mark.parametrize("name", ["mistral", "mistral_window", "ministral", "mixtral"])
def test_mistral_inference_answers_the_same_to_what_we_save(name: str, tmp_path: Path) -> None:
    """At once, in chunks, and token by token at the end, over its own rotating cache."""
    golden = by_name(name)
    model = ministral_jax.load(write_native(golden, tmp_path / "native"))
    save_mistral(tmp_path / "saved", parameters(model), model.config)
    # Today's mistral-inference takes an absent theta for 1e6, so 7B v0.1 needs it written out.
    params = json.loads((tmp_path / "saved" / "params.json").read_text()) | {"rope_theta": model.config.rope.theta}
    (tmp_path / "saved" / "params.json").write_text(json.dumps(params))
    ours = our_logits(model, token_ids(golden))
    for chunks in ([80], [30, 20, 30], [60, *[1] * 20]):
        assert_close(ours, run_mistral_inference(tmp_path / "saved", token_ids(golden), chunks))

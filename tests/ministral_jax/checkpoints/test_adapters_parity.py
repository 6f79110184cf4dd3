"""Adapters that we write, in PEFT and in mistral-inference; theirs, here. The logits are the same either way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import ministral_jax
from ministral_jax.checkpoints.adapters import save_adapter
from ministral_jax.checkpoints.conversion.merge import merge
from ministral_jax.lora import LoraConfig, adapted, attach
from ministral_jax.parameters import fill, parameters
from ministral_jax.transformer import Transformer
from tests.architecture_files import EXAMPLES, write_example
from tests.golden.mistral_inference_runner import run_mistral_inference
from tests.golden.models import by_name, native_weights, token_ids
from tests.golden.values import CLOSE, write_hf, write_native

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("default"),  # what other libraries warn about is not ours to fix
]

RANK = 4
# Sequences of 80 tokens, windows of 7, temperature and YaRN four original lengths long.
KINDS = pytest.mark.parametrize("name", ["mistral_window", "ministral3"])
CONFIGS = {
    "plain": LoraConfig(rank=RANK, scaling=1.25),
    "patterns": LoraConfig(
        targets=("wq", "wk", "wo", "w2"), rank=RANK, alpha=6.0, rank_pattern={"wq": 2, r"layers\.1\..*": 3},
        alpha_pattern={"w2": 9.0},
    ),
    "rslora": LoraConfig(rank=RANK, alpha=3.0, rslora=True),
}  # fmt: skip


def widened(model: Transformer, config: LoraConfig) -> Transformer:
    """The model with an adapter of wide random matrices, B among them."""
    base = parameters(model)
    attach(model, config)
    random = np.random.default_rng(3)

    def values(name: str, spec: Any) -> jax.Array:
        return jnp.asarray(0.3 * random.standard_normal(spec.shape), jnp.float32) if spec.adapter else base[name]

    return fill(model, values)


def our_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    graph, weights = nnx.split(model)
    return np.asarray(jax.jit(lambda weights, tokens: nnx.merge(graph, weights)(tokens))(weights, tokens))


def their_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(torch.from_numpy(tokens).long(), use_cache=False).logits.float().numpy()


def torch_model(name: str) -> Any:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    from tests.golden.make_golden import transformers_model

    return transformers_model(by_name(name))


def assert_close(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.abs(found - expected).max() <= CLOSE * np.ptp(expected)


def assert_far(found: np.ndarray, plain: np.ndarray) -> None:
    """That the adapter matters, so that a comparison of two that have it does."""
    assert np.abs(found - plain).max() > 0.1 * np.ptp(plain)


def require_peft_to_answer_as_we_do(name: str, config: LoraConfig, tmp_path: Path) -> None:
    """With our adapter of random matrices, beside the weights and merged."""
    peft = pytest.importorskip("peft")
    base = ministral_jax.load(write_hf(by_name(name), tmp_path / "base"))
    plain, tokens = our_logits(base, token_ids(by_name(name))), token_ids(by_name(name))
    model = widened(base, config)
    save_adapter(tmp_path / "lora", model, to="hf", base=str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(torch_model(name), tmp_path / "lora").eval()
    state = peft.get_peft_model_state_dict(theirs)
    assert state.keys() == load_file(tmp_path / "lora" / "adapter_model.safetensors").keys()
    ours = our_logits(model, tokens)
    assert_close(ours, their_logits(theirs, tokens))
    assert_far(ours, plain)
    merge(tmp_path / "base", tmp_path / "lora", tmp_path / "merged")
    assert_close(
        our_logits(ministral_jax.load(tmp_path / "merged"), tokens), their_logits(theirs.merge_and_unload(), tokens)
    )


@KINDS
@pytest.mark.parametrize("kind", CONFIGS)
def test_peft_answers_with_our_adapter_as_we_do(name: str, kind: str, tmp_path: Path) -> None:
    require_peft_to_answer_as_we_do(name, CONFIGS[kind], tmp_path)


THEIRS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": "all-linear"},
    "default targets": {},  # q and v
    "rslora, patterns": {
        "target_modules": ["q_proj", "k_proj", "down_proj"], "use_rslora": True, "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {r"model\.layers\.1\..*": 5},
    },
    "two layers": {"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [0, 2], "lora_dropout": 0.5},
}  # fmt: skip


# PEFT has default targets for the one family, none for the other.
@pytest.mark.parametrize(
    ("name", "kind"),
    [(name, kind) for name in ("mistral_window", "ministral3") for kind in THEIRS if THEIRS[kind] or name[-1] != "3"],
)
def test_we_answer_with_an_adapter_of_peft_as_it_does(name: str, kind: str, tmp_path: Path) -> None:
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    torch.manual_seed(0)
    settings = peft.LoraConfig(r=RANK, lora_alpha=6, task_type="CAUSAL_LM", **THEIRS[kind])
    theirs = peft.get_peft_model(torch_model(name), settings).eval()
    for parameter_name, parameter in theirs.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "lora")
    base = write_hf(by_name(name), tmp_path / "base")
    tokens = token_ids(by_name(name))
    ours = our_logits(ministral_jax.load(base, adapter=tmp_path / "lora"), tokens)
    assert_close(ours, their_logits(theirs, tokens))
    assert_far(ours, our_logits(ministral_jax.load(base), tokens))


# Of experts, and of the attention beside them.
OF_EXPERTS = {
    "experts": LoraConfig(targets=("w1", "w2", "w3", "wo"), rank=RANK, scaling=1.25),
    "w1 alone": LoraConfig(targets=("w1",), rank=RANK, alpha=6.0),
    "patterns": LoraConfig(targets=("w1", "w2", "w3"), rank=RANK, alpha=6.0, rank_pattern={"w3": 2},
                           alpha_pattern={"w3": 3.0}),
}  # fmt: skip
EXPERT_KINDS = pytest.mark.parametrize("name", ["mixtral", "mistral4"])


def test_an_adapter_of_a_base_that_peft_has_experts_fused_in() -> None:
    """What the tests below rest on: transformers keeps all experts of a layer in two parameters."""
    for name in ("mixtral", "mistral4"):
        names = dict(torch_model(name).named_parameters())
        assert names["model.layers.1.mlp.experts.gate_up_proj"].ndim == 3
        assert names["model.layers.1.mlp.experts.down_proj"].ndim == 3


@EXPERT_KINDS
@pytest.mark.parametrize("kind", OF_EXPERTS)
def test_peft_answers_with_our_adapter_of_experts_as_we_do(name: str, kind: str, tmp_path: Path) -> None:
    require_peft_to_answer_as_we_do(name, OF_EXPERTS[kind], tmp_path)


THEIRS_OF_EXPERTS: dict[str, dict[str, Any]] = {
    "both": {"target_modules": ["o_proj"],
             "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "down": {"target_modules": [], "target_parameters": ["down_proj"], "use_rslora": True},
    "patterns": {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
                 "rank_pattern": {"gate_up_proj": 2}, "alpha_pattern": {r"layers\.1\..*down_proj": 5}},
}  # fmt: skip


@EXPERT_KINDS
@pytest.mark.parametrize("kind", [*THEIRS_OF_EXPERTS, "modules that were"])
def test_we_answer_with_an_adapter_of_experts_of_peft_as_it_does(name: str, kind: str, tmp_path: Path) -> None:
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    torch.manual_seed(0)
    if kind == "modules that were" and name != "mixtral":
        pytest.skip("every expert was a module in Mixtral alone")
    targets = THEIRS_OF_EXPERTS.get(kind, {"target_modules": ["q_proj", "w1", "w2", "w3"]})
    settings = peft.LoraConfig(r=RANK, lora_alpha=6, task_type="CAUSAL_LM", **targets)
    theirs = peft.get_peft_model(torch_model(name), settings).eval()
    for parameter_name, parameter in theirs.named_parameters():
        if "lora_" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "lora")
    base = write_hf(by_name(name), tmp_path / "base")
    tokens = token_ids(by_name(name))
    ours = our_logits(ministral_jax.load(base, adapter=tmp_path / "lora"), tokens)
    assert_close(ours, their_logits(theirs, tokens))
    assert_far(ours, our_logits(ministral_jax.load(base), tokens))


def test_beside_a_vision_tower_peft_puts_our_adapter_on_the_decoder(tmp_path: Path) -> None:
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    write_example(tmp_path / "base", EXAMPLES["vision"](), "hf")
    base = ministral_jax.load(tmp_path / "base", dtype="float32")
    model = widened(base, CONFIGS["plain"])
    save_adapter(tmp_path / "lora", model, to="hf", base=str(tmp_path / "base"))
    loader = transformers.Mistral3ForConditionalGeneration
    built = loader.from_pretrained(tmp_path / "base", attn_implementation="eager", dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(built, tmp_path / "lora").eval()
    modules = {name.split(".lora_")[0] for name, _ in theirs.named_parameters() if "lora_" in name}
    assert len(modules) == len(adapted(model)) == 14
    assert all(".language_model.layers." in name for name in modules)
    tokens = np.arange(20, 60, dtype=np.int32)[None]
    assert_close(our_logits(model, tokens), their_logits(theirs, tokens))
    theirs.save_pretrained(tmp_path / "again")
    again = ministral_jax.load(tmp_path / "base", dtype="float32", adapter=tmp_path / "again")
    assert_close(our_logits(again, tokens), their_logits(theirs, tokens))


def native(name: str, folder: Path) -> Path:
    """The golden checkpoint in the mistral layout, its theta written out: mistral-inference has another default."""
    write_native(by_name(name), folder)
    model = ministral_jax.load(folder)
    params = json.loads((folder / "params.json").read_text()) | {"rope_theta": model.config.rope.theta}
    (folder / "params.json").write_text(json.dumps(params))
    return folder


# Its model has no YaRN and no temperature.
NATIVE = pytest.mark.parametrize("name", ["mistral", "mistral_window", "mixtral"])


@NATIVE
@pytest.mark.parametrize("kind", CONFIGS)
def test_mistral_inference_answers_with_our_adapter_as_we_do(name: str, kind: str, tmp_path: Path) -> None:
    folder, tokens = native(name, tmp_path / "base"), token_ids(by_name(name))
    base = ministral_jax.load(folder)
    plain = our_logits(base, tokens)
    model = widened(base, CONFIGS[kind])
    save_adapter(tmp_path / "lora", model, to="mistral")
    scaling = json.loads((tmp_path / "lora" / "params.json").read_text())["lora"]["scaling"]
    ours = our_logits(model, tokens)
    assert_far(ours, plain)
    lora = tmp_path / "lora" / "lora.safetensors"
    assert_close(ours, run_mistral_inference(folder, tokens, [50, 30], lora=lora, scaling=scaling))
    if kind == "plain":  # it has one rank for all where it does not merge
        assert_close(ours, run_mistral_inference(folder, tokens, [80], lora=lora, scaling=scaling, rank=RANK))
    merge(folder, tmp_path / "lora", tmp_path / "merged")
    assert_close(ours, run_mistral_inference(tmp_path / "merged", tokens, [80]))


@NATIVE
def test_we_answer_with_an_adapter_of_mistral_finetune_as_mistral_inference_does(name: str, tmp_path: Path) -> None:
    """Its names and shapes are those of its modules; its rows pair adjacent ones."""
    folder, tokens, scaling = native(name, tmp_path / "base"), token_ids(by_name(name)), 0.75
    random = np.random.default_rng(0)
    tensors = {}
    for weight, array in native_weights(by_name(name)).items():
        module, last = weight.removesuffix(".weight"), weight.split(".")[-2]
        if module.startswith("layers.") and last[0] == "w":
            n_out, n_in = array.shape
            tensors[f"{module}.lora_A.weight"] = (0.3 * random.standard_normal((RANK, n_in))).astype(np.float32)
            tensors[f"{module}.lora_B.weight"] = (0.3 * random.standard_normal((n_out, RANK))).astype(np.float32)
    (tmp_path / "lora").mkdir()
    save_file(tensors, tmp_path / "lora" / "lora.safetensors")
    lora = {"enable": True, "rank": RANK, "dropout": 0.1, "scaling": scaling}
    params = json.loads((folder / "params.json").read_text())
    (tmp_path / "lora" / "params.json").write_text(json.dumps({**params, "lora": lora}))
    ours = our_logits(ministral_jax.load(folder, adapter=tmp_path / "lora"), tokens)
    path = tmp_path / "lora" / "lora.safetensors"
    assert_close(ours, run_mistral_inference(folder, tokens, [80], lora=path, scaling=scaling, rank=RANK))
    assert_close(ours, run_mistral_inference(folder, tokens, [80], lora=path, scaling=scaling))
    assert_far(ours, our_logits(ministral_jax.load(folder), tokens))

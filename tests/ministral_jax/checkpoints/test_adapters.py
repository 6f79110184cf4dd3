"""Adapters on models, read from and written to both layouts: names, row order, factors, dtypes, and what is refused."""

import json
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from ministral_jax.checkpoints.adapters import attach_adapter, base_dtype, read_adapter, save_adapter
from ministral_jax.checkpoints.conversion.convert import convert
from ministral_jax.checkpoints.conversion.merge import merge
from ministral_jax.checkpoints.load import load_model
from ministral_jax.checkpoints.save import save_hf, save_mistral
from ministral_jax.config_files import params_from_config
from ministral_jax.errors import MinistralError
from ministral_jax.linear import LowRank, projections
from ministral_jax.lora import LoraConfig, adapted, adapter_parameters, attach, without_adapters
from ministral_jax.parameters import fill, parameter_specs, parameters
from ministral_jax.sharding.layout import layout_for
from ministral_jax.sharding.meshes import make_mesh
from ministral_jax.stacked import StackedTransformer
from ministral_jax.transformer import Transformer
from tests.architecture_files import EXAMPLES, MIXTRAL, SMALL_4
from tests.checkpoint_files import interleaved, random_weights, tiny_config, write_tiny_checkpoint
from tests.mutation import damaged_documents
from tests.quantized_files import CASES, write_quantized_checkpoint

RANK, SCALE = 4, 1.75
LORA, PEFT, PEFT_CONFIG = "lora.safetensors", "adapter_model.safetensors", "adapter_config.json"
THEIRS = {
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
}  # fmt: skip


def peft_module(module, outer="model."):
    for ours, theirs in THEIRS.items():
        module = module.replace(ours, theirs)
    return f"base_model.model.{outer}{module}"


def adapted_model(config, lora=None, seed=1, dtype=jnp.float32):
    """A filled model with wide adapters, B not zero."""
    model = Transformer(config, dtype)
    attach(model, lora or LoraConfig(rank=RANK, scaling=SCALE))
    random, base = np.random.default_rng(seed), random_weights(config)

    def values(name, spec):
        drawn = 0.3 * random.standard_normal(spec.shape) if spec.adapter else base[name]
        return jnp.asarray(drawn, spec.dtype)

    return fill(model, values)


def bare_model(config, dtype=jnp.float32):
    return fill(
        Transformer(config, dtype), {name: jnp.asarray(array, dtype) for name, array in random_weights(config).items()}
    )


def assert_same_adapter(model, other):
    assert {name: linear.adapter for name, linear in projections(model).items()} == {
        name: linear.adapter for name, linear in projections(other).items()
    }
    expected = adapter_parameters(model)
    for name, array in adapter_parameters(other).items():
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


@pytest.mark.parametrize("to", ["mistral", "hf"])
@pytest.mark.parametrize("kind", ["mistral_window", "ministral3", "wide_heads"])
def test_what_is_written_is_read_again(tmp_path, kind, to):
    config = tiny_config(kind)
    model = adapted_model(config, LoraConfig(rank=RANK, scaling=SCALE, dropout=0.25))
    save_adapter(tmp_path / "a", model, to=to, base="some/base")
    again = bare_model(config)
    attach_adapter(again, read_adapter(tmp_path / "a", config))
    assert_same_adapter(model, again)


def test_the_mistral_file_has_its_names_interleaved_rows_and_its_scaling(tmp_path):
    config = tiny_config("mistral")
    model = adapted_model(config)
    save_adapter(tmp_path, model, to="mistral")
    found, arrays = load_file(tmp_path / LORA), adapter_parameters(model)
    assert found.keys() == {f"{name}.lora_{part}.weight" for name in projections(model) for part in "AB"}
    for name in projections(model):
        a, b = (np.asarray(arrays[f"{name}.lora_{part}"]) for part in "ab")
        np.testing.assert_array_equal(found[f"{name}.lora_A.weight"], a)
        rows = interleaved(b, config.head_dim) if name.endswith(("wq", "wk")) else b
        np.testing.assert_array_equal(found[f"{name}.lora_B.weight"], rows)
    document = json.loads((tmp_path / "params.json").read_text())
    assert document == {
        **params_from_config(config), "lora": {"enable": True, "rank": RANK, "dropout": 0.0, "scaling": SCALE},
    }  # fmt: skip
    with safe_open(tmp_path / LORA, "np") as file:
        assert file.metadata() == {"scaling": "1.75"}


@pytest.mark.parametrize("outer", ["model.", "model.language_model."])
def test_the_peft_folder_has_the_names_of_the_modules_in_memory_and_half_split_rows(tmp_path, outer):
    config = tiny_config("ministral3") if outer == "model." else EXAMPLES["vision"]().config
    model = adapted_model(config)
    save_adapter(tmp_path, model, to="hf", base="some/base")
    found, arrays = load_file(tmp_path / PEFT), adapter_parameters(model)
    expected = {
        f"{peft_module(name, outer)}.lora_{part.upper()}.weight": arrays[f"{name}.lora_{part}"]
        for name in projections(model)
        for part in "ab"
        if name.startswith("layers.")
    }
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    document = json.loads((tmp_path / PEFT_CONFIG).read_text())
    assert (document["r"], document["lora_alpha"], document["peft_type"]) == (RANK, RANK * SCALE, "LORA")
    assert (document["base_model_name_or_path"], document["use_rslora"]) == ("some/base", False)
    targets = document["target_modules"]
    if outer == "model.":
        assert targets == sorted(theirs.rsplit(".")[-1] for theirs in THEIRS.values())
    else:
        assert re.fullmatch(targets, "model.language_model.layers.1.self_attn.q_proj")
        assert not re.fullmatch(targets, "model.vision_tower.transformer.layers.1.attention.q_proj")


PATTERNS = LoraConfig(
    targets=("wq", "wv", "w2"), rank=RANK, alpha=6.0, rank_pattern={"wq": 2, r"layers\.1\..*": 3},
    alpha_pattern={"w2": 9.0},
)  # fmt: skip


def test_modules_that_differ_keep_their_ranks_and_factors_in_peft(tmp_path):
    model = adapted_model(tiny_config("mistral"), PATTERNS)
    save_adapter(tmp_path, model, to="hf")
    again = bare_model(model.config)
    attach_adapter(again, read_adapter(tmp_path, model.config))
    assert {linear.adapter for linear in adapted(again).values()} == {
        LowRank(2, 3.0), LowRank(3, 2.0), LowRank(3, 3.0), LowRank(4, 1.5), LowRank(4, 2.25),
    }  # fmt: skip
    assert_same_adapter(model, again)


def test_the_mistral_layout_has_one_factor_so_the_others_go_into_b(tmp_path):
    model = adapted_model(tiny_config("mistral"), PATTERNS)
    save_adapter(tmp_path, model, to="mistral")
    again = bare_model(model.config)
    attach_adapter(again, read_adapter(tmp_path, model.config))
    assert len({linear.adapter.scale for linear in adapted(again).values()}) == 1
    for name, linear in adapted(model).items():
        other = projections(again)[name]
        product = linear.adapter.scale * linear.lora_b[...] @ linear.lora_a[...]
        same = other.adapter.scale * other.lora_b[...] @ other.lora_a[...]
        np.testing.assert_allclose(same, product, rtol=1e-5, atol=1e-6)


def test_only_the_modules_that_are_there_are_named(tmp_path):
    model = adapted_model(tiny_config("mistral"))
    projections(model)["layers.2.attention.wq"].remove_adapter()
    save_adapter(tmp_path, model, to="hf")
    targets = json.loads((tmp_path / PEFT_CONFIG).read_text())["target_modules"]
    assert sorted(targets) == sorted(peft_module(name).removeprefix("base_model.model.") for name in adapted(model))
    again = bare_model(model.config)
    attach_adapter(again, read_adapter(tmp_path, model.config))
    assert_same_adapter(model, again)


@pytest.mark.parametrize("to", ["mistral", "hf"])
@pytest.mark.parametrize(("asked", "stored"), [(None, ml_dtypes.bfloat16), ("float32", np.float32)])
def test_matrices_are_stored_as_the_base_is_unless_another_dtype_is_asked_for(tmp_path, to, asked, stored):
    config = tiny_config("mistral", n_layers=1)
    model = adapted_model(config, dtype=jnp.bfloat16)
    save_adapter(tmp_path, model, to=to, dtype=asked)
    found = load_file(tmp_path / (LORA if to == "mistral" else PEFT))
    assert {array.dtype for array in found.values()} == {np.dtype(stored)}
    adapter = read_adapter(tmp_path, config)
    expected = np.asarray(adapter_parameters(model)["layers.0.attention.wv.lora_b"]).astype(stored)
    np.testing.assert_array_equal(adapter.matrices["layers.0.attention.wv"]["lora_b"], expected.astype(np.float32))
    attach_adapter(again := bare_model(config, jnp.bfloat16), adapter)
    assert {spec.dtype for spec in parameter_specs(again).values() if spec.adapter} == {jnp.dtype("float32")}


def test_the_dtype_of_a_base_is_that_of_its_dense_weights(tmp_path):
    config = tiny_config("mistral", n_layers=1)
    write_tiny_checkpoint(tmp_path / "b", config, "hf", dtype="bfloat16")
    write_tiny_checkpoint(tmp_path / "f", config, "mistral")
    write_quantized_checkpoint(tmp_path / "q", config, "mistral", CASES[0])
    assert [base_dtype(tmp_path / name) for name in "bfq"] == ["bfloat16", "float32", "float32"]


def test_a_converted_adapter_is_the_same_on_the_model(tmp_path):
    model = adapted_model(tiny_config("ministral3"))
    save_adapter(tmp_path / "a", model, to="mistral")
    convert(tmp_path / "a", tmp_path / "p", to="hf")
    again = bare_model(model.config)
    attach_adapter(again, read_adapter(tmp_path / "p", model.config))
    assert_same_adapter(model, again)


def test_an_adapter_goes_onto_a_stack_and_comes_back(tmp_path):
    config = tiny_config("ministral")
    model = adapted_model(config)
    save_adapter(tmp_path / "a", model, to="mistral")
    stacked = StackedTransformer(bare_model(config))
    attach_adapter(stacked, read_adapter(tmp_path / "a", config))
    assert parameter_specs(stacked)["places.0.attention.wq.lora_a"].axes == ("layers", "rank", "embed")
    save_adapter(tmp_path / "b", stacked, to="hf")
    again = bare_model(config)
    attach_adapter(again, read_adapter(tmp_path / "b", config))
    assert_same_adapter(model, again)


def test_an_adapter_lies_where_the_model_lies(tmp_path):
    config = tiny_config("mistral")
    model = adapted_model(config)
    save_adapter(tmp_path, model, to="mistral")
    layout = layout_for(config, make_mesh("fsdp=2,tensor=2"))
    weights = random_weights(config)
    sharded = fill(
        Transformer(config, layout=layout),
        lambda name, spec: jax.device_put(weights[name], layout.placement(name, spec)),
    )
    attach_adapter(sharded, read_adapter(tmp_path, config))
    b = projections(sharded)["layers.0.feed_forward.w1"].lora_b[...]
    assert b.addressable_shards[0].data.shape[0] == b.shape[0] // 2
    assert_same_adapter(model, sharded)


def write_peft(folder, config, tensors=None, **changes):
    model = adapted_model(config, LoraConfig(rank=RANK, alpha=8.0))
    save_adapter(folder, model, to="hf", base="some/base")
    path = folder / PEFT_CONFIG
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    if tensors is not None:
        save_file(tensors(load_file(folder / PEFT)), folder / PEFT)
    return model


@pytest.mark.parametrize(
    ("changes", "scale"),
    [({}, 2.0), ({"use_rslora": True}, 4.0), ({"lora_alpha": 3}, 0.75), ({"layers_to_transform": [0, 1, 2]}, 2.0)],
)
def test_factors_are_those_of_peft(tmp_path, changes, scale):
    config = tiny_config("mistral")
    write_peft(tmp_path, config, **changes)
    assert set(read_adapter(tmp_path, config).modules.values()) == {LowRank(RANK, scale)}


@pytest.mark.parametrize(
    "changes",
    [
        {"use_dora": True}, {"bias": "all"}, {"bias": "lora_only"}, {"modules_to_save": ["lm_head"]},
        {"lora_bias": True}, {"fan_in_fan_out": True}, {"target_parameters": ["x"]}, {"use_qalora": True},
        {"trainable_token_indices": [1]}, {"layer_replication": [[0, 1]]}, {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"}, {"init_lora_weights": "loftq"}, {"init_lora_weights": "corda"},
        {"alora_invocation_tokens": [1]}, {"use_bdlora": {"x": 1}}, {"peft_type": "LOHA"}, {"r": 8},
        {"rank_pattern": {"q_proj": 8}}, {"alpha_pattern": {"(a|a)*q": 8}}, {"lora_alpha": None},
    ],
)  # fmt: skip
def test_what_is_not_plain_lora_is_refused_by_name(tmp_path, changes):
    config = tiny_config("mistral", n_layers=1)
    write_peft(tmp_path, config, **changes)
    with pytest.raises(MinistralError) as caught:
        read_adapter(tmp_path, config)
    (key,) = changes
    assert (key if key not in ("r", "rank_pattern") else "of rank 4; expected 8") in str(caught.value)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


def prefixed(name, values=None):
    def change(tensors):
        first = next(key for key in tensors if "q_proj.lora_B" in key)
        return {**tensors, name: tensors[first] if values is None else values}

    return change


FIRST = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("tensors", "named"),
    [
        (prefixed("base_model.model.model.vision_tower.transformer.layers.0.attention.q_proj.lora_B.weight"), "vision"),
        (prefixed("base_model.model.model.embed_tokens.lora_embedding_A"), "embed_tokens"),
        (prefixed("base_model.model.lm_head.weight"), "lm_head"),
        (prefixed(f"{FIRST[:-7]}.bias"), "bias"),
        (prefixed(FIRST.replace("lora_B.weight", "lora_magnitude_vector.weight")), "lora_magnitude_vector"),
        (prefixed("layers.0.attention.wq.lora_B.weight"), "layers.0.attention.wq"),
        (prefixed(FIRST, np.zeros((64, RANK), np.int8)), "dtype I8"),
        (prefixed(FIRST, np.zeros((63, RANK), np.float32)), r"\[63, 4\], expected \[64, 4\]"),
        (prefixed(FIRST, np.zeros((64, RANK), np.complex64)), "complex|C64"),
        (lambda tensors: {name: tensors[name] for name in tensors if name != FIRST}, "without its other half"),
        (lambda tensors: {}, "holds no tensors"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named_in_one_line(tmp_path, tensors, named):
    config = tiny_config("mistral", n_layers=1)
    write_peft(tmp_path, config, tensors)
    with pytest.raises(MinistralError, match=named) as caught:
        read_adapter(tmp_path, config)
    assert str(caught.value).startswith(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("to", ["mistral", "hf"])
def test_an_adapter_of_another_base_is_refused(tmp_path, to):
    save_adapter(tmp_path, adapted_model(tiny_config("mistral")), to=to, base="x/y")
    for other in (tiny_config("wide_heads"), tiny_config("mistral", n_layers=1)):
        with pytest.raises(MinistralError, match=r"lora\.safetensors|adapter_model\.safetensors") as caught:
            read_adapter(tmp_path, other)
        assert re.search(r"tensor '[\w.]+' (has shape|is not part)", str(caught.value))


def test_a_truncated_file_is_one_line(tmp_path):
    save_adapter(tmp_path, adapted_model(tiny_config("mistral")), to="mistral")
    raw = (tmp_path / LORA).read_bytes()
    for size in (0, 7, 100, len(raw) - 1):
        (tmp_path / LORA).write_bytes(raw[:size])
        with pytest.raises(MinistralError) as caught:
            read_adapter(tmp_path, tiny_config("mistral"))
        assert str(caught.value).startswith(str(tmp_path / LORA))


@pytest.mark.parametrize(("to", "name"), [("hf", PEFT_CONFIG), ("mistral", "params.json")])
def test_a_damaged_config_is_one_line_or_harmless(tmp_path, to, name):
    config = tiny_config("mistral")
    save_adapter(tmp_path, adapted_model(config, PATTERNS if to == "hf" else None), to=to, base="some/base")
    path = tmp_path / name
    refused = 0
    for damage in damaged_documents(json.loads(path.read_text()), seed=0):
        path.write_text(damage.text, encoding="utf-8", errors="surrogatepass")
        try:
            adapter = read_adapter(tmp_path, config)
        except MinistralError as error:
            refused += 1
            assert str(error).startswith(str(path.parent)), damage  # noqa: PT017
            assert "\n" not in str(error), damage  # noqa: PT017
        else:
            assert all(np.isfinite(module.scale) and module.rank > 0 for module in adapter.modules.values()), damage
    assert refused > (20 if to == "hf" else 5)


def test_a_lone_file_has_the_base_of_the_model_and_its_own_scaling(tmp_path):
    model = adapted_model(tiny_config("mistral"))
    save_adapter(tmp_path, model, to="mistral")
    (tmp_path / "params.json").unlink()
    again = bare_model(model.config)
    attach_adapter(again, read_adapter(tmp_path, model.config))
    assert_same_adapter(model, again)


def test_a_folder_without_adapter_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(MinistralError, match=r"no adapter; expected .*adapter_config\.json"):
            read_adapter(folder, tiny_config("mistral"))
    with pytest.raises(MinistralError, match="has no adapter to write"):
        save_adapter(tmp_path / "x", bare_model(tiny_config("mistral")), to="hf")
    assert not (tmp_path / "x").exists()


def test_the_summary_is_one_line(tmp_path):
    save_adapter(tmp_path, adapted_model(tiny_config("mistral"), PATTERNS), to="hf")
    summary = read_adapter(tmp_path, tiny_config("mistral")).summary()
    assert summary == "rank 2 to 4, scaling 1.5 to 3, 9 projections"


@pytest.mark.parametrize("save", [save_mistral, save_hf])
def test_a_model_with_an_adapter_is_not_saved_as_if_it_had_none(tmp_path, save):
    model = adapted_model(tiny_config("mistral", n_layers=1))
    with pytest.raises(MinistralError, match="has an adapter"):
        save(tmp_path / "m", parameters(model), model.config)
    assert not (tmp_path / "m").exists()
    save(tmp_path / "m", parameters(without_adapters(model)), model.config)


def test_the_base_of_a_loaded_adapter_is_untouched(tmp_path):
    config = tiny_config("mistral")
    save_adapter(tmp_path, adapted_model(config), to="hf")
    model = bare_model(config)
    before = parameters(model)
    attach_adapter(model, read_adapter(tmp_path, config))
    assert all(parameters(model)[name] is array for name, array in before.items())
    assert not any("lora" in ".".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(bare_model(config))))


EXPERTS = {"mixtral": MIXTRAL, "small_4": SMALL_4}


@pytest.mark.parametrize("to", ["mistral", "hf"])
@pytest.mark.parametrize("kind", EXPERTS)
def test_adapters_of_experts_are_read_again_and_merged_into_both_layouts(tmp_path, kind, to):
    config = EXPERTS[kind]
    model = adapted_model(config, LoraConfig(rank=RANK, scaling=SCALE))
    save_adapter(tmp_path / "a", model, to=to)
    base = parameters(without_adapters(model))
    save_mistral(tmp_path / "base", base, config)
    assert_same_adapter(model, load_model(tmp_path / "base", adapter=tmp_path / "a"))
    changed = {"layers.1.feed_forward.experts.w2", "layers.1.feed_forward.experts.w3", "layers.1.attention.wo"}
    if kind == "small_4":
        changed.add("layers.1.feed_forward.shared_experts.w1")
    for layout in ("mistral", "hf"):
        merge(tmp_path / "base", tmp_path / "a", tmp_path / layout, to=layout)
        merged = parameters(load_model(tmp_path / layout))
        assert changed <= adapted(model).keys()
        for name, linear in adapted(model).items():
            product = jnp.einsum("...RI,...OR->...OI", linear.lora_a[...], linear.lora_b[...])
            expected = linear.weight[...] + SCALE * product
            np.testing.assert_allclose(merged[f"{name}.weight"], expected, rtol=0, atol=1e-5, err_msg=name)
        untouched = base.keys() - {f"{name}.weight" for name in adapted(model)}
        assert all(np.array_equal(merged[name], base[name]) for name in untouched)


@pytest.mark.parametrize("kind", EXPERTS)
def test_what_is_written_for_peft_is_what_the_mistral_file_is_converted_to(tmp_path, kind):
    model = adapted_model(EXPERTS[kind], LoraConfig(rank=RANK, scaling=SCALE))
    save_adapter(tmp_path / "m", model, to="mistral")
    save_adapter(tmp_path / "p", model, to="hf")
    convert(tmp_path / "m", tmp_path / "c", to="hf")
    found, expected = (load_file(tmp_path / folder / PEFT) for folder in ("p", "c"))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], expected[name]) for name in found)
    documents = [json.loads((tmp_path / folder / PEFT_CONFIG).read_text()) for folder in ("p", "c")]
    assert documents[0] == documents[1]


def test_one_a_for_w1_and_w3_stays_one_in_peft(tmp_path):
    model = adapted_model(MIXTRAL, LoraConfig(rank=RANK, scaling=SCALE, targets=("w1", "w3")))
    for name, linear in adapted(model).items():
        if name.endswith("w3"):
            linear.lora_a = linear.lora_a.replace(projections(model)[name[:-1] + "1"].lora_a[...])
    save_adapter(tmp_path / "a", model, to="hf")
    name = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"
    found = load_file(tmp_path / "a" / PEFT)
    assert found[name.format("A")].shape == (4 * RANK, 64)
    assert found[name.format("B")].shape == (2 * 96, 4 * RANK)
    save_mistral(tmp_path / "base", parameters(without_adapters(model)), MIXTRAL)
    assert_same_adapter(model, load_model(tmp_path / "base", adapter=tmp_path / "a"))


def test_factors_of_w1_and_w3_that_differ_have_no_form_in_peft(tmp_path):
    lora = LoraConfig(rank=RANK, alpha=4.0, alpha_pattern={"w3": 5.0})
    with pytest.raises(MinistralError, match=r"w1 and w3 of the experts of layers\.0 have two factors"):
        save_adapter(tmp_path / "a", adapted_model(MIXTRAL, lora), to="hf")


def test_adapters_of_experts_go_onto_a_stack_and_come_back(tmp_path):
    model = adapted_model(SMALL_4, LoraConfig(rank=RANK, scaling=SCALE))
    save_adapter(tmp_path / "a", model, to="hf")
    save_mistral(tmp_path / "base", parameters(without_adapters(model)), SMALL_4)
    stacked = load_model(tmp_path / "base", adapter=tmp_path / "a", stacked=True)
    save_adapter(tmp_path / "b", stacked, to="hf")
    assert (tmp_path / "a" / PEFT).read_bytes() == (tmp_path / "b" / PEFT).read_bytes()


def test_every_expert_has_its_own_adapter_in_files(tmp_path):
    config = MIXTRAL
    model = adapted_model(config, LoraConfig(rank=RANK, scaling=SCALE, targets=("wv", "w1", "w2")))
    save_adapter(tmp_path / "a", model, to="mistral")
    found = load_file(tmp_path / "a" / LORA)
    b = np.asarray(adapter_parameters(model)["layers.1.feed_forward.experts.w2.lora_b"])
    assert b.shape == (4, 64, RANK)
    for expert in range(4):
        name = f"layers.1.feed_forward.experts.{expert}.w2.lora_B.weight"
        np.testing.assert_array_equal(found[name], b[expert])
    save_mistral(tmp_path / "base", parameters(without_adapters(model)), config)
    again = load_model(tmp_path / "base", adapter=tmp_path / "a")
    assert_same_adapter(model, again)
    merge(tmp_path / "base", tmp_path / "a", tmp_path / "m")
    merged = parameters(load_model(tmp_path / "m"))
    for name, linear in adapted(model).items():
        product = jnp.einsum("...RI,...OR->...OI", linear.lora_a[...], linear.lora_b[...])
        np.testing.assert_allclose(merged[f"{name}.weight"], linear.weight[...] + SCALE * product, rtol=0, atol=1e-5)
    some = {name: array for name, array in found.items() if "experts.3." not in name}
    save_file(some, tmp_path / "a" / LORA, {"scaling": "1.75"})
    with pytest.raises(MinistralError, match="only some of them"):
        load_model(tmp_path / "base", adapter=tmp_path / "a")

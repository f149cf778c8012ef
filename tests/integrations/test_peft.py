"""PEFT itself: LoRA beside packed weights trains, is saved and loaded; merging says what to do instead, which works."""

import peft
import pytest
import tiny
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from tiny import IDS, logits, packed
from transformers import AutoModelForCausalLM

import inq_kernels as inq
from inq_kernels.integrations.peft import PackedLoraLinear, merge_and_requantize, prepare
from inq_kernels.integrations.transformers import InqConfig, save_pretrained

FMT = inq.Format(5, granularity="channel")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    path = tmp_path_factory.mktemp("peft")
    tiny.model().save_pretrained(path / "dense")
    model = AutoModelForCausalLM.from_pretrained(path / "dense", quantization_config=InqConfig(FMT))
    save_pretrained(model, path / "packed")
    return path / "packed"


def adapted(source, prepared=prepare, **changes):
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_pretrained(source)
    config = LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **changes})
    return get_peft_model(model, prepared(config))


def train(model, steps=3):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    losses = []
    for _ in range(steps):
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def codes(model):
    return {n: t.clone() for n, t in model.state_dict().items() if t.dtype in (torch.uint8, torch.int8)}


def test_all_linear_trains_beside_packed_weights_which_stay_as_they_are(source):
    model = adapted(source)
    layers = [m for m in model.modules() if isinstance(m, PackedLoraLinear)]
    assert len(layers) == 14
    assert all(isinstance(m.get_base_layer(), inq.Linear) for m in layers)
    trainable = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in n for n in trainable)
    before = codes(model)
    model.train()
    losses = train(model)
    assert losses[-1] < losses[0]
    after = codes(model)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_adapters_are_saved_and_loaded(source, tmp_path):
    model = adapted(source)
    train(model)
    model.eval()
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(source)
    config = prepare(PeftConfig.from_pretrained(tmp_path / "adapter"))
    again = PeftModel.from_pretrained(base, tmp_path / "adapter", config=config)
    assert torch.equal(logits(again), logits(model))


def test_merging_says_what_to_do_instead(source):
    model = adapted(source)
    before = codes(model)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(NotImplementedError, match=r"merge_and_requantize\(model\), which rounds it, or keep"):
            call()
    assert all(torch.equal(before[n], t) for n, t in codes(model).items())


def test_merge_and_requantize_rounds_the_sums(source, tmp_path):
    model = adapted(source)
    train(model)
    model.eval()
    sums = {}
    for name, layer in model.base_model.model.named_modules():
        if isinstance(layer, PackedLoraLinear):
            delta = layer.get_delta_weight("default")
            assert delta.abs().max() > 0
            sums[name] = inq.unpack(layer.get_base_layer().packed) + delta
    base, report = merge_and_requantize(model)
    assert type(base).__name__ == "LlamaForCausalLM"
    assert list(packed(base)) == list(sums) == [row.name for row in report.modules]
    for name, w in sums.items():
        assert torch.equal(inq.unpack(base.get_submodule(name).packed), inq.quantize(w, FMT)), name
    assert all(8 < row.sqnr_db < float("inf") for row in report.modules)
    assert not any(isinstance(m, peft.tuners.lora.LoraLayer) for m in base.modules())
    save_pretrained(base, tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(again), logits(base))


def test_without_prepare_all_works_but_for_what_merging_says(source):
    """The same adapters, an error of PEFT that changes nothing, and merge_and_requantize all the same."""
    models = [adapted(source), adapted(source, prepared=lambda config: config)]
    assert train(models[0]) == train(models[1])
    before = codes(models[1])
    with pytest.raises(RuntimeError):
        models[1].merge_adapter()
    assert all(torch.equal(before[n], t) for n, t in codes(models[1]).items())
    bases = [merge_and_requantize(model)[0] for model in models]
    assert torch.equal(logits(bases[0]), logits(bases[1]))


def test_a_float_layer_is_merged_by_peft_and_row_scales_stay(source):
    model = AutoModelForCausalLM.from_pretrained(source)
    layer = model.model.layers[0].mlp.up_proj
    scale = torch.linspace(0.75, 1.25, 160).view(160, 1)
    layer._set_codes(layer.weight.data, layer.weight_exp.data, scale)
    config = LoraConfig(r=2, target_modules=["up_proj", "lm_head"], init_lora_weights=False)
    model = get_peft_model(model, prepare(config))
    head = model.base_model.model.lm_head
    expected = head.get_base_layer().weight + head.get_delta_weight("default")
    wanted = inq.unpack(layer.packed) + model.base_model.model.model.layers[0].mlp.up_proj.get_delta_weight("default")
    base, _ = merge_and_requantize(model, ["default"])
    assert torch.equal(base.lm_head.weight, expected)
    assert torch.equal(layer.weight_scale, scale)
    inner = inq.quantize(wanted / scale, FMT)
    torch.testing.assert_close(inq.unpack(layer.packed), inner * scale, rtol=1e-6, atol=0)


def test_nothing_is_changed_by_an_error(source):
    model = adapted(source, init_lora_weights=False)
    layers = [m for m in model.modules() if isinstance(m, PackedLoraLinear)]
    with torch.no_grad():
        layers[-1].lora_B["default"].weight[0, 0] = float("nan")
    before = codes(model)
    with pytest.raises(ValueError, match=r"merge_and_requantize: layer 'model\.layers\.1\..*NaN"):
        merge_and_requantize(model)
    assert all(torch.equal(before[n], t) for n, t in codes(model).items())
    with pytest.raises(ValueError, match=r"expected some of \['default'\], got \{'other'\}"):
        merge_and_requantize(model, ["other"])
    with pytest.raises(TypeError, match="expected a PeftModel with LoRA, got LlamaForCausalLM"):
        merge_and_requantize(AutoModelForCausalLM.from_pretrained(source))


def test_trained_tokens_are_merged_too(source):
    base = AutoModelForCausalLM.from_pretrained(source)
    config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=[1, 2, 3], task_type="CAUSAL_LM")
    model = get_peft_model(base, prepare(config))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "trainable_tokens_delta" in name:
                parameter.add_(1.0)
    expected = logits(model)
    assert (expected - logits(AutoModelForCausalLM.from_pretrained(source))).abs().max() > 0.1
    merged, _ = merge_and_requantize(model)
    # Without a step the LoRA itself is zero, and nothing is rounded.
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-6)


def test_a_name_that_is_given_twice_is_merged_once(source):
    for names in (["default", "default"], "default"):
        model = adapted(source, init_lora_weights=False)
        layer = model.base_model.model.model.layers[1].mlp.up_proj
        wanted = inq.unpack(layer.get_base_layer().packed) + layer.get_delta_weight("default")
        base, _ = merge_and_requantize(model, names)
        assert torch.equal(inq.unpack(base.model.layers[1].mlp.up_proj.packed), inq.quantize(wanted, FMT))


def test_an_adapter_that_runs_for_some_tokens_alone_is_not_merged(source):
    model = adapted(source, init_lora_weights=False, alora_invocation_tokens=[1, 2])
    before = codes(model)
    with pytest.raises(ValueError, match="expected plain LoRA, whose product is added to the weight, got ALora"):
        merge_and_requantize(model)
    assert all(torch.equal(before[n], t) for n, t in codes(model).items())


class Twice(torch.nn.Module):
    """Runs one layer under two names."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a = torch.nn.Linear(32, 32)
        self.b, self.c = self.a, torch.nn.Linear(32, 32)

    def forward(self, x):
        return self.c(self.b(torch.relu(self.a(x))))


@pytest.mark.parametrize("targets", [["a", "b", "c"], ["a", "c"]], ids=["two adapters", "one adapter"])
def test_a_base_layer_that_runs_elsewhere_too_is_not_merged_into(targets):
    model = Twice()
    inq.convert(model, FMT)
    model = get_peft_model(model, prepare(LoraConfig(r=2, target_modules=targets, init_lora_weights=False)))
    before = codes(model)
    with pytest.raises(ValueError, match="layer '[ab]': expected a base layer of its own, got one that the model also"):
        merge_and_requantize(model)
    assert all(torch.equal(before[n], t) for n, t in codes(model).items())
    assert isinstance(model.base_model.model.c, PackedLoraLinear)


def test_a_model_with_adapters_in_it_is_not_saved_as_a_packed_one(source, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(source)
    model = get_peft_model(base, prepare(LoraConfig(r=2, target_modules=["q_proj"])))
    added = AutoModelForCausalLM.from_pretrained(source)
    added.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]))
    for each in (base, model, added):
        with pytest.raises(
            ValueError, match=r"a model without adapters, got '.*\.layers\.0\.self_attn\.q_proj' with one"
        ):
            save_pretrained(each, tmp_path / "saved")
    save_pretrained(model.unload(), tmp_path / "saved")
    expected = logits(AutoModelForCausalLM.from_pretrained(source))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), expected)


def test_what_reads_the_base_weight_is_refused():
    with pytest.raises(ValueError, match="use_dora: expected False"):
        prepare(LoraConfig(use_dora=True))
    with pytest.raises(ValueError, match="init_lora_weights: expected one of .*, got 'pissa'"):
        prepare(LoraConfig(init_lora_weights="pissa"))
    with pytest.raises(TypeError, match=r"expected a peft\.LoraConfig, got dict"):
        prepare({})


def test_packed_convolutions_are_refused():
    net = torch.nn.Sequential(torch.nn.Conv2d(4, 8, 3), torch.nn.Flatten(), torch.nn.Linear(8 * 36, 3))
    inq.convert(net, FMT)
    with pytest.raises(ValueError, match="expected target_modules without packed convolutions, got Conv2d"):
        get_peft_model(net, prepare(LoraConfig(r=2, target_modules=["0", "2"])))
